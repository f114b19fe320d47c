"""What only a timing on the GPU can decide: the layout of memory, and a recorded roll-out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.estimate import GIB, Budget, Footprint
from alignprop_cli.planning.plan import PlanRequest
from alignprop_cli.planning.speed import Pace, Times, step_seconds
from alignprop_cli.training.replay import Record, cuda_recorder
from alignprop_cli.training.trial import Trial

# Two timings of the same code differ by up to this factor.
_LEAST_GAIN = 1.03
# A call takes as long as launching it until the images alone would take this much of that time. On
# an H200 a recording was 4.0 x as fast with 1 image, and 1.2 x with 8, which take 1.4 x the launch.
_LAUNCH_BOUND = 1.5
# Images that fill a GPU, so that its own time counts and not that of launching kernels.
_FILLS = 8


def choose_layout(trial: Trial, note: Callable[[str], object]) -> None:
    """Leave the network in the memory layout in which a step's calls are timed to be faster.

    Networks come in channels_last: their convolutions are faster so, but group norm copies to the
    other layout and back. With several processes the slowest counts, so that all choose the same.

    Args:
        trial: A trainer before its first step.
        note: Called where the layout is changed, for people.
    """
    network = trial.trainer.model.network.module
    weights = [parameter for parameter in network.parameters() if parameter.dim() == 4]
    # Where a family leaves the layout as it is, there is nothing to choose.
    if all(weight.is_contiguous() for weight in weights):
        return
    images = min(_FILLS, trial.plan.share)
    while (last := _seconds(trial, images)) is None and images > 1:
        images //= 2
    network.to(memory_format=torch.contiguous_format)
    plain = _seconds(trial, images)
    if last is None or plain is None or last < _LEAST_GAIN * plain:
        network.to(memory_format=torch.channels_last)
        return
    note(f"the network runs {last / plain:.2f} x as fast in contiguous memory, and so it does")


def _seconds(trial: Trial, images: int) -> float | None:
    """Return the seconds of all calls of a batch; None if memory ran out in any process."""
    trainer = trial.trainer
    steps = len(trainer.schedule)
    try:
        parts = trial.part_seconds(images, ("rollout", "call"))
    except torch.OutOfMemoryError:
        found = None
    else:
        with_grad = trainer.settings.estimator.mean(steps)
        found = (steps - with_grad) * parts["rollout"] + with_grad * parts["call"]
    # Whole microseconds, since processes compare integers.
    slowest = trial.largest(None if found is None else round(1e6 * found))
    return None if slowest is None else slowest / 1e6


def replay_rollout(
    trial: Trial,
    wanted: bool | Literal["auto"],
    note: Callable[[str], object],
    *,
    times: Times,
    footprint: Footprint,
    request: PlanRequest,
    budget: Budget,
    record: Record | None = None,
) -> None:
    """Replay the roll-out's calls from now on if that is measured to be faster, and fits.

    Each process decides for itself, since values do not change. The plan's seconds are those
    expected with it.

    Args:
        trial: A trainer before its first step, with its final plan.
        wanted: True does it wherever it is possible; `auto` where most of a call is launching.
        note: Called with the outcome, for people.
        times: The pace of the device.
        footprint: What the parts of a step need.
        request: What the plan is for.
        budget: The memory of one process.
        record: Records calls; None makes CUDA graphs.
    """
    plan, replay = trial.plan, trial.trainer.replay
    images, launch = plan.rollout_batch, times.rollout.launch
    # 1. Not where the GPU is busy anyway.
    bound = images * times.rollout.each < _LAUNCH_BOUND * launch
    if not wanted or (wanted == "auto" and not bound):
        return
    # 2. Nor where it cannot be. What the recorded calls work in is theirs for the whole run.
    held = footprint.rollout.forward(images)
    if (why := _obstacle(trial, held, budget)) is not None:
        if wanted is True:
            note(f"train.cuda_graph: the roll-out is not recorded: {why}")
        return
    # 3. Timed without and with it.
    plain = trial.part_seconds(images, ("rollout",))["rollout"]
    replay.start(record or cuda_recorder())
    seconds = trial.part_seconds(images, ("rollout",))["rollout"]
    if not replay.is_on:  # it failed, and said so
        return
    gain = plain / seconds
    kept = wanted is True or gain >= _LEAST_GAIN
    if kept:
        replay.held_bytes = int(held)
        paces = replace(times, replayed=Pace(0.0, seconds / images))
        expected = step_seconds(paces, footprint, request, plan, plan.share)
        trial.trainer.plan = replace(plan, seconds=expected)
    else:
        replay.stop()
    note(
        f"the roll-out's calls are replayed from a recording: {gain:.2f} x as fast"
        + ("" if kept else ", not worth keeping")
    )


def _obstacle(trial: Trial, held: float, budget: Budget) -> str | None:
    """Return why the roll-out cannot be recorded; None if it can."""
    if not lora.Merged(trial.trainer.model.network.module).is_empty:
        return "the LoRA is merged into float32 weights, which move in every step"
    estimate = trial.plan.estimate
    if estimate is None or estimate.peak + held > budget.usable:
        return f"it would hold {held / GIB:.2f} GiB more, which do not fit"
    return None
