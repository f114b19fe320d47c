"""Killed at any moment, a command leaves the old or the new whole; a run goes on identically."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.crash.commands import (
    COMMANDS,
    STEPS,
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
PARTS = 6
Wanted = Callable[[list[int]], Sequence[int]]
"""Chooses among the numbers of the changes."""

in_parts = pytest.mark.parametrize("part", range(PARTS))


def changes(commands: Commands, place: Path, *args: str) -> list[str]:
    """Run a command undisturbed, and return every change that it makes to files."""
    log = place.parent / "changes"
    done = commands(*args, cwd=place, before=[(DIE, 0, str(place), str(log))])
    assert done.code == 0, done.err
    return log.read_text().splitlines()


def points(done: list[str]) -> list[int]:
    """Return the changes to die before, as numbers: all but those right behind a sync.

    A sync changes nothing that a kill would leave: to die behind it is to die before it.
    """
    return [n for n in range(1, len(done) + 1) if n == 1 or " fsync " not in done[n - 2]]


def shard(numbers: list[int], part: int, parts: int = PARTS) -> list[int]:
    """Return every so many of them, so that a test of all can be run by several processes."""
    return numbers[part::parts]


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


def train_killed(commands: Commands, place: Path, keep: int | None, wanted: Wanted) -> None:
    """Kill a run at some of its changes to files, and resume it each time."""
    kept = () if keep is None else (f"--set=output.keep_last={keep}",)
    (place / "whole").mkdir()
    done = changes(commands, place / "whole", *TO_RUN, *kept)
    everything_happens(done, keep)
    undisturbed = place / "whole" / "run"
    for number in wanted(points(done)):
        here = place / str(number)
        here.mkdir()
        kill_at(commands, here, number, *TO_RUN, *kept)
        whole_checkpoints(here / "run")
        grow_old(here)
        finish(commands, here, *TO_RUN, *kept)
        same_end(here / "run", undisturbed, keep)
        shutil.rmtree(here)


def everything_happens(done: list[str], keep: int | None) -> None:
    """Assert that a run of which these are the changes does all that a run can do to files."""
    counts = {
        # Begun anew, and gone on with in every step.
        r"os\.rename .*\.config\.yaml\S* ": 1,
        r"os\.rename .*\.metrics\.jsonl\S* ": 1,
        r"open \S*/metrics\.jsonl": STEPS,
        r"open \S*/samples/step-\d+\.png": STEPS + 1,
        r"os\.rename .*/samples/\.step-\d+\.json\S* ": STEPS + 1,
        r"exchange \S*/checkpoints/\.step-\d+": STEPS,
        # Where there is one already both change places, and then the old one is removed.
        r"exchange \S*/checkpoints/\.best": 2 * STEPS - 1,
        r"os\.rmdir \S*/checkpoints/\.best": STEPS - 1,
        r"os\.rename \S*/checkpoints/step-\d+ \S*/\.step-": STEPS - (keep or STEPS),
        # The beginning, every step, the end, and with what is drawn at the end.
        r"os\.rename .*\.report\.html\S* ": STEPS + 3,
        r"open \S*/curves\.png": 1,
        r"open \S*/before_after\.png": 1,
        r"os\.rename .*\.README\.md\S* ": 1,
        r"os\.rename .*\.summary\.json\S* ": 1,
        r"os\.remove \S*/\.lock": 1,
    }
    for pattern, count in counts.items():
        assert sum(re.search(f" {pattern}", line) is not None for line in done) == count, pattern


@pytest.mark.long
def test_a_run_killed_while_it_writes_goes_on_identically(commands: Commands, place: Path) -> None:
    train_killed(commands, place, None, lambda numbers: [numbers[0], numbers[-1]])


@pytest.mark.slow
@in_parts
@pytest.mark.parametrize("keep", [None, 1, 2])
def test_a_run_killed_at_every_change_goes_on_identically(
    commands: Commands, place: Path, keep: int | None, part: int
) -> None:
    train_killed(commands, place, keep, lambda numbers: shard(numbers, part))


@pytest.mark.slow
@in_parts
def test_a_resumed_run_killed_at_every_change_goes_on_identically(
    commands: Commands, place: Path, part: int
) -> None:
    again = ("train", "--resume=run", "--steps=3")
    (place / "whole").mkdir()
    shutil.copytree(commands.started, place / "whole" / "run")
    for number in shard(points(changes(commands, place / "whole", *again)), part):
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
    done = commands(*TO_RUN, cwd=place)
    assert done.code == 0, done.err
    longest = time.monotonic() - started
    undisturbed = place / "run"
    kills, here = 0, place / "killed"
    here.mkdir()
    while kills < times:
        is_first = not (here / "run").exists()
        running = commands.warm.start(TO_RUN, here)
        started = time.monotonic()
        moment = started + rng.uniform(0.0, 1.05 * longest)
        while time.monotonic() < moment and not running.ended():
            time.sleep(0.01)
        if not running.ended():
            os.kill(running.pid, signal.SIGKILL)
        done = running.wait()
        assert done.code in (0, 128 + signal.SIGKILL), done.err
        kills += done.code != 0
        if is_first and done.code == 0:  # the longest was measured while others were busy
            longest = min(longest, time.monotonic() - started)
        whole_checkpoints(here / "run")
        # Some are killed several times before they are done.
        if done.code == 0 or rng.random() < 0.5:
            done = commands(*TO_RUN, cwd=here)
            assert done.code == 0, done.err
            same_end(here / "run", undisturbed)
            shutil.rmtree(here)
            here.mkdir()


@pytest.mark.long
def test_a_run_killed_at_random_moments_goes_on_identically(
    commands: Commands, place: Path
) -> None:
    killed_at_random(commands, place, 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_run_killed_at_200_random_moments_goes_on_identically(
    commands: Commands, place: Path, seed: int
) -> None:
    killed_at_random(commands, place, 20, seed)


def replaced_killed(commands: Commands, place: Path, name: str, wanted: Wanted) -> None:
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
    numbers = points(changes(commands, new_place, *second))
    new = lasting(new_place / command.output)
    assert new != lasting(place / command.output)
    seen = set()
    for number in wanted(numbers):
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
    replaced_killed(commands, place, name, lambda numbers: spread(numbers, 4))


@pytest.mark.slow
@in_parts
@pytest.mark.parametrize("name", COMMANDS)
def test_a_replaced_result_is_the_old_or_the_new_one_at_every_change(
    commands: Commands, place: Path, name: str, part: int
) -> None:
    replaced_killed(commands, place, name, lambda numbers: shard(numbers, part))


def test_rows_killed_while_they_are_written_are_completed_to_the_same_bytes(
    commands: Commands, place: Path
) -> None:
    rows_killed(commands, place, lambda numbers: spread(numbers, 4))


@pytest.mark.slow
def test_rows_killed_at_every_change_are_completed_to_the_same_bytes(
    commands: Commands, place: Path
) -> None:
    rows_killed(commands, place, list)


def rows_killed(commands: Commands, place: Path, wanted: Wanted) -> None:
    """Kill a command that writes rows, and let another complete them."""
    commands.inputs(place)
    args = (*COMMANDS["score"].args, "--resume")
    whole = place.parent / "whole" / "place"
    shutil.copytree(place, whole)
    for number in wanted(points(changes(commands, whole, *args))):
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
    # Between the line of a step and its checkpoint: the third, since the first is also the best.
    hook = (
        "tests.crash.hooks:signal_at",
        signal.SIGKILL,
        "alignprop_cli.training.checkpoint:save",
        3,
    )
    done = commands(*TO_RUN, cwd=place, before=[hook])
    assert done.code == 128 + signal.SIGKILL
    assert [line["step"] for line in metrics(place / "run")] == [1, 2]
    done = commands(*TO_RUN, cwd=place)
    assert done.code == 0, done.err
    same_end(place / "run", commands.run)
