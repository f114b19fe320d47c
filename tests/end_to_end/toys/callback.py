"""A callback from outside the package: notes what it is told and stops the run early."""

from __future__ import annotations

from alignprop_cli.training.callbacks import Callback, Run
from alignprop_cli.training.record import StepRecord


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.told: list[str] = []

    def before_training(self, run: Run) -> None:
        self.told.append(f"begins at {run.trainer.step_number}")

    def after_step(self, record: StepRecord) -> None:
        self.told.append(f"step {record.step}")

    def should_stop(self) -> bool:
        return len(self.told) > self.steps

    def after_training(self) -> None:
        self.told.append("ends")
