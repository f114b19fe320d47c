"""Drawing for an evaluation, with a progress bar; shared by `train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.evaluation import draw as evaluator
from alignprop_cli.evaluation.draw import Drawn, Picture
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.models.compiled import uncompiled
from alignprop_cli.rewards.mixture import Mixture


def draw(
    config: Config,
    console: Console,
    model: DiffusionModel,
    mixture: Mixture,
    pictures: Sequence[Picture],
    label: str,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Drawn:
    """Draw and measure pictures as the `sample` and `eval` sections say.

    Several processes draw a share each, and all get all pictures.

    Raises:
        ConfigError, RunError: As `evaluator.draw`.
    """
    state = PartialState()
    # More processes than pictures: some draw one twice, rather than none.
    mine = list(range(state.process_index, len(pictures), state.num_processes)) or [0]
    with console.bar(len(mine), label) as bar:
        done = 0

        def on_batch(now: int) -> None:
            nonlocal done
            bar.advance(now - done)
            done = now

        with uncompiled(model.network):
            drawn = evaluator.draw(
                model,
                [pictures[i] for i in mine],
                mixture,
                config.sample,
                seed=config.eval.seed,
                batch_size=config.eval.batch_size,
                features=features,
                on_batch=on_batch,
            )
    if state.num_processes == 1:
        return drawn
    shares: list[tuple[list[int], Drawn]] = gather_object([(mine, drawn)])
    return _join(pictures, shares)


def _join(pictures: Sequence[Picture], shares: Sequence[tuple[list[int], Drawn]]) -> Drawn:
    """Return the pictures of all processes in their order."""
    numbers = np.concatenate([mine for mine, _ in shares])
    _, order = np.unique(numbers, return_index=True)
    parts = [drawn for _, drawn in shares]
    features = [part.features for part in parts if part.features is not None]
    return Drawn(
        tuple(pictures),
        np.concatenate([part.images for part in parts])[order],
        {
            name: np.concatenate([part.rewards[name] for part in parts])[order]
            for name in parts[0].rewards
        },
        np.concatenate(features)[order] if features else None,
    )
