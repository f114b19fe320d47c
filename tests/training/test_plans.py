"""What a run decides once everything is loaded: the batch of its samples, what has no effect."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignprop_cli.evaluation import draw
from alignprop_cli.planning.estimate import Budget
from alignprop_cli.training import callbacks
from alignprop_cli.training.callbacks import Run
from alignprop_cli.training.plans import try_out
from alignprop_cli.training.trainer import Trainer
from tests.planning import test_plan
from tests.training.test_trainer import make_trainer, small_config

CONFIG = small_config(train={"cuda_graph": True})


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(CONFIG)


@pytest.mark.parametrize(("room", "expected"), [(100.0, 8), (3.5, 3), (0.5, 1)])
def test_samples_are_drawn_in_a_batch_that_fits(
    room: float, expected: int, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    parts = test_plan.footprint()
    console: Any = SimpleNamespace(note=said.append, warn=said.append)
    run = Run(CONFIG, None, trainer, trainer.accelerator, console, [], [])  # type: ignore[arg-type]
    held = sum(parts.weights.values()) + 16 * parts.trained
    # Of the test's footprint an image takes 850 MiB in the decoder.
    size = Budget(0, "cpu", "").least(int(held + room * 850 * test_plan.MIB))
    try_out(run, test_plan.asked(), parts, Budget(size, "cpu", ""))
    assert run.sample_batch == expected
    assert "train.cuda_graph has no effect" in said[0]
    assert len(said) == 1 + (expected < 8)
    if expected < 8:
        assert f"samples are drawn by {expected}: eval.batch_size 8 does not fit" in said[1]

    # And so they are.
    asked: list[object] = []
    monkeypatch.setattr(callbacks.draw, "draw_shared", lambda *_, **more: asked.append(more))
    run.sample([draw.Sample("a dog", 0)], console)
    assert asked == [{"batch_size": expected, "features": None}]


def test_a_run_that_is_resumed_for_its_end_alone_tries_no_step(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last step: then the prompts of no further step have been encoded."""
    parts = test_plan.footprint()
    monkeypatch.setattr(trainer, "step_number", CONFIG.train.steps)
    device, console = torch.device("cuda"), SimpleNamespace(note=str, warn=str)
    gpu: Any = SimpleNamespace(device=device)
    run = Run(CONFIG, None, trainer, gpu, console, [], [])  # type: ignore[arg-type]
    try_out(run, test_plan.asked(), parts, Budget(2**40, "cuda", ""))
    assert run.sample_batch == CONFIG.eval.batch_size
