"""Stop after the present step when a signal asks for it, in all processes together."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from alignprop_cli.training.callbacks import Callback, Run


class Interruption(Callback):
    """Stops the run after the present step on the first SIGINT or SIGTERM, immediately on a second.

    Attributes:
        number: The signal that stopped the run; None if none did.
    """

    number: int | None = None

    def before_training(self, run: Run) -> None:
        """Install handlers for both signals."""
        self._accelerator, self._console = run.accelerator, run.console
        self._old: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)

    def should_stop(self) -> bool:
        """Return whether any process got a signal."""
        # All must leave the loop after the same step: one that went on would wait for the others.
        said = torch.tensor([float(self.number is not None)], device=self._accelerator.device)
        if float(cast(Tensor, self._accelerator.reduce(said, "sum"))) == 0.0:
            return False
        # The signal may have reached another process only.
        self.number = self.number or signal.SIGTERM
        return True

    def after_training(self) -> None:
        """Restore the old handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._console.warn("finishing this step, then saving; a second signal stops immediately")
        # With the old handlers back a second signal does what it always does.
        self.after_training()
