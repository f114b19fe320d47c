"""Drawing for an evaluation, with a progress bar; shared by `train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from alignprop_cli import evaluator
from alignprop_cli.config import Config
from alignprop_cli.console import Console
from alignprop_cli.evaluator import Drawn, Picture
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.rewards.composite import Mixture


def draw(
    config: Config,
    console: Console,
    model: DiffusionModel,
    mixture: Mixture,
    pictures: Sequence[Picture],
    label: str,
) -> Drawn:
    """Draw and measure pictures as the `sample` and `eval` sections say.

    Raises:
        ConfigError, RunError: As `evaluator.draw`.
    """
    with console.bar(len(pictures), label) as bar:
        done = 0

        def on_batch(now: int) -> None:
            nonlocal done
            bar.advance(now - done)
            done = now

        return evaluator.draw(
            model,
            pictures,
            mixture,
            config.sample,
            seed=config.eval.seed,
            batch_size=config.eval.batch_size,
            on_batch=on_batch,
        )
