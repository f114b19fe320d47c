"""Samples during a run: fixed prompts and noise every few steps, their sheet and their measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alignprop_cli.console import Console
from alignprop_cli.evaluation import draw, sheet
from alignprop_cli.evaluation.measures import Quantity, means, measure
from alignprop_cli.lora import layers as lora
from alignprop_cli.training.callbacks import Callback, Run
from alignprop_cli.training.record import StepRecord

# Images on a sheet: more would take longer to compress than to sample.
_SHOWN = 16


class Samples(Callback):
    """Samples fixed prompts every `eval.every` steps: a sheet of images, and their measures.

    The means go into the record, so `MetricsFile` comes later in the list.

    Attributes:
        base: Measures of the base model; empty if nothing is sampled.
        now: Those after the present step; None if it was not followed by samples.
    """

    base: Mapping[str, Quantity]
    now: Mapping[str, Quantity] | None

    def before_training(self, run: Run) -> None:
        """Sample with the base model, which everything later is compared with."""
        self._run, self.base, self.now = run, {}, None
        if run.config.eval.every:
            # Again where a run is resumed: it is the same, and the samples may be others by now.
            with lora.disabled(run.trainer.model.network.module):
                self.base = self._sample(run.trainer.step_number == 0)

    def after_step(self, record: StepRecord) -> None:
        """Sample every `eval.every` steps."""
        every, self.now = self._run.config.eval.every, None
        if every and record.step % every == 0:
            self.now = self._sample(is_shown=True)
            record.held_out = means(self.now)

    def _sample(self, is_shown: bool) -> dict[str, Quantity]:
        """Sample on all processes, write the sheet on the main one, and return the measures."""
        run, step = self._run, self._run.trainer.step_number
        # Held-out rewards are measured with the trained ones, where there are any.
        mixture = run.measured or run.trainer.mixture
        # A second progress bar would push the training's aside.
        quiet = Console(quiet=True)
        found = run.sample(run.samples, quiet, features=mixture.features)
        run.sampled = found
        if is_shown and run.accelerator.is_main_process:
            _write_sheet(found, run.folder / "samples" / f"step-{step:06d}.png", step)
        return measure(found)


def _write_sheet(found: draw.Samples, path: Path, step: int) -> None:
    cells = [
        sheet.Cell(sample.prompt, (image,), (found.caption(i),))
        for i, (sample, image) in enumerate(
            zip(found.samples[:_SHOWN], found.images[:_SHOWN], strict=True)
        )
    ]
    # Not its parents: a run that was moved away meanwhile would go on in half a folder.
    path.parent.mkdir(exist_ok=True)
    sheet.contact_sheet(cells, path, titles=(f"step {step}",))
