"""Whether a device needs what was estimated: micro-batches are tried on it before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from alignprop_cli.errors import RunError
from alignprop_cli.estimators import GradWindow
from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.estimate import (
    UNCORRECTED,
    Budget,
    Correction,
    Footprint,
    estimate,
    longest_window,
)
from alignprop_cli.planning.plan import Plan, make_plan

Trainer = Any

PeakOf = Callable[[Callable[[], object]], int]
"""Runs something and returns the most bytes that were in use on the device meanwhile."""

_PLANS_TRIED = 6
# Where memory ran out it is not known by how much: the next plan is this much smaller.
_SMALLER = 0.8


def cuda_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated on the current GPU while something ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def settle(
    trainer: Trainer, footprint: Footprint, budget: Budget, peak_of: PeakOf = cuda_peak
) -> None:
    """Let the trainer go on with the cheapest plan that the device is measured to hold.

    The plan is tried with the longest window there can be, and so is half of its micro-batch. What
    they need corrects the estimate, which may choose another plan, which is tried in turn. One that
    runs out of memory is replaced by a smaller one. Of several processes the one that needs most
    counts, so that all of them settle on the same.

    Args:
        trainer: With a plan that was chosen by estimates, before its first step.
        footprint: What that was chosen by.
        budget: The memory of a process.
        peak_of: Measures the device.

    Raises:
        torch.OutOfMemoryError: If not even the smallest plan fits.
    """
    config = trainer.config
    held: Plan | None = None
    plan: Plan | None = trainer.plan
    correction, below = UNCORRECTED, math.inf
    for _ in range(_PLANS_TRIED):
        if plan is None or plan == held:
            break
        if plan.checkpoint_reward and not trainer.plan.checkpoint_reward:
            trainer.mixture.recompute()
        trainer.adopt(plan)
        if plan.checkpoint_reward:
            # Switched on for good.
            own = config.gradient.model_copy(update={"checkpoint_reward": True})
            config = config.model_copy(update={"gradient": own})
        points = _measure(trainer, footprint, peak_of)
        if points:
            correction = Correction.through(points)
            held = _corrected(plan, correction)
        else:
            below = _estimated(trainer, footprint, plan.micro_batch)
        plan = None
        for limit in [below] if held is not None else [_SMALLER * below, below]:
            try:
                plan = make_plan(
                    config,
                    processes=trainer.plan.processes,
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
    trainer.adopt(held)


def _corrected(plan: Plan, correction: Correction) -> Plan:
    """Return the plan with what was measured in its estimate."""
    if plan.estimate is None:
        return plan
    return replace(plan, estimate=replace(plan.estimate, correction=correction))


def _measure(trainer: Trainer, footprint: Footprint, peak_of: PeakOf) -> list[tuple[float, float]]:
    """Return what was estimated and what was needed, for the plan's micro-batch and half of it.

    Empty where memory ran out.
    """
    points: list[tuple[float, float]] = []
    for images in (trainer.plan.micro_batch, trainer.plan.micro_batch // 2):
        if images:
            found = _largest(_try(trainer, peak_of, images), trainer)
            if found is None:
                break
            points.append((_estimated(trainer, footprint, images), found))
    return points


def _estimated(trainer: Trainer, footprint: Footprint, images: int) -> float:
    """Return the peak that the trainer's plan is estimated to have with so many images at once."""
    plan = trainer.plan
    return estimate(
        footprint,
        trainer.config,
        micro_batch=images,
        accumulation=plan.accumulation,
        network=plan.checkpoint_network,
        decoder=plan.checkpoint_decoder,
        reward=plan.checkpoint_reward,
        stored_calls=plan.stored_calls,
    ).peak


def _try(trainer: Trainer, peak_of: PeakOf, images: int) -> int | None:
    """Return the peak of a micro-batch, or None where memory ran out."""
    try:
        found = peak_of(lambda: rehearse(trainer, images))
    except torch.OutOfMemoryError:
        return None
    # AdamW's two moments come with the first update, gradients with the first micro-batch.
    missing = (not trainer.optimizer.state) * 8 + (trainer.plan.accumulation > 1) * 4
    return found + missing * sum(parameter.numel() for parameter in trainer.parameters)


def rehearse(trainer: Trainer, images: int, calls: int | None = None) -> None:
    """Do one micro-batch of the coming step and forget it.

    Args:
        trainer: Left as it was.
        images: In the micro-batch.
        calls: That carry gradient; None is the most that can be drawn.
    """
    steps = trainer.config.sample.num_inference_steps
    calls = calls or longest_window(trainer.config.gradient, steps)
    merged = lora.Merged(trainer.model.network)
    try:
        window = GradWindow(steps - calls, steps)
        _, losses = trainer.forward(range(images), window, merged)
        with trainer.mixture.blamed():
            losses.sum().backward()
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)


def _largest(found: int | None, trainer: Trainer) -> int | None:
    """Return the largest figure of all processes; None if memory ran out in one."""
    device = trainer.accelerator.device
    own = torch.tensor([-1 if found is None else found], device=device)
    figures = cast(Tensor, trainer.accelerator.gather(own))
    return None if int(figures.min()) < 0 else int(figures.max())
