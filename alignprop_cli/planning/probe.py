"""Whether a device needs what was estimated: micro-batches are tried on it before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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


class Trainer(Protocol):
    """What the probe needs of a trainer."""

    @property
    def plan(self) -> Plan:
        """Return the plan by which the next step runs."""
        ...

    @property
    def mixture(self) -> Rewards:
        """Return its rewards."""
        ...

    @property
    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return what is trained."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return what updates it."""
        ...

    def apply_plan(self, plan: Plan) -> None:
        """Run the coming steps by another plan for the same batch."""
        ...

    def run_micro_batch(self, calls: int | None = None, plan: Plan | None = None) -> None:
        """Run one roll-out batch and one micro-batch of the coming step, and forget them.

        Args:
            calls: That carry gradient; None is the most that can be drawn.
            plan: Whose batches are taken; None is the trainer's own.
        """
        ...

    def largest(self, value: int | None) -> int | None:
        """Return the largest value of all processes; None if it is None in any of them."""
        ...


def cuda_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated on the current GPU while something ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def settle(
    trainer: Trainer,
    request: PlanRequest,
    footprint: Footprint,
    budget: Budget,
    measure_peak: MeasurePeak = cuda_peak,
) -> None:
    """Give the trainer the cheapest plan that the device is measured to hold.

    The plan is tried with the longest path there can be, and so are batches of half its size. What
    they need corrects the estimate, which may choose another plan, which is tried in turn. One that
    runs out of memory is replaced by a smaller one. Of several processes the one that needs most
    counts, so that all of them settle on the same.

    Args:
        trainer: With a plan that was chosen by estimates, before its first step.
        request: What that plan was made for.
        footprint: What it was chosen by.
        budget: The memory of a process.
        measure_peak: Measures the device.

    Raises:
        torch.OutOfMemoryError: If not even the smallest plan fits.
    """
    held: Plan | None = None
    plan: Plan | None = trainer.plan
    correction, below = UNCORRECTED, math.inf
    for _ in range(_PLANS_TRIED):
        if plan is None or plan == held:
            break
        # 1. Try it.
        if plan.checkpoint_reward and not trainer.plan.checkpoint_reward:
            trainer.mixture.recompute()
        trainer.apply_plan(plan)
        if plan.checkpoint_reward:
            # Switched on for good.
            request = replace(request, checkpoint_reward=True)
        points = _measure(trainer, request, footprint, measure_peak)

        # 2. Learn from it: what such estimates are worth, or where memory ends.
        if points:
            correction = Correction.through(points)
            held = _corrected(plan, correction)
        else:
            below = _estimated(plan, request, footprint)

        # 3. Choose again by that.
        plan = None
        for limit in [below] if held is not None else [_SMALLER * below, below]:
            try:
                plan = make_plan(
                    request,
                    footprint=footprint,
                    budget=budget,
                    correction=correction,
                    below=limit,
                )
                break
            except RunError:
                # By the estimate there is none; what was measured to fit does, nevertheless.
                continue
    if held is None:
        raise torch.OutOfMemoryError("the smallest plan is too large for this device")
    trainer.apply_plan(held)


def _corrected(plan: Plan, correction: Correction) -> Plan:
    """Return the plan with what was measured in its estimate."""
    if plan.estimate is None:
        return plan
    return replace(plan, estimate=replace(plan.estimate, correction=correction))


def _measure(
    trainer: Trainer, request: PlanRequest, footprint: Footprint, measure_peak: MeasurePeak
) -> list[tuple[float, float]]:
    """Return what was estimated and what was needed, for the trainer's plan and half of it.

    Empty where memory ran out.
    """
    points: list[tuple[float, float]] = []
    plan = trainer.plan
    for tried in [plan, plan.halved()] if plan.micro_batch > 1 else [plan]:
        found = trainer.largest(_try(trainer, tried, measure_peak))
        if found is None:
            break
        points.append((_estimated(tried, request, footprint), found))
    return points


def _estimated(plan: Plan, request: PlanRequest, footprint: Footprint) -> float:
    """Return the peak that a plan is estimated to have."""
    return estimate(footprint, request, plan, images=plan.share).peak


def _try(trainer: Trainer, plan: Plan, measure_peak: MeasurePeak) -> int | None:
    """Return the peak of a step by a plan, or None where memory ran out."""
    try:
        found = measure_peak(lambda: trainer.run_micro_batch(plan=plan))
    except torch.OutOfMemoryError:
        return None
    # AdamW's two moments come with the first update, gradients with the first micro-batch.
    missing = (not trainer.optimizer.state) * 8 + (plan.accumulation > 1) * 4
    return found + missing * sum(parameter.numel() for parameter in trainer.parameters)
