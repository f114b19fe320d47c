"""Measuring a device before training: what the measurement says, and what the plan makes of it.

The device is the CPU; what it needs is counted by a `meter.Meter`, which on a GPU torch does.
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
from alignprop_cli.planning import meter, probe
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import GIB, Budget, Correction, Footprint, estimate
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.training.trainer import Trainer
from alignprop_cli.training.trial import Trial
from tests.planning import test_plan
from tests.planning.test_footprint import config, plan_of, trainer

K = 2


def asked(**gradient: Any) -> Config:
    # Half as wide as the embedded model draws: what is measured here takes ratios, not sizes.
    return config(method="last_k", k=K, size=24, **gradient)


REQUEST = planning.plan_request(asked(), 1)


def ready(budget: Budget, footprint: Footprint) -> Trainer:
    return trainer(make_plan(REQUEST, footprint=footprint, budget=budget), asked())


def metered(
    made: Trainer, on_top: Callable[[int], float] = lambda size: 0.0, limit: float = math.inf
) -> probe.MeasurePeak:
    """Return a measure of the bytes that live, weights included, on a device of our making.

    Args:
        made: Whose weights are there.
        on_top: What it needs beside, by what is counted.
        limit: What it holds.
    """
    networks = [n for m in made.mixture.members for n in m.reward.networks]  # type: ignore[attr-defined]
    parts = (made.model.network.module, made.model.decoder.module, *networks)
    there = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def measure_peak(run: Callable[[], object]) -> int:
        with meter.Meter() as live:
            run()
        size = there + live.peak
        if size + on_top(size) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return int(size + on_top(size))

    return measure_peak


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return planning.measure(asked(), "cpu")


def predict(footprint: Footprint, plan: Plan) -> int:
    return estimate(footprint, REQUEST, plan, images=plan.share).peak


CONTEXT = Budget(0, "cuda", "").least(0)
"""What a GPU holds before anything is allocated."""


def card(size: int) -> Budget:
    """Return a GPU of which so much can be allocated."""
    return Budget(CONTEXT + size, "cuda", "a card")


def size_for(footprint: Footprint, micro_batch: int) -> int:
    """Return what just holds so many images with nothing recomputed, and 8 % are to be kept.

    Decoded one by one.
    """
    plain = plan_of(micro_batch, rollout_batch=8, decode_batch=1)
    return int(predict(footprint, plain) / 0.91)


def settled(
    made: Trainer, footprint: Footprint, budget: Budget, measure_peak: probe.MeasurePeak
) -> Plan:
    probe.settle(Trial(made), REQUEST, footprint, budget, measure_peak)
    # Whatever was tried, the plan is for the same batch and nothing was trained.
    assert made.plan.batch_size == 8
    assert all(parameter.grad is None for parameter in made.optimizer.parameters.values())
    assert made.step_number == 0
    return made.plan


class Imagined:
    """A trainer that runs nothing: what its device needs is a function of the estimate.

    Args:
        plan: To begin with.
        request: What that was made for.
        footprint: What estimates are made of.
        needed: From what is estimated to what is needed, in bytes.
        size: What the device holds, in bytes.
    """

    missing_bytes = 0

    def __init__(
        self,
        plan: Plan,
        request: PlanRequest,
        footprint: Footprint,
        needed: Callable[[float], float],
        size: float,
    ) -> None:
        self.plan, self.mixture = plan, self
        self.request, self.footprint = request, footprint
        self.needed, self.size = needed, size
        self.recomputes = False
        self.tried: list[Plan] = []

    def recompute(self) -> None:
        self.recomputes = True

    def apply_plan(self, plan: Plan) -> None:
        assert self.recomputes or not plan.checkpoint_reward
        self.plan = plan

    def run_micro_batch(self) -> None:
        self.tried.append(self.plan)

    def largest(self, value: int | None) -> int | None:
        return value

    def measure_peak(self, run: Callable[[], object]) -> int:
        run()
        found = estimate(self.footprint, self.request, self.plan, images=self.plan.share).peak
        if self.needed(found) > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return int(self.needed(found))

    def settle(self, budget: Budget) -> Plan:
        probe.settle(self, self.request, self.footprint, budget, self.measure_peak)
        return self.plan


def test_a_plan_made_for_12_gb_and_corrected_to_80_has_a_larger_micro_batch() -> None:
    request = test_plan.asked({"method": "random_k", "k_max": 4}, batch_size=16)
    found = test_plan.footprint()
    small, large = (Budget(size * GIB, "cuda", "a card") for size in (12, 80))
    plan = make_plan(request, footprint=found, budget=small)
    made = Imagined(plan, request, found, lambda size: 1.04 * size, 80 * GIB)
    assert plan.micro_batch <= 2
    corrected = made.settle(large)
    assert corrected.micro_batch == 8
    assert corrected.checkpoint_network == "none"
    assert corrected.estimate is not None
    assert corrected.estimate.correction.factor == pytest.approx(1.04)
    assert 12 * GIB < corrected.estimate.peak <= large.usable


def test_a_plan_is_tried_with_all_its_batches_and_with_half_of_them() -> None:
    request = test_plan.asked({"method": "last_k", "k": 1}, batch_size=16)
    found = test_plan.footprint()
    budget = Budget(40 * GIB, "cuda", "a card")
    plan = make_plan(request, footprint=found, budget=budget)
    made = Imagined(plan, request, found, lambda size: size, math.inf)
    assert made.settle(budget).batch_size == 16
    sizes = [(p.rollout_batch, p.micro_batch, p.decode_batch) for p in made.tried]
    assert sizes[0] == (plan.rollout_batch, plan.micro_batch, plan.decode_batch)
    assert sizes[1] == tuple(max(size // 2, 1) for size in sizes[0])


@given(
    gib=st.floats(8.0, 100.0),
    real=st.floats(8.0, 100.0),
    factor=st.floats(0.7, 1.6),
    fixed=st.floats(-0.5, 2.0),
    k=st.integers(1, 20),
)
def test_whatever_a_device_needs_it_gets_a_plan_that_it_holds(
    gib: float, real: float, factor: float, fixed: float, k: int
) -> None:
    request = test_plan.asked({"method": "last_k", "k": k}, batch_size=16)
    found = test_plan.footprint()
    budget = Budget(int(gib * GIB), "cuda", "a card")
    plan = make_plan(request, footprint=found, budget=budget)
    made = Imagined(plan, request, found, lambda size: factor * size + fixed * GIB, real * GIB)
    try:
        last = made.settle(budget)
    except torch.OutOfMemoryError:
        # Every plan that was tried is too large.
        assert min(made.needed(test_plan.estimated(request, p, 16).peak) for p in made.tried) > (
            real * GIB
        )
        return
    assert last.batch_size == 16
    assert made.needed(test_plan.estimated(request, last, 16).peak) <= real * GIB
    assert last.estimate is not None
    assert last.estimate.peak == pytest.approx(
        made.needed(test_plan.estimated(request, last, 16).peak), rel=1e-6
    )


def test_a_device_as_estimated_keeps_the_plan(footprint: Footprint) -> None:
    budget = card(size_for(footprint, 4))
    made = ready(budget, footprint)
    first = made.plan
    assert (first.micro_batch, first.checkpoint_network) == (4, "none")
    plan = settled(made, footprint, budget, metered(made))
    assert plan.estimate is not None
    assert plan.estimate.correction.factor == pytest.approx(1.0, abs=0.1)
    assert replace(plan, estimate=first.estimate) == first


@pytest.mark.long
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_a_device_that_needs_more_gets_a_plan_that_it_holds(
    footprint: Footprint, micro_batch: int
) -> None:
    size = size_for(footprint, micro_batch)
    budget = card(size)
    made = ready(budget, footprint)
    first = made.plan
    measure_peak = metered(made, lambda size: size / 4.0, limit=size)
    plan = settled(made, footprint, budget, measure_peak)
    assert predict(footprint, plan) < predict(footprint, first)
    assert plan.estimate is not None
    # It really runs there, and the corrected estimate is what it needs.
    needed = measure_peak(Trial(made).run_micro_batch)
    assert plan.estimate.peak == pytest.approx(needed, rel=0.08)


def test_a_device_that_needs_less_gets_a_cheaper_plan(footprint: Footprint) -> None:
    size = size_for(footprint, 4)
    budget = card(size)
    made = ready(budget, footprint)
    assert made.plan.micro_batch == 4
    measure_peak = metered(made, lambda size: -size / 2.0, limit=size)
    assert settled(made, footprint, budget, measure_peak).micro_batch == 8


def test_a_plan_that_was_measured_to_fit_is_not_refused_for_the_reserve(
    footprint: Footprint,
) -> None:
    """Only one plan is allowed; it needs 96 % of the card, of which 8 % are to be kept."""
    only = replace(
        REQUEST,
        micro_batch=8,
        decode_batch=8,
        checkpoint_network="none",
        checkpoint_decoder=False,
        checkpoint_reward=False,
    )
    plan = make_plan(only, footprint=footprint)
    made = trainer(plan, asked())
    measure_peak = metered(made, lambda size: size / 4.0)
    needed = measure_peak(Trial(made).run_micro_batch)
    budget = card(int(needed / 0.96))
    probe.settle(Trial(made), only, footprint, budget, measure_peak)
    assert made.plan.estimate is not None
    assert replace(made.plan, estimate=plan.estimate) == plan
    # What is said of it is what was measured.
    assert made.plan.estimate.peak == pytest.approx(needed, rel=0.02)


@pytest.mark.parametrize("factor", [1.3, 1.5, 2.5])
def test_a_device_that_needs_far_more_than_estimated_gets_a_plan_too(
    footprint: Footprint, factor: float
) -> None:
    """Thirty calls can be stored or not: plans that differ by one call do not help here."""
    request = replace(planning.plan_request(config(steps=30, method="full"), 1), micro_batch=1)
    plain = make_plan(request, footprint=footprint)
    assert plain.estimate is not None
    size = plain.estimate.peak
    budget = card(size)
    plan = make_plan(request, footprint=footprint, budget=budget)
    assert plan.stored_calls > 20
    made = Imagined(plan, request, footprint, lambda size: factor * size, size)
    found = made.settle(budget).estimate
    assert found is not None
    assert found.peak <= size
    assert found.peak == pytest.approx(made.measure_peak(lambda: None), rel=0.01)
    # Nor is it needlessly small: 92 % may be used.
    assert found.peak > 0.85 * size


@pytest.mark.long
def test_a_device_that_holds_not_even_the_smallest_plan_says_so(footprint: Footprint) -> None:
    budget = card(size_for(footprint, 4))
    made = ready(budget, footprint)
    with pytest.raises(torch.OutOfMemoryError, match="the smallest plan is too large"):
        settled(made, footprint, budget, metered(made, limit=1.0))


@pytest.mark.long
def test_a_settled_plan_computes_the_same_step(footprint: Footprint) -> None:
    size = size_for(footprint, 4)
    budget = card(size)
    changed, plain = ready(budget, footprint), ready(budget, footprint)
    measure_peak = metered(changed, lambda size: size / 4.0, limit=size)
    assert settled(changed, footprint, budget, measure_peak) != plain.plan
    for made in (changed, plain):
        made.optimizer.step = lambda number: 0.0  # type: ignore[method-assign]
        made.step()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in made.optimizer.parameters.values()])  # type: ignore[union-attr]
        for made in (changed, plain)
    )
    assert float(theirs.norm()) > 1e-4
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_what_a_step_needs_beside_a_micro_batch_is_added(footprint: Footprint) -> None:
    made = trainer(plan_of(8), asked())
    trial = Trial(made)

    def measured() -> float:
        return probe._measure(trial, REQUEST, footprint, lambda run: 1000)[0][1]

    numbers = sum(parameter.numel() for parameter in made.optimizer.parameters.values())
    assert measured() == 1000 + 8 * numbers  # AdamW's moments, which come with the first update
    made.step()
    assert measured() == 1000
    # With a second micro-batch the gradients of the first are there too.
    made.apply_plan(plan_of(4))
    assert measured() == 1000 + 4 * numbers


def test_a_call_is_timed_where_the_chain_of_a_step_is_shortened() -> None:
    made = trainer(plan_of(2), config(method="last_k", k=K, steps=K + 2))
    made.settings = replace(made.settings, rollout_steps=1)
    assert len(made.images()[0].schedule) < len(made.schedule)
    assert Trial(made).part_seconds(2, ("call",))["call"] > 0.0


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


def test_a_trial_changes_nothing_that_training_computes() -> None:
    first, second = (trainer(plan_of(4), asked()) for _ in range(2))
    Trial(first).run_micro_batch()
    for made in (first, second):
        made.step()
    ours, theirs = (made.optimizer.parameters.values() for made in (first, second))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
