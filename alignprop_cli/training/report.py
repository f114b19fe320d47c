"""The live report of a run: report.html, which is whole and of now whenever it is opened.

What it shows comes from metrics.jsonl and samples/, so that a resumed run goes on with its curves.
A run never fails for it, and waits for it less than a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignprop_cli.config.schema import dump
from alignprop_cli.evaluation import page
from alignprop_cli.evaluation.draw import Samples as Drawn
from alignprop_cli.evaluation.measures import means
from alignprop_cli.evaluation.plots import Group, Plot, histogram
from alignprop_cli.training import curves, frames, provenance
from alignprop_cli.training.callbacks import Callback, Run
from alignprop_cli.training.forecast import duration
from alignprop_cli.training.guard import Guard, held_out_names
from alignprop_cli.training.record import StepRecord
from alignprop_cli.training.resume import read_metrics
from alignprop_cli.training.samples import Samples

REPORT = "report.html"
"""The file of the report in a run folder."""

# Warnings that are shown, the last ones; steps from which the time that is left is taken.
_MOST_WARNINGS = 50
_RECENT = 20
# Seconds after which the page is written again where no samples are taken.
_PAUSE = 60.0
# Pairs of images before and after.
_MOST_PAIRS = 100
# What may go wrong while a page is made: files, a missing package, values of another kind. A
# mistake in our own code is among them, and is told as a warning: it must not cost a run.
_FAULTS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    page.TemplateError,
)


@dataclass(frozen=True)
class Outcome:
    """What is known when a run is done.

    Args:
        title: Of the table.
        columns: Its columns.
        rows: Its rows.
        base: Held-out samples of the base model.
        tuned: The same of the adapter.
        names: What the two are called.
        seconds: Of the whole run.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    base: Drawn
    tuned: Drawn
    names: tuple[str, str]
    seconds: float


