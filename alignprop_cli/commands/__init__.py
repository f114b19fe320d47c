"""The four commands, each thin: read, build, run, report. Heavy imports happen inside them."""

from typing import Annotated

import typer

JsonOption = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no notes")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show tracebacks and library warnings")]
PresetOption = Annotated[
    str | None, typer.Option("--preset", "-p", help="shipped preset, see train --list-presets")
]
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of your own")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, dotted, repeatable: train.steps=40")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="tiny, a local folder or file, or a hub id")
]
OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="folder or file to write")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="replace what is already at --output")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="of all random numbers")]
RewardOption = Annotated[
    list[str] | None,
    typer.Option("--reward", "-r", help="reward to measure, repeatable or with commas"),
]
