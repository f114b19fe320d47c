"""The parts of one training run, as its commands pass them to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.evaluation.draw import Picture
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.training.trainer import Trainer


@dataclass
class Session:
    """The parts of one run."""

    config: Config
    run: Path
    trainer: Trainer
    model: DiffusionModel
    mixture: Mixture
    accelerator: Accelerator
    console: Console
    held_out: list[Picture]
    samples: list[Picture]
