"""What one optimiser step did: collected batch by batch, then one line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of one metric over the images of a step."""

    mean: float
    std: float


@dataclass
class StepRecord:
    """What one optimiser step did; one line of metrics.jsonl.

    Args:
        step: Counted from 1.
        images_seen: Images sampled for training so far.
        loss: Mean over the global batch.
        rewards: Rewards and extra metrics by name, over the global batch.
        grad_norm: L2 norm of the gradient before clipping.
        lora_norm: L2 norm of the LoRA's weights after the step.
        learning_rate: Learning rate of this step.
        backprop_steps: Mean number of network calls that carried gradient.
        seconds: Wall-clock time of this step.
        peak_memory_gib: Peak so far, in GiB: allocated on CUDA, resident otherwise.
        held_out: Mean rewards of the fixed sample prompts, if they were sampled after this step.
    """

    step: int
    images_seen: int
    loss: float
    rewards: dict[str, RewardStats]
    grad_norm: float
    lora_norm: float
    learning_rate: float
    backprop_steps: float
    seconds: float
    peak_memory_gib: float
    held_out: dict[str, float] = field(default_factory=dict[str, float])


class Totals:
    """Collects what the batches of one step measured.

    Args:
        metrics: Names of the rewards and extra metrics of the mixture.
    """

    def __init__(self, metrics: Iterable[str]) -> None:
        # Tensors, not numbers: reading a value would make the CPU wait for the GPU in every batch.
        self._losses: list[Tensor] = []
        self._scores: dict[str, list[Tensor]] = {name: [] for name in metrics}
        self._calls: list[Tensor] = []

    def add(self, losses: Tensor, scores: Mapping[str, Tensor], calls: int) -> None:
        """Add a batch: losses and scores (B,), and the number of calls that carried gradient."""
        self._losses.append(losses.detach())
        self._calls.append(torch.full_like(losses.detach(), float(calls)))
        for name, values in scores.items():
            self._scores[name].append(values.detach())

    def record(self, accelerator: Accelerator, **others: Any) -> StepRecord:
        """Return the record of the step, over the images of all processes.

        Args:
            accelerator: Gathers from all processes.
            **others: The fields of the record that are not measured image by image.
        """

        # Float64: the order of the images, and so the division of the batch, leaves the mean alone.
        def joined(parts: list[Tensor]) -> Tensor:
            return cast(Tensor, accelerator.gather(torch.cat(parts))).double().cpu()

        scores = {name: joined(parts) for name, parts in self._scores.items()}
        return StepRecord(
            loss=float(joined(self._losses).mean()),
            rewards={
                name: RewardStats(float(v.mean()), float(v.std(correction=0)))
                for name, v in scores.items()
            },
            backprop_steps=float(joined(self._calls).mean()),
            **others,
        )
