"""The learning rate of each step, as a function of the step alone.

It depends neither on the number of steps of the run nor on anything that would have to be saved: a
run that is resumed, also with more steps, is the one that had them from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from alignprop_cli.config.train import ScheduleName


@dataclass(frozen=True)
class Rates:
    """A schedule of the learning rate.

    Args:
        largest: The largest learning rate.
        warmup_steps: Steps over which it rises linearly.
        decay_steps: N, steps after the warmup over which it falls; None keeps it constant.
        schedule: One of diffusers' schedules, whose warmup begins at 0. None is our own, none of
            whose steps is lost: step i of W warmup steps has (i + 1) / (W + 1) of the largest, and
            the fall is linear, to 1 / N of it, where it stays.
        cycles: Of `cosine_with_restarts`: how often it falls.
        power: Of `polynomial`.
        rules: Of `piecewise_constant`: "1:10,0.1:20,0.01" is the factor 1 before step 10, 0.1
            before step 20 and 0.01 from then on.
    """

    largest: float
    warmup_steps: int = 0
    decay_steps: int | None = None
    schedule: ScheduleName | None = None
    cycles: int = 1
    power: float = 1.0
    rules: str | None = None

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.schedule is not None:
            return self.largest * self._factor(step)
        if step < self.warmup_steps:
            return self.largest * (step + 1) / (self.warmup_steps + 1)
        if self.decay_steps is None:
            return self.largest
        # The last step still moves: a rate of 0 would be a step for nothing.
        done = min(step - self.warmup_steps, self.decay_steps - 1) / self.decay_steps
        return self.largest * (1.0 - done)

    @cached_property
    def _factor(self) -> Callable[[int], float]:
        """Return the factor on the largest learning rate as a function of the step."""
        from diffusers.optimization import get_scheduler

        # diffusers hangs its schedules on an optimiser, which they change. All that is wanted is
        # the function inside, so they get an optimiser of their own.
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=self.largest)
        scheduler = get_scheduler(
            str(self.schedule),
            optimizer,
            step_rules=self.rules,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=self.warmup_steps + (self.decay_steps or 0),
            num_cycles=self.cycles,
            power=self.power,
        )
        return scheduler.lr_lambdas[0]
