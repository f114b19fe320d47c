"""Measuring a device before training: what the measurement says, and what the plan makes of it.

The device is the CPU; what it needs is counted by a `memory.Meter`, which on a GPU torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprop_cli.config.schema import Config
from alignprop_cli.planning import meter as memory
from alignprop_cli.planning import probe
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.estimate import Budget, Correction, Footprint, estimate
from alignprop_cli.planning.plan import Plan, make_plan
from alignprop_cli.training.trainer import Trainer
from tests.planning.test_footprint import config, trainer

K = 3


def asked(**gradient: Any) -> Config:
    return config(method="last_k", k=K, window_group=8, **gradient)


def ready(budget: Budget, footprint: Footprint, **gradient: Any) -> Trainer:
    chosen = asked(**gradient)
    plan = make_plan(chosen, processes=1, footprint=footprint, budget=budget)
    return trainer(plan, chosen)


def metered(
    made: Trainer, on_top: Callable[[int], float] = lambda size: 0.0, limit: float = math.inf
) -> probe.PeakOf:
    """Return a measure of the bytes that live, weights included, on a device of our making.

    Args:
        made: Whose weights are there.
        on_top: What it needs beside, by what is counted.
        limit: What it holds.
    """
    model: Any = made.model
    networks = [n for m in made.mixture.members for n in m.reward.networks]  # type: ignore[attr-defined]
    parts = (model.network, model.pipeline.vae, model.pipeline.text_encoder, *networks)
    there = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def peak_of(run: Callable[[], object]) -> int:
        with memory.Meter() as meter:
            run()
        size = there + meter.peak
        if size + on_top(size) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return int(size + on_top(size))

    return peak_of


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return planning.measure(asked(), "cpu")


def predict(footprint: Footprint, plan: Plan, micro_batch: int) -> int:
    return estimate(
        footprint,
        asked(),
        micro_batch=micro_batch,
        accumulation=1,
        network=plan.checkpoint_network,
        decoder=plan.checkpoint_decoder,
        reward=plan.checkpoint_reward,
        stored_calls=plan.stored_calls,
    ).peak


CONTEXT = Budget(0, "cuda", "").least(0)
"""What a GPU holds before anything is allocated."""


def card(size: int) -> Budget:
    """Return a GPU of which so much can be allocated."""
    return Budget(CONTEXT + size, "cuda", "a card")


def size_for(footprint: Footprint, micro_batch: int) -> int:
    """Return what just holds so many images with nothing computed again, and 8 % are to be kept."""
    plain = Plan(micro_batch, 8 // micro_batch, 1, 8, "none", False, False)
    return int(predict(footprint, plain, micro_batch) / 0.91)


def settled(made: Trainer, footprint: Footprint, budget: Budget, peak_of: probe.PeakOf) -> Plan:
    probe.settle(made, footprint, budget, peak_of)
    # Whatever was tried, the plan is for the same batch and nothing was trained.
    assert made.plan.batch_size == 8
    assert made.plan.window_group == 8
    assert all(parameter.grad is None for parameter in made.parameters)
    assert (made.step_number, made.images_seen) == (0, 0)
    return made.plan


def test_a_device_as_estimated_keeps_the_plan(footprint: Footprint) -> None:
    budget = card(size_for(footprint, 4))
    made = ready(budget, footprint)
    first = made.plan
    assert (first.micro_batch, first.checkpoint_network) == (4, "none")
    plan = settled(made, footprint, budget, metered(made))
    assert plan.estimate is not None
    assert plan.estimate.correction.factor == pytest.approx(1.0, abs=0.1)
    assert replace(plan, estimate=first.estimate) == first


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_a_device_that_needs_more_gets_a_plan_that_it_holds(
    footprint: Footprint, micro_batch: int
) -> None:
    size = size_for(footprint, micro_batch)
    budget = card(size)
    made = ready(budget, footprint)
    first = made.plan
    peak_of = metered(made, lambda size: size / 4.0, limit=size)
    plan = settled(made, footprint, budget, peak_of)
    assert predict(footprint, plan, plan.micro_batch) < predict(footprint, first, micro_batch)
    assert plan.estimate is not None
    # It really runs there, and the corrected estimate is what it needs.
    needed = peak_of(lambda: probe.rehearse(made, plan.micro_batch))
    assert plan.estimate.peak == pytest.approx(needed, rel=0.08)


def test_a_device_that_needs_less_gets_a_cheaper_plan(footprint: Footprint) -> None:
    size = size_for(footprint, 4)
    budget = card(size)
    made = ready(budget, footprint)
    assert made.plan.micro_batch == 4
    peak_of = metered(made, lambda size: -size / 2.0, limit=size)
    assert settled(made, footprint, budget, peak_of).micro_batch == 8


def test_a_plan_that_was_measured_to_fit_is_not_refused_for_the_reserve(
    footprint: Footprint,
) -> None:
    """Only one plan is allowed; it needs 96 % of the card, of which 8 % are to be kept."""
    only = {"checkpoint_network": "none", "checkpoint_decoder": False, "checkpoint_reward": False}
    chosen = asked(**only)
    train = chosen.train.model_copy(update={"micro_batch": 8})
    chosen = chosen.model_copy(update={"train": train})
    plan = make_plan(chosen, processes=1, footprint=footprint)
    made = trainer(plan, chosen)
    peak_of = metered(made, lambda size: size / 4.0)
    needed = peak_of(lambda: probe.rehearse(made, 8))
    budget = card(int(needed / 0.96))
    found = settled(made, footprint, budget, peak_of)
    assert found.estimate is not None
    assert replace(found, estimate=plan.estimate) == plan
    # What is said of it is what was measured.
    assert found.estimate.peak == pytest.approx(needed, rel=0.02)


@pytest.mark.parametrize("factor", [1.3, 1.5, 2.5])
def test_a_device_that_needs_far_more_than_estimated_gets_a_plan_too(
    footprint: Footprint, factor: float
) -> None:
    """Thirty calls can be stored or not: plans that differ by one call do not help here.

    Nothing runs: the device needs a multiple of what is estimated.
    """
    chosen = config(steps=30, method="full", window_group=8)
    train = chosen.train.model_copy(update={"micro_batch": 1})
    chosen = chosen.model_copy(update={"train": train})
    plain = make_plan(chosen, processes=1, footprint=footprint)
    assert plain.estimate is not None
    size = plain.estimate.peak
    budget = card(size)
    plan = make_plan(chosen, processes=1, footprint=footprint, budget=budget)
    assert plan.stored_calls > 20
    made = trainer(plan, chosen)

    def peak_of(run: Callable[[], object]) -> int:
        needed = factor * probe._estimated(made, footprint, 1)
        if needed > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return int(needed)

    probe.settle(made, footprint, budget, peak_of)
    found = made.plan.estimate
    assert found is not None
    assert found.peak <= size
    assert found.peak == pytest.approx(peak_of(lambda: None), rel=0.01)
    # Nor is it needlessly small: 92 % may be used.
    assert found.peak > 0.85 * size


def test_a_device_that_holds_not_even_the_smallest_plan_says_so(footprint: Footprint) -> None:
    budget = card(size_for(footprint, 4))
    made = ready(budget, footprint)
    with pytest.raises(torch.OutOfMemoryError, match="the smallest plan is too large"):
        probe.settle(made, footprint, budget, metered(made, limit=1.0))


def test_a_settled_plan_computes_the_same_step(footprint: Footprint) -> None:
    size = size_for(footprint, 4)
    budget = card(size)
    changed, plain = ready(budget, footprint), ready(budget, footprint)
    peak_of = metered(changed, lambda size: size / 4.0, limit=size)
    assert settled(changed, footprint, budget, peak_of) != plain.plan
    for made in (changed, plain):
        made.optimizer.step = lambda: None  # type: ignore[method-assign]
        made.step()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in made.parameters if p.grad is not None])
        for made in (changed, plain)
    )
    assert float(theirs.norm()) > 1e-4
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_the_optimisers_moments_are_counted_once() -> None:
    plan = Plan(8, 1, 1, 8, "none", False, False)
    made = trainer(plan, asked())
    before = probe._try(made, lambda run: 1000, 1)
    numbers = sum(parameter.numel() for parameter in made.parameters)
    assert before == 1000 + 8 * numbers
    made.step()
    assert probe._try(made, lambda run: 1000, 1) == 1000
    # With a second micro-batch the gradients of the first are there too.
    made.adopt(replace(plan, micro_batch=4, accumulation=2))
    assert probe._try(made, lambda run: 1000, 1) == 1000 + 4 * numbers


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
    plan = Plan(4, 2, 1, 8, "none", False, False)
    first, second = trainer(plan, asked()), trainer(plan, asked())
    probe.rehearse(first, 2)
    for made in (first, second):
        made.step()
    for one, other in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
