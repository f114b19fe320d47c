"""What commands share: options, how their texts are read, and where results may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from alignprop_cli.commands import completion
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora.recipe import Format, Method

# Typer's options as types, so that an option has the same name and help in every command. Help
# texts are phrases that begin in lower case.
JsonOption = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no notes")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show tracebacks and library warnings")]
# What a configuration is made of.
PresetOption = Annotated[
    str | None,
    typer.Option(
        *("--preset", "-p"),
        help="shipped preset, see train --list-presets",
        autocompletion=completion.preset_names,
    ),
]
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of your own")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, dotted, repeatable: train.steps=40")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="tiny, a local folder or file, or a hub id")
]
# Where the result goes.
OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="folder or file to write")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="replace what is already at --output")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="seed of all random numbers")]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        *("--reward", "-r"),
        help="reward to measure, repeatable or with commas",
        autocompletion=completion.rewards,
    ),
]

EmaOption = Annotated[
    bool, typer.Option("--ema", help="the average of the weights (train.ema_decay), not the last")
]

_HINT = "choose another place with --output, or give --overwrite"

# How the members of a soup are mixed.
CoefOption = Annotated[
    str | None,
    typer.Option(
        "--coef",
        help="share of A, B gets the rest; or one share for each member: 0.2,0.3,0.5; "
        "default: equal shares",
    ),
]
MethodOption = Annotated[Method, typer.Option("--method", help="how the members are mixed")]
RankOption = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="rank of svd, ties, dare_linear; default: the largest"),
]
DensityOption = Annotated[
    float | None,
    typer.Option("--density", help="share of values that ties, dare_linear keep; default 0.5"),
]
MixSeedOption = Annotated[int, typer.Option("--seed", min=0, help="of dare_linear")]
MissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="mix LoRAs that change different layers")
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="of the file: diffusers' names, or ComfyUI's and A1111's")
]


def split_names(values: Sequence[str] | None, option: str) -> list[str]:
    """Return the names of a repeatable option, split at commas, each once.

    Raises:
        ConfigError: If one is not UTF-8, and so can be written nowhere.
    """
    # "clip, hps" in quotes is as common as clip,hps, so blanks are dropped.
    parts = [part.strip() for value in values or () for part in value.split(",")]
    for part in parts:
        # Arguments that are not UTF-8 reach Python as halves of surrogate pairs.
        if any("\ud800" <= c <= "\udfff" for c in part):
            raise ConfigError(f"{option}: {part}: is not UTF-8")
    return list(dict.fromkeys(part for part in parts if part))


def reward_weights(values: Sequence[str] | None) -> dict[str, float | None]:
    """Return the weight of each reward given as NAME or NAME:WEIGHT; None for NAME alone.

    Raises:
        ConfigError: If a name comes twice.
    """
    found: dict[str, float | None] = {}
    for text in split_names(values, "--reward"):
        name, _, last = text.rpartition(":")
        try:
            # In file.py:attribute the last part is no weight, even if it is called nan or inf.
            weight = float(last) if name and not last.isidentifier() else None
        except ValueError:
            weight = None
        name = name if weight is not None else text
        if name in found:
            raise ConfigError(f"--reward: {name} is given twice")
        found[name] = weight
    return found


def check_output_file(file: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file, unless asked to.

    Raises:
        ConfigError: If it is a folder, a pipe or a device, or exists without `overwrite`.
    """
    if file.exists() and not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or a device"
        raise ConfigError(f"--output: {file} is {kind}, expected a file", hint=_HINT)
    if file.exists() and not overwrite:
        raise ConfigError(f"--output: {file} exists", hint=_HINT)


def make_parent(file: Path) -> None:
    """Make the folder that a file goes into.

    Raises:
        ConfigError: If it cannot be made or written to.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {file.parent} cannot be made: {error}", hint=_HINT) from error
    # Better now than after hours of measuring.
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"--output: {file.parent} cannot be written to", hint=_HINT)
