"""Whether a device needs what was estimated: micro-batches are tried on it before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import torch

from alignprop_cli.errors import RunError
from alignprop_cli.planning.estimate import UNCORRECTED, Budget, Correction, Footprint, estimate
from alignprop_cli.planning.plan import Plan, PlanRequest, make_plan

MeasurePeak = Callable[[Callable[[], object]], int]
"""Runs something and returns the most bytes that were in use on the device meanwhile."""

_PLANS_TRIED = 6
# Where memory ran out it is not known by how much: the next plan is this much smaller.
_SMALLER = 0.8


class Rewards(Protocol):
    """What the probe needs of a mixture of rewards."""

    def recompute(self) -> None:
        """Recompute the blocks of the rewards' networks from now on."""
        ...


class Trial(Protocol):
    """What the probe needs of a trainer."""

    @property
    def plan(self) -> Plan:
        """Return the plan in force."""
        ...

    @property
    def mixture(self) -> Rewards:
        """Return the rewards."""
        ...

    @property
    def missing_bytes(self) -> int:
        """Return what a step needs beside what `run_micro_batch` does."""
        ...

    def apply_plan(self, plan: Plan) -> None:
        """Divide the same batch in another way from now on."""
        ...

    def run_micro_batch(self) -> object:
        """Run a roll-out batch and a micro-batch with the longest path there can be."""
        ...

    def largest(self, value: int | None) -> int | None:
        """Return the largest value of all processes; None if one has none."""
        ...


def cuda_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated on the current GPU while something ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def settle(
    trial: Trial,
    request: PlanRequest,
    footprint: Footprint,
    budget: Budget,
    measure_peak: MeasurePeak = cuda_peak,
) -> None:
    """Apply the cheapest plan that the device is measured to hold.

    The plan is tried with the longest path there can be, and so are batches of half its size. What
    they need corrects the estimate, which may choose another plan, which is tried in turn. One that
    runs out of memory is replaced by a smaller one. Of several processes the one that needs most
    counts, so that all of them settle on the same.

    Args:
        trial: Of a trainer before its first step, with a plan that was chosen by estimates.
        request: What that plan was made for.
        footprint: What it was chosen by.
        budget: The memory of a process.
        measure_peak: Measures the device.

    Raises:
        torch.OutOfMemoryError: If not even the smallest plan fits.
    """
    held: Plan | None = None
    plan: Plan | None = trial.plan
    correction, below = UNCORRECTED, math.inf
    for _ in range(_PLANS_TRIED):
        if plan is None or plan == held:
            break
        # 1. Try it.
        if plan.checkpoint_reward and not trial.plan.checkpoint_reward:
            trial.mixture.recompute()
        trial.apply_plan(plan)
        if plan.checkpoint_reward:
            # Switched on for good.
            request = replace(request, checkpoint_reward=True)
        points = _measure(trial, request, footprint, measure_peak)

        # 2. Learn from it: what such estimates are worth, or where memory ends. Then choose again.
        if points:
            correction = Correction.through(points)
            expected = estimate(footprint, request, plan, images=plan.share, correction=correction)
            held = replace(plan, estimate=expected)
        else:
            below = _estimated(plan, request, footprint)
        plan = None
        for limit in [below] if held is not None else [_SMALLER * below, below]:
            # There may be none by the estimate; what was measured to fit does, nevertheless.
            with suppress(RunError):
                plan = make_plan(
                    request, footprint=footprint, budget=budget, correction=correction, below=limit
                )
                break
    if held is None:
        raise torch.OutOfMemoryError("the smallest plan is too large for this device")
    trial.apply_plan(held)


def _measure(
    trial: Trial, request: PlanRequest, footprint: Footprint, measure_peak: MeasurePeak
) -> list[tuple[float, float]]:
    """Return what was estimated and what was needed, for the plan in force and half of it.

    Empty where memory ran out. Leaves the plan in force.
    """
    # Two sizes tell what is needed once from what grows with the batches.
    points: list[tuple[float, float]] = []
    plan, missing = trial.plan, trial.missing_bytes
    for tried in [plan, plan.halved()] if plan.micro_batch > 1 else [plan]:
        trial.apply_plan(tried)
        try:
            own = measure_peak(trial.run_micro_batch) + missing
        except torch.OutOfMemoryError:
            own = None
        found = trial.largest(own)
        if found is None:
            break
        points.append((_estimated(tried, request, footprint), found))
    trial.apply_plan(plan)
    return points


def _estimated(plan: Plan, request: PlanRequest, footprint: Footprint) -> float:
    """Return the peak that a plan is estimated to have."""
    return estimate(footprint, request, plan, images=plan.share).peak
