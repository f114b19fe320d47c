"""Micro-batches that are run to see what they take, and forgotten: for the probe and compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.plan import Plan
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.training.trainer import Trainer


class Trial:
    """A trainer as the probe sees it; nothing that runs here changes the training.

    Args:
        trainer: Before its first step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def plan(self) -> Plan:
        """Return the plan that is in force."""
        return self.trainer.plan

    @property
    def mixture(self) -> Mixture:
        """Return the rewards."""
        return self.trainer.mixture

    @property
    def missing_bytes(self) -> int:
        """Return what a step needs beside a lone micro-batch.

        AdamW's two moments come with the first update; the gradients stay when there is more than
        one micro-batch.
        """
        parameters = sum(p.numel() for p in self.trainer.optimizer.parameters.values())
        moments = 0 if self.trainer.optimizer.adamw.state else 8
        return (moments + 4 * (self.plan.accumulation > 1)) * parameters

    def apply_plan(self, plan: Plan) -> None:
        """Divide the batch in another way from now on."""
        self.trainer.apply_plan(plan)

    def run_micro_batch(self, calls: int | None = None) -> None:
        """Run a roll-out batch, and of it a micro-batch there and back; drop the gradient.

        Args:
            calls: How many, the last ones, carry gradient; None is the most that can be drawn.
        """
        trainer, estimator = self.trainer, self.trainer.settings.estimator
        steps = len(trainer.schedule)
        calls = calls or estimator.longest(steps)
        path = estimator.path(tuple(range(steps - calls, steps)))
        images = [replace(i, path=path, schedule=trainer.schedule) for i in trainer.images()]
        try:
            merged = lora.Merged(trainer.model.network.module)
            starts = trainer.roll_out(images[: self.plan.rollout_batch], merged)
            starts |= trainer.roll_out(images[len(starts) : self.plan.micro_batch], merged)
            trainer.go_back(images[: self.plan.micro_batch], starts, merged)
        finally:
            trainer.optimizer.zero_grad()

    def largest(self, value: int | None) -> int | None:
        """Return the largest value of all processes; None if one has none."""
        accelerator = self.trainer.accelerator
        own = torch.tensor([-1 if value is None else value], device=accelerator.device)
        values = cast(Tensor, accelerator.gather(own))
        return None if int(values.min()) < 0 else int(values.max())
