"""What happens around the steps of a run: metrics, checkpoints, progress (samples: samples.py).

Each is a callback: an object whose methods are called before training, after every step and after
training, and that may ask the run to stop. `run_training` takes further ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from alignprop_cli import __version__
from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.device import release_cached
from alignprop_cli.evaluation import draw
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.publishing.request import NOTHING, Request
from alignprop_cli.publishing.shared import base_model
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.training import checkpoint
from alignprop_cli.training.record import StepRecord
from alignprop_cli.training.resume import metrics_hash
from alignprop_cli.training.trainer import Trainer

# Weight of the past in the smoothed rewards of the progress bar; the new value has the rest.
_SMOOTHING = 0.8


@dataclass
class Run:
    """The parts of one run, as callbacks see them.

    Args:
        config: The complete configuration.
        folder: The run folder.
        trainer: Holds the model, the rewards and the counters.
        accelerator: Device and processes.
        console: For people.
        held_out: Samples taken before and after training.
        samples: Samples taken during training.
        inputs: Hashes of the files that the run reads; see `setup.inputs`.
        sample_batch: Images sampled together; None is `eval.batch_size`.
        measured: The rewards that samples are measured with: those trained on, then held-out ones;
            None is those trained on.
        sampled: The last samples taken during training; None if there are none yet.
        publish: What is exported or uploaded of the result.
        image_seconds: What each image took when samples were taken last.
    """

    config: Config
    folder: Path
    trainer: Trainer
    accelerator: Accelerator
    console: Console
    held_out: Sequence[draw.Sample]
    samples: Sequence[draw.Sample]
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    sample_batch: int | None = None
    measured: Mixture | None = None
    sampled: draw.Samples | None = None
    publish: Request = NOTHING
    image_seconds: float = 0.0

    def sample(
        self,
        samples: Sequence[draw.Sample],
        console: Console,
        label: str = "",
        features: draw.Features | None = None,
    ) -> draw.Samples:
        """Sample with the LoRA as it is, on all processes, and measure; training is not touched."""
        trainer, started = self.trainer, time.perf_counter()
        found = draw.draw_shared(
            trainer.model,
            samples,
            self.measured or trainer.mixture,
            self.config,
            console,
            label,
            features=features,
            batch_size=self.sample_batch,
        )
        # What torch keeps for other sizes than training's would be missing there.
        release_cached(self.accelerator.device)
        self.image_seconds = (time.perf_counter() - started) / max(len(samples), 1)
        return found


class Callback:
    """Base class that does nothing; override what is needed.

    Callbacks are called in the order of their list, on every process.
    """

    def before_training(self, run: Run) -> None:
        """Do something before the first step."""

    def after_step(self, record: StepRecord) -> None:
        """Do something after every step; the record says what the step did."""

    def should_stop(self) -> bool:
        """Return whether to end after this step. All processes must return the same."""
        return False

    def after_training(self) -> None:
        """Do something after the last step, also after an interruption or an error."""


class MetricsFile(Callback):
    """Appends every step to metrics.jsonl."""

    def before_training(self, run: Run) -> None:
        """Choose the file; only the main process writes it."""
        self._path = run.folder / "metrics.jsonl" if run.accelerator.is_main_process else None

    def after_step(self, record: StepRecord) -> None:
        """Write one line."""
        if self._path is None:
            return
        # Opened for every line: a run that is killed leaves whole lines, and half a line at most.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.line()) + "\n")


class Checkpoints(Callback):
    """Saves every `output.save_every` steps, after the last one, and when the run is stopped.

    Finite weights may still sample images of NaN. So a checkpoint counts as good when a step, or
    the samples at the end, came after it; before that, the one before it is not dropped for it.

    Args:
        is_best: Says whether the present step is the best so far, which is kept as `best` too.
    """

    def __init__(self, is_best: Callable[[], bool] = lambda: False) -> None:
        self._is_best = is_best

    def before_training(self, run: Run) -> None:
        """Remember the step at which the run begins: it needs no checkpoint."""
        self._run, self._saved = run, run.trainer.step_number

    def after_step(self, record: StepRecord) -> None:
        """Save every `output.save_every` steps and after the last one, and what is best."""
        if record.skipped is None:
            self.drop_old()
        every, last = self._run.config.output.save_every, self._run.config.train.steps
        if record.step == last or (every and record.step % every == 0):
            self.save()
        if self._is_best():
            self._write(checkpoint.BEST)

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one; on the main process."""
        if self._saved != self._run.trainer.step_number:
            self._saved = self._run.trainer.step_number
            self._write()

    def _write(self, name: str | None = None) -> None:
        run, trainer = self._run, self._run.trainer
        # LoRA and optimiser are the same in all processes, so one can write for all.
        if not run.accelerator.is_main_process:
            return
        # The LoRA file alone tells what it was trained on, how, and on which rewards.
        model_id = run.config.model.id
        header = {
            "alignprop.version": __version__,
            "alignprop.base_model": model_id,
            # A folder may be called like a hub id, and is looked for from this folder alone.
            **({"alignprop.base_is_local": "true"} if base_model(model_id) is None else {}),
            "alignprop.base_fingerprint": trainer.model.fingerprint,
            "alignprop.step": str(trainer.step_number),
            "alignprop.seed": str(run.config.train.seed),
            "alignprop.rewards": ",".join(trainer.mixture.names),
            "alignprop.config": json.dumps(run.config.model_dump(mode="json"), sort_keys=True),
        }
        module, prefix = trainer.model.network.module, trainer.model.family.lora_prefix
        weights, metadata = lora.weights(module), lora.adapter_metadata(module)
        written, _ = files.as_written(weights, metadata, prefix)

        def save_lora(folder: Path) -> None:
            files.save(folder, weights, header, prefix=prefix, adapter_metadata=metadata)

        average = trainer.optimizer.average

        def save_average(folder: Path) -> None:
            assert average is not None
            with average.applied():
                averaged = lora.weights(module)
            about = {**header, "alignprop.ema_decay": str(run.config.train.ema_decay)}
            files.save(folder, averaged, about, prefix=prefix, adapter_metadata=metadata)

        seen = trainer.step_number * trainer.settings.batch_size
        state = checkpoint.State(
            trainer.step_number,
            seen,
            trainer.optimizer.state(),
            skipped_in_row=trainer.finite.skipped_in_row,
            metrics=metrics_hash(run.folder, trainer.step_number),
            inputs=run.inputs,
            trained={n: value for n, value in weights.items() if written[n] is not value},
        )
        average_saver = None if average is None else save_average
        checkpoint.save(run.folder, state, save_lora, average_saver, name)

    def drop_old(self) -> None:
        """Delete the oldest checkpoints beyond `output.keep_last`; the newest has proven good."""
        if self._run.accelerator.is_main_process:
            checkpoint.drop_old(self._run.folder, self._run.config.output.keep_last)


