"""Killed at any moment, a command leaves the old or the new whole; a run goes on identically."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.crash.commands import (
    COMMANDS,
    TO_RUN,
    Commands,
    grow_old,
    lasting,
    left,
    metrics,
    same_end,
    spread,
    tree,
)

DIE = "tests.crash.hooks:die_at"


def changes(commands: Commands, place: Path, *args: str) -> list[str]:
    """Run a command undisturbed, and return every change that it makes to files."""
    log = place.parent / "changes"
    done = commands(*args, cwd=place, before=[(DIE, 0, str(place), str(log))])
    assert done.code == 0, done.err
    return log.read_text().splitlines()


def kill_at(commands: Commands, place: Path, number: int, *args: str) -> None:
    """Run a command that dies before its N-th change to files."""
    log = str(place.parent / "log")
    done = commands(*args, cwd=place, before=[(DIE, number, str(place), log)])
    assert done.code == 128 + signal.SIGKILL, done.err


def whole_checkpoints(run: Path) -> None:
    """Assert that all that looks like a checkpoint is one."""
    for folder in (run / "checkpoints").glob("step-*"):
        assert (folder / "state.json").read_text().endswith("}\n")
        for file in folder.glob("*.safetensors"):
            assert load_file(file)


def finish(commands: Commands, place: Path, *args: str) -> None:
    """Resume a killed run, which may have been done but for its lock."""
    done = commands(*args, cwd=place)
    assert done.code == 0, done.err


def train_killed(commands: Commands, place: Path, wanted: int | None, keep: int | None) -> None:
    """Kill a run at some of its changes to files, or at all, and resume it each time."""
    kept = () if keep is None else (f"--set=output.keep_last={keep}",)
    (place / "whole").mkdir()
    count = len(changes(commands, place / "whole", *TO_RUN, *kept))
    assert count > 20
    undisturbed = place / "whole" / "run"
    for number in spread(count, wanted or count):
        here = place / str(number)
        here.mkdir()
        kill_at(commands, here, number, *TO_RUN, *kept)
        whole_checkpoints(here / "run")
        grow_old(here)
        finish(commands, here, *TO_RUN, *kept)
        same_end(here / "run", undisturbed, keep)
        shutil.rmtree(here)


def test_a_run_killed_while_it_writes_goes_on_identically(commands: Commands, place: Path) -> None:
    train_killed(commands, place, 2, None)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [None, 1, 2])
def test_a_run_killed_at_every_change_goes_on_identically(
    commands: Commands, place: Path, keep: int | None
) -> None:
    train_killed(commands, place, None, keep)


@pytest.mark.slow
def test_a_resumed_run_killed_at_every_change_goes_on_identically(
    commands: Commands, place: Path
) -> None:
    again = ("train", "--resume=run", "--steps=3")
    (place / "whole").mkdir()
    shutil.copytree(commands.started, place / "whole" / "run")
    count = len(changes(commands, place / "whole", *again))
    for number in range(1, count + 1):
        here = place / str(number)
        here.mkdir()
        shutil.copytree(commands.started, here / "run")
        kill_at(commands, here, number, *again)
        whole_checkpoints(here / "run")
        is_done = (here / "run" / "checkpoints" / "step-000003").exists()
        grow_old(here)
        done = commands(*again, cwd=here)
        # What is done is an error for whoever names the run, unlike for --resume auto.
        is_error = is_done and "nothing to do" in done.err
        assert done.code == (2 if is_error else 0), (number, done.err)
        assert (here / "run" / "before_after.png").exists()
        same_end(here / "run", place / "whole" / "run")
        shutil.rmtree(here)


def killed_at_random(commands: Commands, place: Path, times: int, seed: int) -> None:
    """Kill a run again and again at random moments until it is done."""
    rng = random.Random(seed)
    started = time.monotonic()
    commands(*TO_RUN, cwd=place)
    longest = time.monotonic() - started
    undisturbed = place / "run"
    kills, here = 0, place / "killed"
    here.mkdir()
    while kills < times:
        running = commands.warm.start(TO_RUN, here)
        time.sleep(rng.uniform(0.0, 1.05 * longest))
        if not running.ended():
            os.kill(running.pid, signal.SIGKILL)
        done = running.wait()
        assert done.code in (0, 128 + signal.SIGKILL), done.err
        kills += done.code != 0
        whole_checkpoints(here / "run")
        # Some are killed several times before they are done.
        if done.code == 0 or rng.random() < 0.5:
            grow_old(here)
            done = commands(*TO_RUN, cwd=here)
            assert done.code == 0, done.err
            same_end(here / "run", undisturbed)
            shutil.rmtree(here)
            here.mkdir()


def test_a_run_killed_at_random_moments_goes_on_identically(
    commands: Commands, place: Path
) -> None:
    killed_at_random(commands, place, 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_run_killed_at_200_random_moments_goes_on_identically(
    commands: Commands, place: Path, seed: int
) -> None:
    killed_at_random(commands, place, 50, seed)


def replaced_killed(commands: Commands, place: Path, name: str, wanted: int | None) -> None:
    """Kill a command that replaces an earlier result: the old or the new one is there, whole."""
    command = COMMANDS[name]
    first, second = command.args, (*command.args, "--overwrite")
    # Another result than the first.
    change = {"evaluate": "--seed=5", "soup": "--coef=0.2", "score": "--reward=colourfulness"}
    second = (*second, change[name])
    commands.inputs(place)
    assert commands(*first, cwd=place).code == 0
    old, others = tree(place / command.output), tree(place / "run")
    (place.parent / "new").mkdir()
    new_place = place.parent / "new" / "place"
    shutil.copytree(place, new_place)
    count = len(changes(commands, new_place, *second))
    new = lasting(new_place / command.output)
    assert new != lasting(place / command.output)
    seen = set()
    for number in spread(count, wanted or count):
        here = place.parent / str(number) / "place"
        shutil.copytree(place, here)
        kill_at(commands, here, number, *second)
        found = tree(here / command.output)
        is_old = found == old
        assert is_old or lasting(here / command.output) == new, number
        seen.add(is_old)
        assert tree(here / "run") == others
        grow_old(here)
        done = commands(*second, cwd=here)
        assert done.code == 0, (number, done.err)
        assert lasting(here / command.output) == new
        assert not left(here), number
        shutil.rmtree(here)
    assert True in seen


@pytest.mark.parametrize("name", ["soup", "score"])
def test_a_replaced_result_is_the_old_or_the_new_one(
    commands: Commands, place: Path, name: str
) -> None:
    replaced_killed(commands, place, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_replaced_result_is_the_old_or_the_new_one_at_every_change(
    commands: Commands, place: Path, name: str
) -> None:
    replaced_killed(commands, place, name, None)


@pytest.mark.parametrize("wanted", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_rows_killed_while_they_are_written_are_completed_to_the_same_bytes(
    commands: Commands, place: Path, wanted: int | None
) -> None:
    commands.inputs(place)
    args = (*COMMANDS["score"].args, "--resume")
    whole = place.parent / "whole" / "place"
    shutil.copytree(place, whole)
    count = len(changes(commands, whole, *args))
    for number in spread(count, wanted or count):
        here = place.parent / str(number) / "place"
        shutil.copytree(place, here)
        kill_at(commands, here, number, *args)
        grow_old(here)
        done = commands(*args, cwd=here)
        assert done.code == 0, (number, done.err)
        rows = [(h / "o.csv").read_text().replace(str(h), "") for h in (here, whole)]
        assert rows[0] == rows[1]
        assert not left(here), number
        assert not list(here.glob("*.partial"))


@pytest.mark.slow
def test_the_metrics_of_done_steps_survive_a_kill(commands: Commands, place: Path) -> None:
    # Between the line of a step and its checkpoint.
    hook = (
        "tests.crash.hooks:signal_at",
        signal.SIGKILL,
        "alignprop_cli.training.checkpoint:save",
        2,
    )
    done = commands(*TO_RUN, cwd=place, before=[hook])
    assert done.code == 128 + signal.SIGKILL
    assert [line["step"] for line in metrics(place / "run")] == [1, 2]
    done = commands(*TO_RUN, cwd=place)
    assert done.code == 0, done.err
    same_end(place / "run", commands.run)
