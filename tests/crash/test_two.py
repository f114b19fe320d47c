"""Of two commands that write to one place at the same moment one does its work, one is refused."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.crash.commands import COMMANDS, TRAIN, Commands, lasting, left, same_end

WAIT = "tests.crash.hooks:wait_at"
TWICE = {
    **{name: (command.args, command.works) for name, command in COMMANDS.items()},
    "overwrite": ((*COMMANDS["evaluate"].args, "--overwrite"), COMMANDS["evaluate"].works),
    "rows": ((*COMMANDS["score"].args, "--resume"), COMMANDS["score"].works),
    "train": ((*TRAIN, "--output=new/run"), "alignprop_cli.models.families:open_model"),
    "auto": (
        (*TRAIN, "--output=new/run", "--resume=auto"),
        "alignprop_cli.models.families:open_model",
    ),
    "resume": (
        ("train", "--resume=first/run", "--steps=3"),
        "alignprop_cli.models.families:open_model",
    ),
}


def prepare(commands: Commands, place: Path) -> None:
    commands.inputs(place)
    shutil.copytree(commands.started, place / "first" / "run")


@pytest.mark.parametrize(
    "name",
    [n if n in ("soup", "score") else pytest.param(n, marks=pytest.mark.slow) for n in TWICE],
)
def test_the_second_is_refused_and_names_the_first(
    commands: Commands, place: Path, name: str
) -> None:
    args, works = TWICE[name]
    prepare(commands, place)
    flag = place.parent / "flag"
    first = commands.warm.start(args, place, before=[(WAIT, works, str(flag))])
    deadline = time.monotonic() + 60
    while not (place.parent / "flag.there").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
        assert not first.ended(), first.err()
    second = commands(*args, cwd=place)
    flag.touch()
    ended = first.wait()
    assert ended.code == 0, ended.err
    assert second.code == 2, second.err
    assert re.search(rf"\b{first.pid}\b", second.err), second.err
    _check(commands, place, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWICE)
def test_of_two_at_the_same_moment_one_wins(commands: Commands, place: Path, name: str) -> None:
    args, _ = TWICE[name]
    for number in range(8):
        here = place / str(number)
        here.mkdir()
        prepare(commands, here)
        both = [commands.warm.start(args, here) for _ in range(2)]
        codes = sorted(running.wait().code for running in both)
        # Where one begins after the other's end, what is finished is finished.
        allowed = [[0, 2], [0, 0]] if name in ("overwrite", "rows", "auto") else [[0, 2]]
        assert codes in allowed
        _check(commands, here, name)
        shutil.rmtree(here)


def _check(commands: Commands, place: Path, name: str) -> None:
    """Assert that the one has left what it leaves alone."""
    if name == "resume":
        (place / "first" / "run").rename(place.parent / "run")
        same_end(place.parent / "run", commands.run)
        shutil.rmtree(place.parent / "run")
    elif name in ("train", "auto"):
        (place / "new" / "run").rename(place.parent / "run")
        same_end(place.parent / "run", commands.run)
        shutil.rmtree(place.parent / "run")
    else:
        assert not left(place)
        kind = {"overwrite": "evaluate", "rows": "score"}.get(name, name)
        alone = place.parent / "alone"
        prepare(commands, _made(alone))
        done = commands(*COMMANDS[kind].args, cwd=alone)
        assert done.code == 0, done.err
        output = COMMANDS[kind].output
        assert lasting(place / output) == lasting(alone / output)
        shutil.rmtree(alone)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
