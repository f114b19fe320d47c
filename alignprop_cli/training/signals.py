"""Stop or save after the present step when a signal asks for it, in all processes together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from alignprop_cli.training.callbacks import Callback, Run

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption(Callback):
    """Stops the run after the present step on a signal that ends programs, at once on a second.

    On SIGUSR1 the run saves after the present step, and goes on.

    Args:
        save: Writes a checkpoint of the present step; called in all processes.

    Attributes:
        number: The signal that stopped the run; None if none did.
    """

    number: int | None = None

    def __init__(self, save: Callable[[], object]) -> None:
        self._save, self._wants_save = save, False

    def before_training(self, run: Run) -> None:
        """Install the handlers; from Python a run may be in another thread, which can have none."""
        self._accelerator, self._console = run.accelerator, run.console
        self._run, self._old = run, dict[int, Any]()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*_STOPPING, signal.SIGUSR1):
            # `nohup` asks to ignore SIGHUP, and so it is. One that is not Python's cannot be put
            # back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._old[number] = signal.signal(number, self._handle)

    def should_stop(self) -> bool:
        """Save if any process was asked to; return whether any got a signal that stops."""
        # All must leave the loop after the same step: one that went on would wait for the others.
        asked = [float(self.number is not None), float(self._wants_save)]
        said = torch.tensor(asked, device=self._accelerator.device)
        stop, save = cast(Tensor, self._accelerator.reduce(said, "sum")).tolist()
        if save and not stop:
            self._wants_save = False
            self._save()
            self._console.note(f"step {self._run.trainer.step_number} is saved (SIGUSR1)")
        # The signal may have reached another process only.
        if stop:
            self.number = self.number or signal.SIGTERM
        return bool(stop)

    def after_training(self) -> None:
        """Restore the old handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._wants_save = True
            return
        self.number = number
        self._console.warn("finishing this step, then saving; a second signal stops immediately")
        # With the old handlers back a second signal does what it always does.
        self.after_training()
