"""What `alignprop train` prints instead of training: the presets, or a whole configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from alignprop_cli.config.schema import Config
    from alignprop_cli.console import Console

ListOption = Annotated[
    bool, typer.Option("--list-presets", help="list the shipped presets and stop")
]


def show(config: Config, console: Console) -> None:
    """Print a complete configuration."""
    from alignprop_cli.config.schema import dump

    # As YAML for people, which --config reads back.
    values = {"config": config.model_dump(mode="json")}
    console.result("alignprop.config/1", values, [dump(config).rstrip()])


def list_shipped(console: Console) -> None:
    """Print the shipped presets, each with the first comment line of its file."""
    from alignprop_cli.config import presets
    from alignprop_cli.console import table

    rows = [(name, presets.summary(name)) for name in presets.names()]
    listing = table("Presets", ("name", "what it does"), rows, numbers=False)
    console.result("alignprop.presets/1", {"presets": dict(rows)}, [listing])
