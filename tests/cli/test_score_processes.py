"""`alignprop score` in processes of its own: two at once, signals, closed pipes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.factories import picture

PROGRAM = (sys.executable, "-m", "alignprop_cli")
# At work until it is told to go on, so that two processes are there together however slow they are.
WAITING = """
import pathlib, time

def waiting(images, prompts):
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def many(tmp_path):
    """Return a folder with 48 images and a reward that waits."""
    for index in range(48):
        picture(tmp_path / "many" / f"{index:02d}.png", index)
    (tmp_path / "mine.py").write_text(WAITING)
    return tmp_path


MINE = ("--reward", "mine.py:waiting", "--prompt", "x")


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
def test_of_two_on_one_output_one_wins_and_the_other_says_so(warm, many, flag):
    if flag == ("--overwrite",):
        (many / "rows.csv").write_text("old")
    args = ("score", "many", *MINE, "-q", "--output", "rows.csv", *flag)
    both = [warm.start(args, many) for _ in range(2)]
    while not any(process.ended() for process in both):
        time.sleep(0.1)
    (many / "go").touch()
    ended = [process.wait() for process in both]
    codes, told = [end.code for end in ended], [end.err for end in ended]
    assert sorted(codes) == [0, 2], told
    loser = codes.index(2)
    assert f"another alignprop (process {both[1 - loser].pid}) is writing it" in told[loser]
    assert len((many / "rows.csv").read_text().splitlines()) == 49
    assert sorted(p.name for p in many.iterdir()) == ["go", "many", "mine.py", "rows.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL", "SIGINT"])
def test_no_signal_leaves_a_decoding_process_behind(warm, tmp_path, name):
    # Pictures whose pixels fill a pipe, so that the workers wait for it.
    for index in range(40):
        Image.new("RGB", (512, 512), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "mine.py").write_text(WAITING)
    process = warm.start(("score", ".", *MINE, "--workers", "2"), tmp_path, leave=True)
    deadline = time.monotonic() + 200
    while len(in_session(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(in_session(process.pid)) >= 3
    time.sleep(1.0)  # until the pipes are full
    number = getattr(signal, name)
    os.kill(process.pid, number)
    ended = process.wait()
    assert ended.code == 128 + number, ended.err
    assert name == "SIGKILL" or f"interrupted by {name}" in ended.err
    deadline = time.monotonic() + 2
    while (left := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def in_session(session):
    """Return the processes of a session that are not zombies."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(place.name))
    return found


@pytest.mark.long
def test_pipes_and_closed_streams_end_as_a_shell_expects(warm, tmp_path):
    for index in range(300):
        picture(tmp_path / "many" / f"{index}.png", index % 256)
    ask = ("score", "many", "--reward", "brightness", "--workers", "0")
    command = shlex.join([*PROGRAM, *ask, "--format", "csv"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=200,
    )
    assert done.returncode == 141
    ascii_only = ("tests.cli.streams:encode", "ascii")
    done = warm.run(*ask, "--output", "new.csv", cwd=tmp_path, before=[ascii_only])
    assert done.code == 0, done.err
    assert "300 images measured" in done.out
    full = ("tests.cli.streams:connect", 2, "/dev/full")
    done = warm.run("score", "none", "--reward", "brightness", cwd=tmp_path, before=[full])
    assert done.code == 3
