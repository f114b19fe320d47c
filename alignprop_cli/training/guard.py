"""The guard: stops a run that pays for its reward with what is not trained on, and knows its best.

Measured is in samples.py, judged in harm.py; here is what becomes of it in a run. (A guard of
another kind, against NaN and infinity, is in nonfinite.py.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from alignprop_cli.config.guard import HELD_OUT, RIGHT
from alignprop_cli.config.schema import Config
from alignprop_cli.evaluation import sheet
from alignprop_cli.evaluation.measures import Quantity, means
from alignprop_cli.training import checkpoint, harm
from alignprop_cli.training.callbacks import Callback, Run
from alignprop_cli.training.harm import History
from alignprop_cli.training.record import StepRecord
from alignprop_cli.training.resume import read_metrics, summarised
from alignprop_cli.training.samples import Samples

# Prompts below which a change would have to be more than ten standard errors to be clear.
_FEWEST = 4


@dataclass(frozen=True)
class Verdict:
    """What the guard says at the end of a run.

    Args:
        step: The last step.
        stopped: Whether it stopped the run there.
        why: What had become worse then, in words; empty if nothing had.
        best: The step that was kept as `best`; None if none was.
    """

    step: int
    stopped: bool
    why: str
    best: int | None

    @property
    def told(self) -> str:
        """Return it as a sentence; empty if there is nothing to tell."""
        kept = "no step was better than the base model, so none was kept as `best`"
        if self.best is not None:
            kept = f"the best checkpoint is step {self.best}, which was kept as `best`"
        if self.stopped:
            return f"{self.why}: stopped at step {self.step}; {kept}"
        if self.why:
            return f"at the end {self.why}; {kept}"
        return "" if self.best is None else kept


class Guard(Callback):
    """Compares the samples of a run with the base model's, and asks to stop when they got worse.

    Everything but `best` itself, which `Checkpoints` writes, is in metrics.jsonl: there a resumed
    run finds what was said before it.

    Args:
        samples: The callback that measures; it comes before this one in the list.
        goes_on: Whether steps are asked for whatever it said at the one that the run begins at.
    """

    def __init__(self, samples: Samples, *, goes_on: bool = False) -> None:
        self._samples, self._goes_on = samples, goes_on
        self._why, self._stops, self._is_best = "", False, False
        self._curves: dict[int, dict[str, float]] = {}

    def before_training(self, run: Run) -> None:
        """Take in what was measured before the run was resumed."""
        settings = run.config.guard
        self._run = run
        self._rule = harm.Rule(
            settings.tolerance,
            settings.diversity_tolerance,
            settings.standard_errors,
            settings.patience,
        )
        self._history = History(settings.patience)
        base = self._samples.base
        self._held_out = held_out_names(run.config, base)
        self._watched = watched(run.config, base)
        self._curves = {0: means(base)} if base else {}
        # Read by one and sent: another process may not see the files yet.
        read: list[Any] = [None, None]
        if run.accelerator.is_main_process:
            read = [read_metrics(run.folder), summarised(run.folder)]
        lines, ended = broadcast_object_list(read)
        last, step = 0, run.trainer.step_number
        for line in lines:
            if (said := self._remembered(line)) is not None:
                self._history.add(line["step"], *said)
                if base:
                    self._curves[line["step"]] = line["held_out"]
                self._conclude(said[0], line["held_out"])
                last = line["step"]
        # Killed between verdict and summary, a run ends as it would have without the break. After
        # its summary, or from a checkpoint that was named, it is resumed to go on.
        goes_on = step < run.config.train.steps and (self._goes_on or ended == step)
        self._stops = self._stops and last == step and not goes_on
        self._keep_best()
        if not base:
            return
        if settings.enabled and (said := _unable(settings.watch, self._watched, base)):
            run.console.note(f"guard: {said}")
        if settings.best not in (HELD_OUT, *base):
            run.console.note(f"guard.best: {settings.best} is not measured here: no `best` is kept")

    def after_step(self, record: StepRecord) -> None:
        """Judge the samples of this step, if there are any, and add that to the record."""
        now, base = self._samples.now, self._samples.base
        self._is_best = False
        if now is None:
            return
        changes = {
            name: harm.change(name, base[name], now[name], self._rule) for name in self._watched
        }
        alarms = [name for name, change in changes.items() if change.alarms]
        merit = self._merit(now)
        # All processes have the same samples, but need not round alike: one decides for all.
        said: list[Any] = [alarms, merit]
        alarms, merit = broadcast_object_list(said)
        self._is_best = self._history.add(record.step, alarms, merit)
        told = {name: asdict(change) for name, change in changes.items()}
        record.guard = {"alarms": alarms, "merit": merit, "by": self._judged_by(), "changes": told}
        self._curves[record.step] = record.held_out
        self._conclude(alarms, record.held_out)

    def is_best(self) -> bool:
        """Return whether the present step is the best that was measured so far."""
        return self._is_best

    def should_stop(self) -> bool:
        """Return whether what is watched has been worse than tolerated for too long."""
        return self._stops

    def after_training(self) -> None:
        """Draw the curves, also after an interruption; the report has them all the time."""
        if len(self._curves) > 1 and self._run.accelerator.is_main_process:
            best = self._history.best
            draw_curves(self._curves, best and best[0], self._run.folder / sheet.CURVES)

    def verdict(self) -> Verdict:
        """Return what there is to say at the end of the run."""
        best = self._history.best
        return Verdict(
            self._run.trainer.step_number, self._stops, self._why, None if best is None else best[0]
        )

    def _judged_by(self) -> list[str]:
        config = self._run.config
        return harm.judged(config.guard.best, self._samples.base, self._held_out, config.reward)

    def _merit(self, now: Mapping[str, Quantity]) -> float:
        aims = {
            member.name: harm.aim(member.weight, member.loss.kind, member.loss.target)
            for member in self._run.trainer.mixture.members
        }
        best, base = self._run.config.guard.best, self._samples.base
        return harm.merit(best, base, now, self._held_out, aims)

    def _remembered(self, line: Mapping[str, Any]) -> tuple[list[str], float] | None:
        """Return the alarms and the merit of a line of metrics.jsonl; None where it has none.

        Where the settings now judge by something else, the merit is that of what was measured then.
        """
        # The folder may be somebody else's, and lines that were changed are kept (with a warning).
        try:
            said, means = line["guard"], dict[str, float](line["held_out"])
            alarms, merit = list(map(str, said["alarms"])), float(said["merit"])
            if self._samples.base and said.get("by", self._judged_by()) != self._judged_by():
                seen = {name: Quantity(np.array([float(v)]), 0.0) for name, v in means.items()}
                merit = self._merit(seen) if seen.keys() >= set(self._judged_by()) else -math.inf
        except (LookupError, TypeError, ValueError, AttributeError):
            return None
        return alarms, merit

    def _keep_best(self) -> None:
        """Make the folder `best` that of the best measurement; forget that if its weights are gone.

        The process that the run is resumed from may have gone further, or been killed in between.
        """
        run, best = self._run, self._history.best
        kept: list[Any] = [True]
        if run.accelerator.is_main_process:
            kept = [checkpoint.keep_best(run.folder, best and best[0])]
        if best is not None and not broadcast_object_list(kept)[0]:
            self._history.best = None
            run.console.note(
                f"guard: the weights of step {best[0]}, the best so far, are gone: the best is "
                "chosen among the steps from now on"
            )

    def _conclude(self, alarms: Sequence[str], now: Mapping[str, float]) -> None:
        """Decide whether the run stops, and say in words what rose and what became worse."""
        base, run = self._curves.get(0, {}), self._run
        # What was measured before the run was resumed need not be what is measured now.
        known = base.keys() & now.keys()
        trained = [
            _moved(name, base[name], now[name])
            for name in run.trainer.mixture.names
            if name in known
        ]
        worse = [
            _moved(f"held-out {n}" if n in self._held_out else n, base[n], now[n])
            for n in alarms
            if n in known
        ]
        self._why = f"{', '.join(trained)} while {', '.join(worse)}" if worse else ""
        self._stops = bool(worse) and run.config.guard.enabled and self._history.wants_to_stop


def _unable(
    wanted: Sequence[str], watched: Sequence[str], base: Mapping[str, Quantity]
) -> str | None:
    """Return why nothing will ever be clear; None if it may be."""
    if not watched:
        return f"nothing of {', '.join(wanted)} is measured here, so it will not stop the run"
    prompts = max(len(base[name].by_prompt) for name in watched)
    if prompts < _FEWEST:
        return (
            f"{prompts} prompts are too few to be sure of anything, so it will not stop the run: "
            "raise eval.sample_images"
        )
    return None


def _moved(name: str, before: float, after: float) -> str:
    how = "rose" if after > before else "fell"
    return f"{name} {how} from {before:.3g} to {after:.3g}"


def held_out_names(config: Config, measured: Mapping[str, object]) -> list[str]:
    """Return the names of the measured quantities that are held out: not trained on."""
    found = [name for name in config.eval.rewards if name not in config.reward]
    return [name for name in (*found, RIGHT) if name in measured]


def watched(config: Config, measured: Mapping[str, object]) -> list[str]:
    """Return the names of the measured quantities that must not get worse, each once."""
    names: list[str] = []
    for name in config.guard.watch:
        names += held_out_names(config, measured) if name == HELD_OUT else [name]
    return [name for name in dict.fromkeys(names) if name in measured]


def draw_curves(points: Mapping[int, Mapping[str, float]], best: int | None, path: Path) -> None:
    """Draw every measure over the steps, with the base model's value and the best step marked."""
    steps = sorted(points)
    # What was measured all the time: other rewards may be held out since the run was resumed.
    names = [n for n in points[steps[-1]] if all(n in points[step] for step in steps)]
    values = {name: [points[step][name] for step in steps] for name in names}
    level = {name: points[0][name] for name in names}
    sheet.curves(steps, values, path, x_title="step", level=level, mark=best)
