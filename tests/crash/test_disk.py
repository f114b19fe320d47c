"""Full disks, limits, permissions, names: the message says what it is, and the state is right."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.crash.commands import COMMANDS, TO_RUN, TRAIN, Commands, left, same_end, tree

OBEY = ("tests.crash.hooks:obey_permissions",)
RUN_AT = "tests.crash.hooks:run_at"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534


@contextmanager
def small_disk(kib: int) -> Iterator[Path]:
    """Yield a folder that is a disk of its own; skip where this user may not make one."""
    folder = Path(tempfile.mkdtemp())
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        folder.rmdir()
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def _used(folder: Path) -> int:
    """Return the KiB that a disk has given away."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


def _grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)


# From less than one file to nearly all: the whole run takes what `du` says.
SIZES = [16, 64, 96, 128, 160, 200, 256, 320, 400, 480, 600, 800]
OFTEN = (256,)
"""The sizes of which `.ci/run` makes disks."""


@pytest.mark.parametrize(
    "kib",
    [pytest.param(s, marks=pytest.mark.long if s in OFTEN else pytest.mark.slow) for s in SIZES],
)
def test_a_full_disk_is_said_and_with_room_the_run_goes_on_identically(
    commands: Commands, kib: int
) -> None:
    with small_disk(kib) as place:
        done = commands(*TO_RUN, cwd=place)
        if done.code == 0:
            assert sum(p.stat().st_size for p in place.rglob("*")) <= kib * 1024
            # A run is not lost for its report, which has Plotly inside: five megabytes.
            if not (place / "run" / "report.html").exists():
                assert "report.html cannot be written" in done.err
                return
        else:
            assert done.code == 4, done.err
            assert "the disk is full" in done.err
            assert not left(place), done.err
        _grow(place)
        done = commands(*TO_RUN, cwd=place)
        assert done.code == 0, done.err
        same_end(place / "run", commands.run)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param("evaluate", marks=pytest.mark.slow), "soup", "score"]
)
def test_a_full_disk_leaves_the_earlier_result(commands: Commands, name: str) -> None:
    with small_disk(65536) as place:
        commands.inputs(place)
        args = COMMANDS[name].args
        assert commands(*args, cwd=place).code == 0
        before = tree(place / COMMANDS[name].output)
        # All that is left, and a few kilobytes given back.
        subprocess.run(["mount", "-o", f"remount,size={_used(place) + 64}k", place], check=True)
        with suppress(OSError), (place / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(place / "fill", (place / "fill").stat().st_size - 8192)
        done = commands(*args, "--overwrite", cwd=place)
        assert done.code == 4, done.err
        assert "the disk is full" in done.err
        assert tree(place / COMMANDS[name].output) == before
        assert not left(place)


@pytest.mark.parametrize("kib", [pytest.param(size, marks=pytest.mark.slow) for size in (1, 8, 30)])
def test_a_limit_on_files_is_said(commands: Commands, place: Path, kib: int) -> None:
    hook = ("tests.crash.hooks:limit_files", kib * 1024)
    done = commands(*TO_RUN, cwd=place, before=[hook])
    assert done.code == 4, done.err
    assert "a limit on the size of files" in done.err
    assert not left(place)
    done = commands(*TO_RUN, cwd=place)
    assert done.code == 0, done.err
    same_end(place / "run", commands.run)


def closed(place: Path, name: str, mode: int) -> None:
    """Take permissions from a folder; where root makes it, it becomes another user's."""
    (place / name).chmod(mode)
    if ROOT:
        os.chown(place / name, NOBODY, NOBODY)


READ_ONLY = {
    "new": (*TRAIN, "--output=ro/run"),
    "resume": ("train", "--resume=ro/run", "--steps=4"),
    "auto": (*TRAIN, "--resume=auto", "--output=ro/run", "--steps=4"),
    "evaluate": ("evaluate", "run", "--output=ro/e", "--images=1", "--batch-size=1"),
    "beside": ("evaluate", "ro/run", "--images=1", "--batch-size=1"),
    "soup": ("soup", "run", "base", "--output=ro/s"),
    "score": ("score", "pictures", "--reward=brightness", "--output=ro/o.csv"),
    "gallery": ("score", "pictures", "--reward=brightness", "--gallery"),
}


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_folder_that_is_read_only_is_said(commands: Commands, place: Path, name: str) -> None:
    commands.inputs(place)
    (place / "ro").mkdir()
    shutil.copytree(commands.run, place / "ro" / "run")
    if name == "new":
        shutil.rmtree(place / "ro" / "run")
    inside = sorted(p for p in (place / "ro").rglob("*") if p.is_dir())
    before = tree(place / "ro")
    for folder in (*reversed(inside), place / "ro"):
        closed(place, str(folder.relative_to(place)), 0o555)
    if name == "gallery":
        closed(place, ".", 0o555)
    try:
        done = commands(*READ_ONLY[name], cwd=place, before=[OBEY])
    finally:
        for folder in (place, place / "ro", *inside):
            folder.chmod(0o755)
    assert done.code in (2, 3, 4), done.err
    assert "bug" not in done.err
    assert "ro" in done.err or "gallery.html" in done.err
    assert tree(place / "ro") == before
    assert not left(place)
    # Before the work, not after hours of it.
    assert "base model" not in done.err


CLOSED = {
    "output": (*TRAIN, "--output=own/x/run"),
    "resume": ("train", "--resume=own/x/run"),
    "auto": (*TRAIN, "--resume=auto", "--output=own/x/run"),
    "init": (*TRAIN, "--set=lora.init=own/x/run", "--output=r"),
    "config": ("train", "--config=own/x/c.yaml", "--dry-run"),
    "prompts": (*TRAIN, "--set=train.prompts=own/x/p.txt", "--output=r"),
    "model": (*TRAIN, "--model=own/x/model", "--output=r"),
    "evaluate": ("evaluate", "own/x/run"),
    "evaluated": ("evaluate", "run", "--output=own/x/e", "--images=1"),
    "soup": ("soup", "own/x/run", "base"),
    "souped": ("soup", "run", "base", "--output=own/x/s"),
    "score": ("score", "own/x/pictures", "--reward=brightness"),
    "scored": ("score", "pictures", "--reward=brightness", "--output=own/x/o.csv"),
    "table": ("score", "pictures", "--reward=brightness", "--prompts=own/x/t.csv"),
}


@pytest.mark.skipif(not ROOT, reason="only root can give a folder to another user")
@pytest.mark.parametrize("name", CLOSED)
def test_a_folder_of_another_user_is_said(commands: Commands, place: Path, name: str) -> None:
    commands.inputs(place)
    (place / "own" / "x").mkdir(parents=True)
    closed(place, "own", 0o700)
    done = commands(*CLOSED[name], cwd=place, before=[OBEY])
    assert done.code in (2, 3, 4), done.err
    assert "ermission denied" in done.err or "cannot be" in done.err, done.err
    assert "own" in done.err
    assert "bug" not in done.err
    assert not left(place)
    assert not (place / "r").exists()


NAMES = {"long": "x" * 300, "home": "~nosuchuser/x", "nul": "x/" * 3000}


@pytest.mark.parametrize(
    "kind", [k if k == "home" else pytest.param(k, marks=pytest.mark.slow) for k in NAMES]
)
def test_names_that_can_be_none_are_said(commands: Commands, place: Path, kind: str) -> None:
    name = NAMES[kind]
    commands.inputs(place)
    (place / "c.yaml").write_text(f"extends: {name}.yaml\n")
    for args in (
        ("train", "--preset=tiny", "--dry-run", f"--output={name}"),
        ("train", f"--resume={name}"),
        ("train", "--preset=tiny", "--resume=auto", "--dry-run", f"--output={name}"),
        ("train", f"--config={name}.yaml", "--dry-run"),
        ("train", "--config=c.yaml", "--dry-run"),
        ("train", "--preset=tiny", "--dry-run", f"--model={name}"),
        ("train", "--preset=tiny", "--dry-run", f"--set=lora.init={name}"),
        ("train", "--preset=tiny", "--dry-run", f"--set=train.prompts={name}.txt"),
        ("evaluate", name),
        ("evaluate", "run", f"--output={name}", "--images=1", "--batch-size=1"),
        ("evaluate", "run", f"--prompts={name}.txt"),
        ("evaluate", "base", f"--config={name}"),
        ("soup", name, "base"),
        ("soup", "run", "base", f"--output={name}"),
        ("score", name),
        ("score", "pictures", f"--output={name}.csv"),
        ("score", "pictures", "--reward=brightness", f"--prompts={name}.csv"),
    ):
        before = tree(place)
        done = commands(*args, cwd=place)
        # A folder may be made of many names; then it is made, unless all are too long together.
        assert done.code in (2, 3), (args[:3], done.code, done.err[-500:])
        assert "bug" not in done.err
        assert len(done.err) < 1500 + 2 * len(name), args[:2]
        assert tree(place) == before


VANISHING = {
    # What a shell does while the command runs.
    "moved": ("mv run gone", "alignprop_cli.training.trainer:Trainer.step", 2),
    "deleted": ("rm -rf run", "alignprop_cli.training.trainer:Trainer.step", 2),
    "checkpoints": (
        "rm -rf run/checkpoints; touch run/checkpoints",
        "alignprop_cli.training.checkpoint:save",
        1,
    ),
    "metrics": (
        "rm -f run/metrics.jsonl; mkdir run/metrics.jsonl",
        "alignprop_cli.training.trainer:Trainer.step",
        2,
    ),
    "unfinished": ("rm -rf run/checkpoints/.*unfinished", "alignprop_cli.lora.files:save", 1),
}


@pytest.mark.parametrize(
    "kind", [k if k == "moved" else pytest.param(k, marks=pytest.mark.slow) for k in VANISHING]
)
def test_what_goes_away_meanwhile_is_said(commands: Commands, place: Path, kind: str) -> None:
    command, name, nth = VANISHING[kind]
    done = commands(*TO_RUN, cwd=place, before=[(RUN_AT, name, command, nth)])
    assert done.code in (3, 4), done.err
    assert "bug" not in done.err
    assert "run" in done.err