class Report(Callback):
    """Writes the report before the first step, after every evaluation, and at the end.

    Between evaluations it is written too, at most once a minute.

    It comes after `MetricsFile` in the list of callbacks. Only the main process writes.

    Args:
        samples: The callback that measures.
        guard: The callback that judges.
    """

    def __init__(self, samples: Samples, guard: Guard) -> None:
        self._samples, self._guard = samples, guard
        self._has_warned, self._written = False, 0.0

    def before_training(self, run: Run) -> None:
        """Take in what was measured before, and write the first page."""
        self._run = run
        if not run.accelerator.is_main_process:
            return
        self._lines: list[dict[str, Any]] = []
        self._base_frame: frames.Frame | None = None
        self._write("running", self._begin)

    def after_step(self, record: StepRecord) -> None:
        """Write the page, if this step was followed by samples or a minute has passed."""
        if not self._run.accelerator.is_main_process:
            return
        self._lines.append(record.line())
        if self._samples.now is not None:
            self._write("running", self._keep_samples)
        elif time.monotonic() - self._written > _PAUSE:
            self._write("running")

    def after_training(self) -> None:
        """Write the page once more, also after an interruption or an error."""
        if self._run.accelerator.is_main_process:
            self._write("stopped" if self._is_unfinished() else "ending")

    def finish(self, outcome: Outcome) -> None:
        """Write the last page, with images and rewards before and after."""
        self._write("done", outcome=outcome)

    def _is_unfinished(self) -> bool:
        step, steps = self._run.trainer.step_number, self._run.config.train.steps
        return step < steps and not self._guard.verdict().stopped

    def _begin(self) -> None:
        """Read the metrics of a resumed run, and find out what does not change."""
        run = self._run
        self._lines = read_metrics(run.folder)
        # Found out once: comparing with all presets takes a third of a second.
        self._environment = provenance.environment(run)
        self._plan = provenance.plan(run)
        self._preset, self._changed = provenance.nearest_preset(run.config)
        # Of the base model: nothing else has been sampled in this process yet.
        if run.sampled is not None:
            self._base_frame = frames.make(0, run.sampled)
            frames.write(self._folder, self._base_frame)

    def _keep_samples(self) -> None:
        if self._run.sampled is not None:
            step = self._run.trainer.step_number
            frames.write(self._folder, frames.make(step, self._run.sampled))

    @property
    def _folder(self) -> Path:
        return self._run.folder / "samples"

    def _write(
        self,
        state: str,
        prepare: Callable[[], object] = lambda: None,
        outcome: Outcome | None = None,
    ) -> None:
        """Write the page; where that fails, say so once and let the run go on."""
        # A run that was moved away must not leave a page where it was.
        if not self._run.folder.is_dir():
            return
        # What is written before a page is in here too: it is for the page alone.
        try:
            prepare()
            page.write(self._run.folder / REPORT, "run.html", **self._content(state, outcome))
        except _FAULTS as error:
            if not self._has_warned:
                self._has_warned = True
                what = f"{type(error).__name__}: {error}"
                self._run.console.warn(f"{REPORT} cannot be written; the run goes on: {what}")
        self._written = time.monotonic()

    def _content(self, state: str, outcome: Outcome | None) -> dict[str, Any]:
        """Return the values for the template."""
        # 1. Where the run is, from the files and from those who measure and judge.
        run, verdict = self._run, self._guard.verdict()
        step, steps = run.trainer.step_number, run.config.train.steps
        shown, (*quality, optimisation, speed) = self._frames(), self._curves(verdict.best)
        # 2. One value for each name in the template; a missing one would be an error there.
        return {
            "title": f"{run.folder.resolve().name}: {run.config.model.id}",
            "state": state,
            "step": step,
            "steps": steps,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "left": self._time_left(steps - step) if state == "running" else "",
            "took": "" if outcome is None else duration(outcome.seconds),
            "told": verdict.told,
            "stopped": verdict.stopped,
            "outcome": outcome,
            "so_far": [] if outcome else self._so_far(),
            "groups": [*quality, self._distributions(outcome, shown), optimisation, speed],
            "images": len(shown),
            "cards": _cards(outcome) if outcome else [],
            "sorts": list(outcome.base.rewards) if outcome else [],
            "plan": self._plan,
            "environment": self._environment,
            "preset": self._preset,
            "changed": self._changed,
            "warnings": run.console.warned[-_MOST_WARNINGS:],
            "commands": provenance.commands(
                run, has_best=verdict.best is not None, is_over=step >= steps
            ),
            "config": dump(run.config),
            "data": {"images": self._slider(shown, verdict.best)} if shown else {},
        }

    def _curves(self, best: int | None) -> list[Group]:
        config, base = self._run.config, means(self._samples.base)
        # Without samples in this session (eval.every=0) those of the earlier ones are still shown.
        measured = {**base, **{n: 0.0 for line in self._lines for n in line.get("held_out", {})}}
        return curves.groups(
            self._lines,
            base,
            trained=list(config.reward),
            held_out=held_out_names(config, measured),
            calls=config.sample.num_inference_steps,
            best=best,
        )

    def _frames(self) -> list[frames.Frame]:
        """Return the images through training; none where nothing is sampled."""
        if self._base_frame is None:
            return []
        steps = [line["step"] for line in self._lines if "held_out" in line]
        return [self._base_frame, *frames.read(self._folder, steps, self._base_frame)]

    def _slider(self, shown: Sequence[frames.Frame], best: int | None) -> dict[str, Any]:
        return {
            "prompts": shown[0].prompts,
            "last": self._run.config.train.steps,
            "steps": [frame.shown(best) for frame in shown],
        }

    def _distributions(self, outcome: Outcome | None, shown: Sequence[frames.Frame]) -> Group:
        """Return the rewards' distributions: of the held-out samples, until then of the fixed."""
        title = "Distributions of the rewards"
        found: list[Plot] = []
        # Those at the end are more images, and of prompts that no decision was made on.
        if outcome is not None:
            before, after = outcome.names
            for name, values in outcome.base.rewards.items():
                found.append(histogram(name, {before: values, after: outcome.tuned.rewards[name]}))
        elif len(shown) > 1:
            first, last = shown[0], shown[-1]
            found = [
                histogram(name, {"base": values, f"step {last.step}": last.rewards[name]})
                for name, values in first.rewards.items()
                if name in last.rewards
            ]
        return title, found

    def _so_far(self) -> list[tuple[str, ...]]:
        """Return the rows of the newest samples: measure, base model, LoRA, difference."""
        # The guard's words are about the same samples: they stand beside.
        measured = [line for line in self._lines if "held_out" in line]
        base = means(self._samples.base)
        if not measured:
            return []
        now, alarms = measured[-1]["held_out"], measured[-1].get("guard", {}).get("alarms", [])
        return [
            (
                name,
                f"{before:.4f}",
                f"{now[name]:.4f}",
                f"{now[name] - before:+.4f}",
                "worse than tolerated" if name in alarms else "",
            )
            for name, before in base.items()
            if name in now
        ]

    def _time_left(self, steps: int) -> str:
        # A median: a first step that compiles, or a pause of the machine, says nothing of the rest.
        recent = [line["seconds"] for line in self._lines[-_RECENT:]]
        return duration(steps * statistics.median(recent)) if recent else ""


def _cards(outcome: Outcome) -> list[page.Card]:
    """Return the held-out images before and after, in pairs."""
    pair = (outcome.base, outcome.tuned)
    return [
        page.Card(
            sample.prompt,
            {
                name: page.thumbnail(each.images[i])
                for name, each in zip(outcome.names, pair, strict=True)
            },
            {name: each.caption(i) for name, each in zip(outcome.names, pair, strict=True)},
            {
                reward: float(outcome.tuned.rewards[reward][i] - values[i])
                for reward, values in outcome.base.rewards.items()
            },
        )
        for i, sample in enumerate(outcome.base.samples[:_MOST_PAIRS])
    ]
