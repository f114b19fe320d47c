"""Tell experiment trackers what a run does; see tracking/follow.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import TracebackType
from typing import Self

from alignprop_cli.config import presets
from alignprop_cli.config.tracking import TrackingConfig
from alignprop_cli.errors import InterruptedRun
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.parsing import read_json
from alignprop_cli.tracking.follow import Followers
from alignprop_cli.tracking.spool import Job
from alignprop_cli.training.callbacks import Callback, Run
from alignprop_cli.training.record import StepRecord
from alignprop_cli.training.resume import read_metrics

STATES = "trackers"
"""The folder in a run's where it is kept what its trackers have been told."""

# Images of one step; as many as are on a sheet.
_SHOWN = 16


class Trackers(Callback):
    """Tells the trackers; a context that is left when the run has written its summary.

    On other processes than the main one, and without trackers, it does nothing.

    Args:
        settings: The `tracking` section, which a run's own configuration does not keep.
    """

    def __init__(self, settings: TrackingConfig) -> None:
        self._settings = settings
        self._followers: Followers | None = None

    @property
    def names(self) -> list[str]:
        """Return the trackers' names."""
        return list(self._settings.log_with)

    @property
    def words(self) -> str:
        """The options that name the trackers on a command line, with a blank before each."""
        # What is default needs no words.
        given = self._settings.model_dump(exclude_defaults=True)
        names = given.pop("log_with", ())
        words = ["--log-with", ",".join(names)] if names else []
        for key, value in given.items():
            words += ["--set", presets.assignment(f"tracking.{key}", value)]
        return f" {shlex.join(words)}" if words else ""

    def before_training(self, run: Run) -> None:
        """Start the trackers, and tell them what they have missed."""
        if not (self._settings.log_with and run.accelerator.is_main_process):
            return
        self._run, step = run, run.trainer.step_number
        console, settings = run.console, self._settings
        self._followers = Followers(settings.log_with, console.warn, console.note)
        self._followers.start(
            Job(
                kind="train",
                name=run.folder.resolve().name,
                project=settings.project,
                run_name=settings.run_name,
                tags=settings.tags,
                config=run.config.model_dump(mode="json", exclude={"tracking"}),
                folder=str(run.folder.resolve()),
                states=str((run.folder / STATES).resolve()),
                resumed=step,
            )
        )
        # Of these each tracker takes what it has not seen.
        for line in read_metrics(run.folder):
            self._followers.scalars(line["step"], line)
        # The base model's; a resumed run has shown them.
        if step == 0:
            self._show(0)

    def after_step(self, record: StepRecord) -> None:
        """Tell the numbers of the step, and show its samples where there are any."""
        if self._followers is not None:
            self._followers.scalars(record.step, record.line())
            if record.held_out:
                self._show(record.step)

    def __enter__(self) -> Self:
        """Do nothing: the trackers are started with the training."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell the result and hand the adapter over, or say how the run has failed."""
        if self._followers is None:
            return
        if error is None:
            self._conclude(self._run.folder, self._run.trainer.step_number)
        stopped = isinstance(error, InterruptedRun | KeyboardInterrupt)
        status = "finished" if error is None else "interrupted" if stopped else "failed"
        self._followers.end(status)

    def _conclude(self, folder: Path, step: int) -> None:
        assert self._followers is not None
        values = read_json((folder / "summary.json").read_text(encoding="utf-8"))
        final = {name: values[name] for name in ("seconds", "peak_memory_gib", "held_out")}
        self._followers.scalars(step, {"final": final}, again=True)
        # The best one, where the guard has stopped the run.
        adapter = Path(values["adapter"])
        self._followers.image_files(
            step, "before_after", [folder / "before_after.png"], [("held-out samples", "")]
        )
        self._followers.artifact("adapter", [adapter.with_name(LORA_FILE)])

    def _show(self, step: int) -> None:
        """Show the samples that were taken after a step."""
        found = self._run.sampled
        if found is not None and self._followers is not None:
            shown = [
                (found.images[i], sample.prompt, found.caption(i))
                for i, sample in enumerate(found.samples[:_SHOWN])
            ]
            self._followers.images(step, "samples", shown)
