"""Try the plan on the device before training, and correct the estimate by what it really needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from alignprop_cli.errors import RunError
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import UNCORRECTED, Budget, Correction, Footprint, estimate
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.speed import PARTS, Pace, Times, step_seconds

MeasurePeak = Callable[[Callable[[], object]], int]
"""Runs something and returns the peak of the bytes in use on the device meanwhile."""

# Each try takes seconds. The correction mostly settles after two; the others are for devices on
# which memory runs out.
_PLANS_TRIED = 6
# Images that fill a GPU, in every part of a step.
_FILLS = 8
# Running out of memory does not say how much was lacking. The next plan has at most this share of
# the estimate, or if there is none, any smaller estimate.
_SMALLER = 0.8


class Rewards(Protocol):
    """What the probe needs of a mixture of rewards."""

    def recompute(self) -> None:
        """Switch on activation checkpointing of the rewards' networks, for good."""
        ...


class Trial(Protocol):
    """What the probe needs of a trainer."""

    @property
    def plan(self) -> Plan:
        """Return the present plan."""
        ...

    @property
    def mixture(self) -> Rewards:
        """Return the rewards."""
        ...

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that a step needs on top of `run_micro_batch`."""
        ...

    def apply_plan(self, plan: Plan) -> None:
        """Work by another plan from now on."""
        ...

    def run_micro_batch(self) -> object:
        """Run one roll-out batch and one micro-batch with the longest possible path."""
        ...

    def part_seconds(self, images: int, names: Sequence[str] = PARTS) -> dict[str, float]:
        """Return the seconds of parts of a step for a batch, by the fields of `Times`."""
        ...

    def largest(self, value: int | None) -> int | None:
        """Return the largest value over all processes; None if any of them has None."""
        ...


def cuda_peak(run: Callable[[], object]) -> int:
    """Return the peak of the bytes that torch allocated on the current GPU while something ran."""
    # Emptied, so that memory cached for other sizes does not make this run out.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure_times(trial: Trial, share: int) -> Times:
    """Return the pace of the parts of a step on this device.

    Each part is timed with one image, which is what launching its kernels takes, and with a batch
    large enough to fill a GPU, or the largest that the memory holds. With several processes the
    slowest counts, so that all plan by the same times.

    Args:
        trial: A trainer before its first step, with nothing recomputed of its network.
        share: Images of one step in one process; a batch has no more.
    """
    one, many, images = trial.part_seconds(1), None, min(_FILLS, share)
    while images > 1 and many is None:
        try:
            many = trial.part_seconds(images)
        except torch.OutOfMemoryError:
            many = None
        # All processes go on with the same batch.
        if trial.largest(None if many is None else 1) is None:
            many, images = None, images // 2

    def pace(name: str) -> Pace:
        launch = _slowest(trial, one[name])
        return Pace(launch, launch if many is None else _slowest(trial, many[name]) / images)

    return Times(**{name: pace(name) for name in PARTS}, source="measured")


def _slowest(trial: Trial, seconds: float) -> float:
    # Whole microseconds, since processes compare integers.
    return (trial.largest(round(1e6 * seconds)) or 0) / 1e6


def settle(
    trial: Trial,
    request: PlanRequest,
    footprint: Footprint,
    budget: Budget,
    measure_peak: MeasurePeak = cuda_peak,
    times: Times | None = None,
) -> None:
    """Apply the fastest plan that was measured to fit the device.

    The plan is run with the longest possible path, and once more with batches of half the size.
    What both need corrects the estimate. If the corrected estimate chooses another plan, that one
    is tried next; a plan that runs out of memory is replaced by a smaller one. With several
    processes the largest need counts, so that all settle on the same plan.

    Args:
        trial: A trainer before its first step, with a plan that was chosen by estimates.
        request: What that plan was made for.
        footprint: What it was chosen by.
        budget: The memory of one process.
        measure_peak: Measures the device.
        times: Its pace, by which plans are compared; None compares their operations.

    Raises:
        torch.OutOfMemoryError: If not even the smallest plan fits.
    """
    held: Plan | None = None
    plan: Plan | None = trial.plan
    correction, below = UNCORRECTED, math.inf
    for _ in range(_PLANS_TRIED):
        if plan is None or plan == held:
            break
        # 1. Try it. Checkpointing of the rewards cannot be switched off again: from then on every
        #    plan has it, and so does the request.
        if plan.checkpoint_reward and not trial.plan.checkpoint_reward:
            trial.mixture.recompute()
        trial.apply_plan(plan)
        if plan.checkpoint_reward:
            request = replace(request, checkpoint_reward=True)
        points = _measure(trial, request, footprint, measure_peak)

        # 2. Learn from it: the correction of the estimates, or the estimate at which memory ends.
        if points:
            correction = Correction.through(points)
            expected = estimate(footprint, request, plan, images=plan.share, correction=correction)
            seconds = _seconds(plan, request, footprint, times)
            held = replace(plan, estimate=expected, seconds=seconds)
        else:
            below = _estimated(plan, request, footprint)
        # 3. Choose again. If by the corrected estimate no plan fits, the last one that was measured
        #    to fit is kept: it did run.
        limits = [below] if held is not None else [_SMALLER * below, below]
        chosen_by = {"footprint": footprint, "budget": budget, "times": times}
        plan = _next(limits, request, correction=correction, **chosen_by)
    if held is None:
        raise torch.OutOfMemoryError("the smallest plan is too large for this device")
    trial.apply_plan(held)


def _next(limits: Sequence[float], request: PlanRequest, **chosen_by: Any) -> Plan | None:
    # By the first limit of the estimate under which there is a plan.
    for limit in limits:
        with suppress(RunError):
            return make_plan(request, below=limit, **chosen_by)
    return None


def _measure(
    trial: Trial, request: PlanRequest, footprint: Footprint, measure_peak: MeasurePeak
) -> list[tuple[float, float]]:
    """Return (estimated, measured) bytes for the present plan and for half of it.

    Empty if memory ran out with the plan itself. Afterwards the plan is the present one again.
    """
    # Two sizes separate what is needed once from what grows with the batches.
    points: list[tuple[float, float]] = []
    plan, missing = trial.plan, trial.missing_bytes
    for tried in [plan, plan.halved()] if plan.micro_batch > 1 else [plan]:
        trial.apply_plan(tried)
        try:
            size = measure_peak(trial.run_micro_batch) + missing
        except torch.OutOfMemoryError:
            size = None
        # All processes come here, also those that ran out of memory: none waits for another.
        found = trial.largest(size)
        if found is None:
            break
        points.append((_estimated(tried, request, footprint), found))
    trial.apply_plan(plan)
    return points


def _seconds(
    plan: Plan, request: PlanRequest, footprint: Footprint, times: Times | None
) -> float | None:
    return None if times is None else step_seconds(times, footprint, request, plan, plan.share)


def _estimated(plan: Plan, request: PlanRequest, footprint: Footprint) -> float:
    """Return the estimated peak of a plan in bytes, without any correction."""
    return estimate(footprint, request, plan, images=plan.share).peak
