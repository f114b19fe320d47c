"""A run's report without its training: the callback is real, what it is told is made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from alignprop_cli.config.validation import parse
from alignprop_cli.console import Console
from alignprop_cli.estimators import last_k
from alignprop_cli.evaluation.draw import Sample, Samples
from alignprop_cli.evaluation.measures import measure
from alignprop_cli.training.guard import Verdict
from alignprop_cli.training.record import RewardStats, StepRecord
from alignprop_cli.training.report import Outcome, Report
from alignprop_cli.training.resume import read_metrics

REWARDS = ("clip", "brightness")


def images(seed: int, prompts: list[str], px: int = 48, shift: float = 0.0) -> Samples:
    """Return samples of coloured noise with made up rewards."""
    rng = np.random.default_rng(seed)
    # Large squares of colour, as thumbnails of photographs compress.
    colours = rng.integers(0, 256, (len(prompts), 4, 4, 3), dtype=np.uint8)
    shown = colours.repeat(px // 4, axis=1).repeat(px // 4, axis=2)
    return Samples(
        tuple(Sample(prompt, i) for i, prompt in enumerate(prompts)),
        shown,
        {name: rng.normal(shift, 0.1, len(prompts)) for name in REWARDS},
    )


class Reported:
    """A run of which only the report is real.

    Args:
        folder: The run folder, which is made.
        prompts: Of its fixed samples.
        steps: Steps that it is to have.
        px: Height and width of its images.
    """

    def __init__(self, folder: Path, prompts: list[str], steps: int = 6, px: int = 48) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prompts, self.px = folder, prompts, px
        config = parse(
            {
                "reward": {"clip": {}},
                "eval": {"rewards": {"brightness": {}}},
                "train": {"steps": steps},
            }
        )
        self.trainer = SimpleNamespace(
            step_number=0,
            settings=SimpleNamespace(estimator=last_k(2)),
            schedule=SimpleNamespace(prediction_type="epsilon"),
            plan=SimpleNamespace(describe=lambda: "8 images a step = 1 micro-batch of 8"),
            model=SimpleNamespace(network=SimpleNamespace(module=torch.nn.Linear(2, 2))),
        )
        self.run: Any = SimpleNamespace(
            config=config,
            folder=folder,
            trainer=self.trainer,
            accelerator=SimpleNamespace(
                is_main_process=True, num_processes=1, device=torch.device("cpu")
            ),
            console=Console(quiet=True),
            sampled=images(0, prompts, px),
        )
        self.samples: Any = SimpleNamespace(base=measure(self.run.sampled), now=None)
        self.guard: Any = SimpleNamespace(verdict=self._verdict)
        self.report = Report(self.samples, self.guard)

    def _verdict(self) -> Verdict:
        best = 2 if self.trainer.step_number >= 2 else None
        return Verdict(self.trainer.step_number, False, "", best)

    @property
    def file(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    def without_samples(self) -> None:
        """Let it be a run with `eval.every` 0."""
        self.run.sampled, self.samples.base = None, {}

    def begin(self) -> None:
        """Call the report as before the first step, or as a resumed run does."""
        lines = read_metrics(self.folder)
        self.trainer.step_number = lines[-1]["step"] if lines else 0
        self.report.before_training(self.run)

    def step(self, *, sampled: bool, **changes: Any) -> None:
        """Do one step, with samples after it or without."""
        self.trainer.step_number += 1
        step = self.trainer.step_number
        record = StepRecord(
            step=step,
            images_seen=8 * step,
            loss=-0.8 - 0.01 * step,
            rewards={"clip": RewardStats(0.8 + 0.01 * step, 0.1)},
            grad_norm=0.5 / step,
            lora_norm=1.0 + 0.1 * step,
            learning_rate=1e-3,
            backprop_steps=1.0 + step % 3,
            path_share=0.1 + 0.1 * (step % 3),
            seconds=1.0 + 0.01 * step,
            peak_memory_gib=1.5,
        )
        self.samples.now = None
        if sampled:
            self.run.sampled = images(step, self.prompts, self.px, 0.02 * step)
            self.samples.now = measure(self.run.sampled)
            record.held_out = {name: q.mean for name, q in self.samples.now.items()}
            record.guard = {"alarms": [], "merit": 0.1, "changes": {}}
        for name, value in changes.items():
            setattr(record, name, value)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.line()) + "\n")
        self.report.after_step(record)

    def finish(self) -> None:
        """End the run as `summary.finish` does."""
        self.report.after_training()
        base, tuned = (images(s, self.prompts, self.px, s / 50) for s in (100, 101))
        columns = ("", "base", "tuned", "difference", "95 % interval")
        rows = [(name, "0.1", "0.2", "+0.1", "+0.05 to +0.15") for name in REWARDS]
        self.report.finish(
            Outcome("held-out samples", columns, rows, base, tuned, ("base", "tuned"), 100.0)
        )
