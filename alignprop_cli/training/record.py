"""What one optimiser step did: collected batch by batch, then one line of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.device import peak_gib
from alignprop_cli.training.batches import StepImage


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
        loss: Mean over the global batch, of the rewards alone.
        rewards: Rewards and extra metrics by name, over the global batch.
        grad_norm: L2 norm of the gradient before clipping.
        lora_norm: L2 norm of the LoRA's weights after the step.
        learning_rate: Learning rate of this step.
        backprop_steps: Mean number of network calls that carried gradient.
        path_share: Mean share of the path from noise to image that those calls cover; None for
            diffusion, where a step's share of sigma is no measure of what it moves.
        seconds: Wall-clock time of this step.
        peak_memory_gib: Peak so far, in GiB: allocated on CUDA, resident otherwise.
        held_out: Means over the fixed sample prompts, if they were sampled after this step: of all
            rewards, and of what else is measured.
        guard: What the guard made of them; see `guard.Guard`.
        skipped: Why the step updated nothing; None for all other steps.
        kl: Mean KL to the base model over the global batch, before its weight; None without one.
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
    guard: dict[str, Any] = field(default_factory=dict[str, Any])
    skipped: str | None = None
    kl: float | None = None
    path_share: float | None = None

    def line(self) -> dict[str, Any]:
        """Return the record as plain values, without what there is none of."""
        if self.skipped is not None:
            names = ("step", "images_seen", "seconds", "skipped", "held_out", "guard")
        else:
            names = tuple(f.name for f in fields(self) if f.name != "skipped")
        values = asdict(self)
        return {name: values[name] for name in names if values[name] not in (None, {})}


def skipped_step(step: int, batch_size: int, started: float, why: str) -> StepRecord:
    """Return the record of a step that was skipped because something was not finite.

    Args:
        step: Counted from 1.
        batch_size: Images of a step.
        started: What `time.perf_counter` said when it began.
        why: In words.
    """
    return StepRecord(
        step=step,
        images_seen=step * batch_size,
        loss=math.nan,
        rewards={},
        grad_norm=math.nan,
        lora_norm=math.nan,
        learning_rate=0.0,
        backprop_steps=0.0,
        seconds=time.perf_counter() - started,
        peak_memory_gib=math.nan,
        skipped=why,
    )


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
        self._shares: list[Tensor] = []
        self._kl: list[Tensor] = []

    def add(self, losses: Tensor, scores: Mapping[str, Tensor], image: StepImage) -> None:
        """Add a batch: losses and scores (B,), and an image whose path and schedule all have."""
        self._losses.append(losses.detach())
        self._calls.append(torch.full_like(losses.detach(), float(len(image.path))))
        if image.schedule.prediction_type == "flow":
            share = image.schedule.path_share(image.path.calls)
            self._shares.append(torch.full_like(losses.detach(), share))
        for name, values in scores.items():
            self._scores[name].append(values.detach())

    def add_kl(self, values: Tensor | None) -> None:
        """Add the KL of a batch, shape (B,); None where it is not measured."""
        self._kl += [] if values is None else [values]

    def record(
        self,
        accelerator: Accelerator,
        step: int,
        batch_size: int,
        started: float,
        grad_norm: float,
        lora_norm: float,
        learning_rate: float,
    ) -> StepRecord:
        """Return the record of the step, over the images of all processes.

        Args:
            accelerator: Gathers from all processes.
            step: Counted from 1.
            batch_size: Images of a step.
            started: What `time.perf_counter` said when the step began.
            grad_norm: As in the record, and so are the others.
            lora_norm: Of the weights after the step.
            learning_rate: Of the step.
        """

        # Float64: the order of the images, and so the division of the batch, leaves the mean alone.
        def joined(parts: list[Tensor]) -> Tensor:
            return cast(Tensor, accelerator.gather(torch.cat(parts))).cpu().double()

        scores = {name: joined(parts) for name, parts in self._scores.items()}
        return StepRecord(
            step=step,
            images_seen=step * batch_size,
            loss=float(joined(self._losses).mean()),
            rewards={
                name: RewardStats(float(v.mean()), float(v.std(correction=0)))
                for name, v in scores.items()
            },
            grad_norm=grad_norm,
            lora_norm=lora_norm,
            learning_rate=learning_rate,
            backprop_steps=float(joined(self._calls).mean()),
            seconds=time.perf_counter() - started,
            peak_memory_gib=peak_gib(accelerator.device),
            kl=float(joined(self._kl).mean()) if self._kl else None,
            path_share=float(joined(self._shares).mean()) if self._shares else None,
        )
