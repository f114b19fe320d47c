"""Measuring a device before training: what the measurement says, and what the plan makes of it.

The device is the CPU; what it needs is counted by a `memory.Meter`, which on a GPU torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprop_cli import memory, probe
from alignprop_cli.commands import planning
from alignprop_cli.estimate import UNCORRECTED, Budget, Correction, Footprint, estimate
from alignprop_cli.plan import Plan
from alignprop_cli.trainer import Trainer
from tests.test_footprint import config, trainer

MICRO_BATCH = 4


def ready() -> Trainer:
    asked = config(method="last_k", k=3)
    return trainer(Plan(MICRO_BATCH, 2, 1, 8, "none", False, False), asked)


def metered(made: Trainer, extra: Callable[[int], float] = lambda size: 0.0) -> probe.PeakOf:
    """Return a measure of the bytes that live, weights included, as if `extra` came on top."""
    model: Any = made.model
    there = sum(
        p.numel() * p.element_size()
        for part in (model.network, model.pipeline.vae, model.pipeline.text_encoder)
        for p in part.parameters()
    )
    there += sum(
        p.numel() * p.element_size()
        for m in made.mixture.members
        for network in m.reward.networks  # type: ignore[attr-defined]
        for p in network.parameters()
    )

    def peak_of(run: Callable[[], object]) -> int:
        with memory.Meter() as meter:
            run()
        size = there + meter.peak
        return int(size + extra(size))

    return peak_of


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return planning.measure(config(method="last_k", k=3), "cpu")


def predict(footprint: Footprint, images: int, correction: Correction = UNCORRECTED) -> int:
    return estimate(
        footprint,
        config(method="last_k", k=3),
        micro_batch=images,
        accumulation=1,
        network="none",
        decoder=False,
        reward=False,
        correction=correction,
    ).peak


def test_a_device_as_estimated_needs_no_correction(footprint: Footprint) -> None:
    made = ready()
    found = probe.measure(made, metered(made), lambda m: predict(footprint, m))
    assert found.factor == pytest.approx(1.0, abs=0.1)
    assert all(parameter.grad is None for parameter in made.parameters)
    assert (made.step_number, made.images_seen) == (0, 0)


def test_what_a_device_needs_on_top_is_found_and_holds_for_other_sizes(
    footprint: Footprint,
) -> None:
    made = ready()
    peak_of = metered(made, lambda size: 3e8 + 0.5 * size)
    found = probe.measure(made, peak_of, lambda m: predict(footprint, m))
    for images in (1, 3, 8):
        real = peak_of(lambda images=images: probe.rehearse(made, images))
        assert predict(footprint, images, found) == pytest.approx(real, rel=0.05)
        assert predict(footprint, images) < 0.7 * real


def test_the_plan_follows_the_measurement(footprint: Footprint) -> None:
    made = ready()
    budget = Budget(int(predict(footprint, 4) / 0.9), "cpu", "a machine")
    # As is it fits; with a third more it does not, and less is stored or drawn at once.
    as_estimated = planning.probe(made, footprint, budget, metered(made))
    assert as_estimated.micro_batch == MICRO_BATCH
    larger = planning.probe(made, footprint, budget, metered(made, lambda size: size / 3.0))
    assert larger.estimate is not None
    assert larger.estimate.peak <= budget.usable
    assert larger.estimate.correction.factor == pytest.approx(4.0 / 3.0, abs=0.15)
    work = [p.estimate.flops for p in (as_estimated, larger) if p.estimate is not None]
    assert larger.micro_batch < MICRO_BATCH or work[1] > work[0]


def test_sizes_that_do_not_fit_are_halved_until_they_do(footprint: Footprint) -> None:
    made = ready()
    tried: list[int] = []
    peak_of = metered(made)

    def scarce(run: Callable[[], object]) -> int:
        tried.append(MICRO_BATCH // 2 ** len(tried))
        if tried[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return peak_of(run)

    found = probe.measure(made, scarce, lambda m: predict(footprint, m))
    assert tried == [4, 2, 1]
    assert found.factor == 1.0


def test_a_device_that_holds_not_even_one_image_says_so(footprint: Footprint) -> None:
    def full(run: Callable[[], object]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="one image at once"):
        probe.measure(ready(), full, lambda m: predict(footprint, m))


@given(
    fixed=st.floats(-1e9, 1e10),
    factor=st.floats(0.1, 3.0),
    x=st.floats(1e8, 1e11),
    more=st.floats(1.01, 4.0),
)
def test_a_correction_goes_through_both_measurements(
    fixed: float, factor: float, x: float, more: float
) -> None:
    points = [(size, fixed + factor * size) for size in (x, more * x)]
    found = Correction.through(points)
    for estimated, measured in points:
        assert found(estimated) == pytest.approx(measured, rel=1e-6, abs=1e3)


def test_measurements_that_contradict_the_estimate_shift_it_by_the_worst() -> None:
    assert Correction.through([(100.0, 130.0), (200.0, 120.0)]) == Correction(30.0)
    assert Correction.through([(100.0, 90.0)]) == Correction(-10.0)


def test_rehearsing_changes_nothing_that_training_computes() -> None:
    first, second = ready(), ready()
    probe.rehearse(first, 2)
    for made in (first, second):
        made.step()
    for one, other in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
