"""A signal ends every command with a message and nothing half-written; training saves first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.crash.commands import COMMANDS, STEPS, TO_RUN, Commands, left, metrics, same_end

AT = "tests.crash.hooks:signal_at"
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
PHASES = {
    # Loading the model, drawing the base model's images, the loop, its checkpoint, the end.
    "load": ("alignprop_cli.models.families:open_model", 1),
    "base": ("alignprop_cli.evaluation.draw:draw_samples", 1),
    "step": ("alignprop_cli.training.trainer:Trainer.step", 2),
    # The third: the second is of the first step too, which is the best.
    "save": ("alignprop_cli.training.checkpoint:save", 3),
    "tuned": ("alignprop_cli.training.run:finish", 1),
}
# In the default tests: each takes seconds.
QUICK = {("step", signal.SIGTERM)}
TRAINING = [
    pytest.param(phase, number, marks=() if (phase, number) in QUICK else pytest.mark.slow)
    for phase in PHASES
    for number in ENDS
]


@pytest.mark.parametrize(("phase", "number"), TRAINING)
def test_a_signal_ends_training_which_then_goes_on_identically(
    commands: Commands, place: Path, phase: str, number: signal.Signals
) -> None:
    name, nth = PHASES[phase]
    done = commands(*TO_RUN, cwd=place, before=[(AT, number, name, nth)])
    # After the last step nothing is left that could be stopped.
    assert done.code == ENDS[number], done.err
    assert number.name in done.err or str(int(number)) in done.err
    assert not left(place)
    if phase in ("step", "save"):
        assert "saved" in done.err
        assert "--resume" in done.err
        assert [line["step"] for line in metrics(place / "run")] == [1, 2]
        assert (place / "run" / "checkpoints" / "step-000002" / "state.json").is_file()
    done = commands(*TO_RUN, cwd=place)
    assert done.code == 0, done.err
    same_end(place / "run", commands.run)


@pytest.mark.slow
def test_two_signals_end_training_at_once(commands: Commands, place: Path) -> None:
    hook = (AT, signal.SIGTERM, "alignprop_cli.training.trainer:Trainer.step", 2, signal.SIGTERM)
    done = commands(*TO_RUN, cwd=place, before=[hook])
    assert done.code == 143, done.err
    assert done.err.count("\n") <= 8
    assert not left(place)
    done = commands(*TO_RUN, cwd=place)
    assert done.code == 0, done.err
    same_end(place / "run", commands.run)


@pytest.mark.slow
def test_the_signal_of_a_scheduler_saves_and_training_goes_on(
    commands: Commands, place: Path
) -> None:
    hook = (AT, signal.SIGUSR1, "alignprop_cli.training.trainer:Trainer.step", 2)
    done = commands(*TO_RUN, "--set=output.save_every=0", cwd=place, before=[hook])
    assert done.code == 0, done.err
    kept = sorted(p.name for p in (place / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-000002", f"step-{STEPS:06d}"]
    assert metrics(place / "run") == metrics(commands.run)


CASES = [
    pytest.param(
        name,
        phase,
        number,
        marks=() if number == signal.SIGTERM and name != "evaluate" else pytest.mark.slow,
    )
    for name in COMMANDS
    for phase in ("works", "writes")
    for number in ENDS
]


@pytest.mark.parametrize(("name", "phase", "number"), CASES)
def test_a_signal_ends_the_other_commands_with_nothing_half_written(
    commands: Commands, place: Path, name: str, phase: str, number: signal.Signals
) -> None:
    command = COMMANDS[name]
    commands.inputs(place)
    hook = (AT, number, getattr(command, phase))
    done = commands(*command.args, cwd=place, before=[hook])
    assert done.code == ENDS[number], done.err
    assert number.name in done.err
    assert not (place / command.output).exists()
    assert not left(place)
    # What was in the way is gone: the same command runs.
    again = () if name != "score" or not list(place.glob("*.partial")) else ("--resume",)
    done = commands(*command.args, *again, cwd=place)
    assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_a_signal_to_score_leaves_no_workers(
    commands: Commands, place: Path, number: signal.Signals
) -> None:
    (place / "many").mkdir()
    commands.inputs(place)
    for n in range(400):
        (place / "many" / f"{n}.png").hardlink_to(place / "pictures" / f"{n % 5}.png")
    args = ("score", "many", "--reward=brightness", "--output=o.csv", "--workers=2")
    running = commands.warm.start(args, place, leave=True)
    deadline = time.monotonic() + 60
    while len(_group(running.pid)) < 3 and not running.ended() and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [pid for pid in _group(running.pid) if pid != running.pid]
    os.kill(running.pid, number)
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in workers)
    assert running.wait().code in (0, ENDS[number])


def _group(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _is_alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[0] != "Z"
    except OSError:
        return False
