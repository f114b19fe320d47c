"""`alignprop score` in processes of its own: two at once, signals, closed pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.factories import picture

SCORE = (sys.executable, "-m", "alignprop_cli", "score")
# At work until it is told to go on, so that two processes are there together however slow they are.
WAITING = """
import pathlib, time

def waiting(images, prompts):
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
    return images.mean(dim=(1, 2, 3))
"""


def shell(command, folder, **environment):
    """Run a command of bash in a folder."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; score() {{ {" ".join(SCORE)} "$@"; }}; {command}'],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture
def many(tmp_path):
    """Return a folder with 48 images and a reward that waits."""
    for index in range(48):
        picture(tmp_path / "many" / f"{index:02d}.png", index)
    (tmp_path / "mine.py").write_text(WAITING)
    return tmp_path


def started(folder, *args):
    return subprocess.Popen(
        [*SCORE, "many", "--reward", "mine.py:waiting", "--prompt", "x", "-q", *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
def test_of_two_on_one_output_one_wins_and_the_other_says_so(many, flag):
    if flag == ("--overwrite",):
        (many / "rows.csv").write_text("old")
    both = [started(many, "--output", "rows.csv", *flag) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    (many / "go").touch()
    told = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], told
    loser = codes.index(2)
    assert f"another alignprop (process {both[1 - loser].pid}) is writing it" in told[loser]
    assert len((many / "rows.csv").read_text().splitlines()) == 49
    assert sorted(p.name for p in many.iterdir()) == ["go", "many", "mine.py", "rows.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL", "SIGINT"])
def test_no_signal_leaves_a_decoding_process_behind(tmp_path, name):
    # Pictures whose pixels fill a pipe, so that the workers wait for it.
    for index in range(40):
        Image.new("RGB", (512, 512), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "mine.py").write_text(WAITING)
    process = subprocess.Popen(
        [*SCORE, ".", "--reward", "mine.py:waiting", "--prompt", "x", "--workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(in_session(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(in_session(process.pid)) >= 3
    time.sleep(1.0)  # until the pipes are full
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    number = getattr(signal, name)
    assert process.returncode == (-number if name == "SIGKILL" else 128 + number), err
    assert name == "SIGKILL" or f"interrupted by {name}" in err.decode()
    deadline = time.monotonic() + 2
    while (left := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
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


def test_pipes_and_closed_streams_end_as_a_shell_expects(tmp_path):
    for index in range(300):
        picture(tmp_path / "many" / f"{index}.png", index % 256)
    ask = "score many --reward brightness --workers 0"
    assert shell(f"{ask} --format csv | head -1", tmp_path).returncode == 141
    done = shell(f"{ask} --output new.csv", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "300 images measured" in done.stdout
    assert shell("score none --reward brightness 2>/dev/full", tmp_path).returncode == 3
