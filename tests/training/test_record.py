"""What a step says of itself, over the images of its batches."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from alignprop_cli.estimators import window
from alignprop_cli.schedule import NoiseSchedule, Step, flow_schedule
from alignprop_cli.training.batches import StepImage
from alignprop_cli.training.record import StepRecord, Totals

# The last step is a tenth of the path, the last two are three tenths.
FLOW = flow_schedule([1.0, 0.6, 0.3, 0.1, 0.0], [1000.0, 600.0, 300.0, 100.0])


def record(*batches: tuple[int, StepImage]) -> StepRecord:
    """Return the record of a step of batches: a number of images, and one of them."""
    totals = Totals(["clip"])
    for count, image in batches:
        totals.add(torch.zeros(count), {"clip": torch.ones(count)}, image)
    return totals.record(Accelerator(cpu=True), 1, 4, 0.0, 1.0, 1.0, 1e-3)


def test_calls_and_the_share_of_the_path_are_means_over_images() -> None:
    last, last_two = (StepImage(0, "", window(start, 4), FLOW) for start in (3, 2))
    found = record((3, last), (1, last_two))
    assert found.backprop_steps == (3 * 1 + 1 * 2) / 4
    assert found.path_share == pytest.approx((3 * 0.1 + 1 * 0.3) / 4)
    assert found.line()["path_share"] == found.path_share


def test_fewer_steps_before_them_leave_their_share() -> None:
    # The first two calls in one: the window has smaller indices in the shorter chain.
    shorter = StepImage(0, "", window(2, 4).earlier(1), FLOW.shortened(2, 1))
    assert record((2, shorter)).path_share == pytest.approx(0.3)


def test_a_diffusion_model_has_no_share() -> None:
    levels = [(1.0, 0.0), (0.8, 0.6), (0.28, 0.96)]
    steps = [
        Step(float(t), *levels[t], *levels[t - 1]) for t in range(len(levels) - 1, 0, -1)
    ]  # fmt: skip
    schedule = NoiseSchedule(tuple(steps), "epsilon")
    found = record((1, StepImage(0, "", window(1, 2), schedule)))
    assert (found.backprop_steps, found.path_share) == (1.0, None)
    assert "path_share" not in found.line()
