"""Damage that a disk does to a checkpoint is noticed, and the one before it is taken and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.commands import Commands, same_end

ADAPTER = "checkpoints/step-000002/pytorch_lora_weights.safetensors"
OPTIMIZER = "checkpoints/step-000002/optimizer.safetensors"
STATE = "checkpoints/step-000002/state.json"
METRICS = "metrics.jsonl"


def flip(at: float) -> Callable[[bytes], bytes]:
    """Return a function that flips one bit at a share of the file."""

    def change(data: bytes) -> bytes:
        place = min(len(data) - 1, int(at * len(data)))
        return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]

    return change


def zero_end(data: bytes) -> bytes:
    return data[: len(data) * 3 // 4] + bytes(len(data) - len(data) * 3 // 4)


def cut(data: bytes) -> bytes:
    return data[: len(data) * 3 // 4]


def zero(data: bytes) -> bytes:
    return bytes(len(data))


def empty(data: bytes) -> bytes:
    return b""


QUICK = [(OPTIMIZER, zero_end), (METRICS, empty)]
SLOW = [
    (ADAPTER, flip(0.99)),
    (OPTIMIZER, flip(0.9)),
    (STATE, empty),
    *((file, flip(at)) for file in (ADAPTER, OPTIMIZER) for at in (0.0, 0.02, 0.3, 0.5, 0.7, 1.0)),
    (ADAPTER, zero_end),
    (ADAPTER, cut),
    (ADAPTER, empty),
    (ADAPTER, zero),
    (OPTIMIZER, cut),
    (OPTIMIZER, empty),
    (OPTIMIZER, zero),
    (STATE, cut),
    (STATE, zero),
    (STATE, flip(0.5)),
]


@pytest.fixture(scope="session")
def two_steps(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three steps that ended after two."""
    place = tmp_path_factory.mktemp("two")
    shutil.copytree(commands.started, place / "run")
    done = commands("train", "--resume=run", "--steps=2", cwd=place)
    assert done.code == 0, done.err
    return place / "run"


@pytest.mark.parametrize(
    ("file", "change"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_rot_is_noticed_and_the_checkpoint_before_is_taken(
    commands: Commands, two_steps: Path, place: Path, file: str, change: Callable[[bytes], bytes]
) -> None:
    shutil.copytree(two_steps, place / "run")
    rotten = place / "run" / file
    rotten.write_bytes(change(rotten.read_bytes()))
    done = commands("train", "--resume=run", "--steps=3", cwd=place)
    if file == METRICS:
        # Metrics of done steps cannot be made again: said, whether the run goes on or not.
        assert "metrics.jsonl" in done.err, done.err
        assert done.code in (0, 4)
        return
    assert done.code == 0, done.err
    assert "step-000002" in done.err
    assert "step-000001" in done.err
    same_end(place / "run", commands.run)


@pytest.mark.slow
@pytest.mark.parametrize("change", [cut, zero, None], ids=["cut", "zero", "removed"])
def test_rot_of_the_metrics_is_said(
    commands: Commands, two_steps: Path, place: Path, change: Callable[[bytes], bytes] | None
) -> None:
    shutil.copytree(two_steps, place / "run")
    file = place / "run" / METRICS
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    done = commands("train", "--resume=run", "--steps=3", cwd=place)
    assert done.code in (0, 4), done.err
    assert "metrics.jsonl" in done.err
    assert "bug" not in done.err


def test_a_rotten_checkpoint_is_not_evaluated_in_silence(
    commands: Commands, two_steps: Path, place: Path
) -> None:
    shutil.copytree(two_steps, place / "run")
    file = place / "run" / ADAPTER
    file.write_bytes(flip(0.99)(file.read_bytes()))
    done = commands("evaluate", "run", "--images=1", "--batch-size=1", cwd=place)
    assert done.code == 3
    assert "step-000002" in done.err
    assert "damaged" in done.err
