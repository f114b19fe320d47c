"""What a run does where images, rewards, a gradient or weights are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.errors import NonFinite, RunError
from alignprop_cli.training.optimizer import Optimizer

Policy = Literal["stop", "skip"]


class FiniteGuard:
    """Stops a run at what is not finite, or leaves the step out; nothing of it is learned.

    Args:
        policy: `stop` ends the run; `skip` leaves the parameters as they are in this step.
        limit: With `skip`, how many steps in a row are skipped before the run ends.
        optimizer: Of the parameters that are guarded.

    Attributes:
        fault: What the last part of a run that was `caught` met; None if all was finite.
        skipped_in_row: Steps up to the present one, without a gap, that were skipped.
    """

    def __init__(self, policy: Policy, limit: int, optimizer: Optimizer) -> None:
        self._policy, self._limit, self._optimizer = policy, limit, optimizer
        self.fault: NonFinite | None = None
        self.skipped_in_row = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """With `skip`, turn images and rewards that are not finite into a gradient of NaN.

        All processes sum their gradients afterwards, so all of them learn of it.
        """
        self.fault = None
        try:
            yield
        except NonFinite as error:
            if self._policy == "stop":
                raise
            self.fault = error
            for parameter in self._optimizer.parameters.values():
                parameter.grad = torch.full_like(parameter, math.nan)

    def overflowed(self, norm: float, accelerator: Accelerator) -> bool:
        """Return whether float16 overflowed, so that the step has to be repeated.

        Not where images or rewards are not finite, in any process: no loss scale makes them so.

        Args:
            norm: Norm of the gradient over all processes.
            accelerator: The processes.
        """
        if math.isfinite(norm):
            return False
        if self._policy == "skip" and self._optimizer.scaler.is_enabled():
            # All come here, since all have the same norm.
            faults = torch.tensor([float(self.fault is not None)], device=accelerator.device)
            if float(cast(Tensor, accelerator.reduce(faults, "sum"))) > 0.0:
                return False
        return self._optimizer.overflowed(norm)

    def reason_to_skip(self, norm: float, step: int, seed: int) -> str | None:
        """Return why a step is skipped; None if its gradient can be used.

        Args:
            norm: Norm of the gradient over all processes.
            step: Counted from 1, for messages.
            seed: Seed of the run, for messages.

        Raises:
            RunError: If the gradient is not finite, and the run is to stop for that.
        """
        if math.isfinite(norm):
            self.skipped_in_row = 0
            return None
        why = self.fault.message if self.fault else "the gradient is not finite"
        if self._policy == "stop":
            raise RunError(
                f"step {step}: {why} (train.seed {seed}); nothing was updated in this step",
                hint="try fewer backpropagated steps, a lower train.learning_rate, or model.dtype "
                "bfloat16 or float32; --on-nonfinite skip leaves such steps out",
            )
        self.skipped_in_row += 1
        if self.skipped_in_row >= self._limit:
            raise RunError(
                f"step {step}: {why}; {self._limit} steps in a row were skipped "
                "(train.nonfinite_limit)",
                hint="the run has diverged: resume an older checkpoint with a lower learning rate "
                "as a new run, --set lora.init=CHECKPOINT",
            )
        self._optimizer.skip()
        return why

    def check_update(self, step: int) -> None:
        """Refuse an update that left weights or moments that are not finite.

        Nothing of it may be saved: no checkpoint is written of such a step.

        Raises:
            RunError: Whatever the policy is, since the weights before the update are gone.
        """
        if not self._optimizer.is_finite():
            raise RunError(
                f"step {step}: the weights or the optimiser's moments are not finite after the "
                "update; they are not saved",
                hint="lower train.learning_rate or train.weight_decay, or raise "
                "train.adam_epsilon; the checkpoints of earlier steps are good",
            )
