"""Whether a device needs what was estimated: measured with two micro-batches before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from alignprop_cli import lora
from alignprop_cli.estimate import Correction, longest_window
from alignprop_cli.trainer import Trainer
from alignprop_cli.truncation import GradWindow

PeakOf = Callable[[Callable[[], object]], int]
"""Runs something and returns the most bytes that were in use on the device meanwhile."""


def cuda_peak(run: Callable[[], object]) -> int:
    """Return the most bytes that torch had allocated on the current GPU while something ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(trainer: Trainer, peak_of: PeakOf, predict: Callable[[int], float]) -> Correction:
    """Return how what is needed follows from what was estimated.

    Rehearses the micro-batch of the plan and half of it, with the longest window there can be. One
    that does not fit is halved until it does; of several processes the largest figure counts.

    Args:
        trainer: Before its first step; left as it was.
        peak_of: Measures the device.
        predict: The estimated peak for a micro-batch of so many images.

    Raises:
        torch.OutOfMemoryError: If not even one image fits.
    """
    points: list[tuple[float, float]] = []
    images = trainer.plan.micro_batch
    while len(points) < 2 and images >= 1:
        found = _largest(_try(trainer, peak_of, images), trainer)
        if found is not None:
            points.append((predict(images), found))
        elif images == 1:
            raise torch.OutOfMemoryError("one image at once is too much for this device")
        images //= 2
    return Correction.through(points)


def _try(trainer: Trainer, peak_of: PeakOf, images: int) -> int | None:
    """Return the peak of a micro-batch, or None where memory ran out."""
    try:
        found = peak_of(lambda: rehearse(trainer, images))
    except torch.OutOfMemoryError:
        return None
    # AdamW's two moments come with the first update.
    return found + 8 * sum(parameter.numel() for parameter in trainer.parameters)


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
        losses.sum().backward()
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)


def _largest(found: int | None, trainer: Trainer) -> int | None:
    """Return the largest figure of all processes; None if memory ran out in one."""
    device = trainer.accelerator.device
    own = torch.tensor([-1 if found is None else found], device=device)
    figures = cast(Tensor, trainer.accelerator.gather(own))
    return None if int(figures.min()) < 0 else int(figures.max())
