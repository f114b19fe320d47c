"""Options and arguments that name runs, checkpoints and LoRAs, completed by the shell."""

from __future__ import annotations

from typing import Annotated

import typer

from alignprop_cli.commands import completion

Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="runs, checkpoints, LoRA files or folders, or base",
        autocompletion=completion.targets,
    ),
]
Members = Annotated[
    list[str],
    typer.Argument(
        metavar="MEMBER...",
        help="runs, checkpoints, LoRA files or folders, or base; MEMBER=0.7 gives its share",
        autocompletion=completion.targets,
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="of the runs: best, or a step such as 40; default: newest",
        autocompletion=completion.checkpoints,
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        help="run folder to resume, or auto: the newest, else a new one",
        autocompletion=completion.resumable,
    ),
]
BackToOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="with --resume: go back to best, or to a step such as 40",
        autocompletion=completion.checkpoints,
    ),
]