class Progress(Callback):
    """Moves the progress bar and shows the smoothed rewards next to it."""

    def before_training(self, run: Run) -> None:
        """Show the bar, at the step where the run begins."""
        self._console = run.console
        self._smoothed: dict[str, float] = {}
        self._stack = ExitStack()
        self._bar = self._stack.enter_context(run.console.bar(run.config.train.steps, "training"))
        self._bar.advance(run.trainer.step_number)

    def after_step(self, record: StepRecord) -> None:
        """Advance the bar; warn if the gradient of the first step is exactly zero."""
        if record.skipped is not None:
            self._console.warn(f"step {record.step} is skipped: {record.skipped}")
        # Single steps differ by their prompts more than by what was learned: an exponential mean.
        for name, stats in record.rewards.items():
            past = self._smoothed.get(name, stats.mean)
            self._smoothed[name] = _SMOOTHING * past + (1.0 - _SMOOTHING) * stats.mean
        self._bar.advance(1, "  ".join(f"{n} {value:.4f}" for n, value in self._smoothed.items()))
        # B is zero at first, A is not: B's gradient is zero only if the rewards pass none on.
        if record.step == 1 and record.grad_norm == 0.0:
            self._console.warn(
                "the gradient of the first step is exactly 0: the rewards do not change with the "
                "images (do they round?), or their targets are reached"
            )

    def after_training(self) -> None:
        """Remove the bar."""
        self._stack.close()
