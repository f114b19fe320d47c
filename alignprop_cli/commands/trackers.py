"""The option `--log-with`, which names experiment trackers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from alignprop_cli.commands import completion
from alignprop_cli.commands.options import split_names
from alignprop_cli.errors import ConfigError

LogWithOption = Annotated[
    list[str] | None,
    typer.Option(
        "--log-with",
        help="trackers, with commas: tensorboard, wandb, trackio, mlflow, swanlab",
        autocompletion=completion.trackers,
    ),
]


def tracker_names(values: Sequence[str] | None, *, used: bool = True) -> list[str] | None:
    """Return the names of `--log-with`; None where it is not given.

    Raises:
        ConfigError: If it is given where there is nothing to tell.
    """
    if values is not None and not used:
        raise ConfigError("--log-with goes with --evaluate or --sweep")
    return None if values is None else split_names(values, "--log-with")
