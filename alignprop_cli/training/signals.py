"""Stopping between two steps when a signal asks for it, in all processes at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from alignprop_cli.training.callbacks import Callback, Run


class Interruption(Callback):
    """Notes the first SIGINT or SIGTERM, so that the step is finished and saved; obeys the second.

    Attributes:
        number: Of the signal that stopped the run; None where none did.
    """

    number: int | None = None

    def before_training(self, run: Run) -> None:
        """Take over both signals."""
        self._accelerator, self._console = run.accelerator, run.console
        self._old: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)

    def should_stop(self) -> bool:
        """Return whether any process was told: all must leave the loop after the same step."""
        said = torch.tensor([float(self.number is not None)], device=self._accelerator.device)
        if float(cast(Tensor, self._accelerator.reduce(said, "sum"))) == 0.0:
            return False
        # Only one of several processes may have been told.
        self.number = self.number or signal.SIGTERM
        return True

    def after_training(self) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._console.warn("finishing this step, then saving; once more to stop at once")
        self.after_training()
