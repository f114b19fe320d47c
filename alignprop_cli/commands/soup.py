"""`alignprop soup`: mix two LoRAs into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignprop_cli.commands import (
    DebugOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
)

if TYPE_CHECKING:
    from pathlib import Path

    from alignprop_cli.adapter import Adapter
    from alignprop_cli.console import Console

BASE = ("base", "stablediffusion")
"""What the base model is called as a member; a folder of that name is ./base."""


def soup(
    first: Annotated[
        str, typer.Argument(metavar="A", help="run, checkpoint, LoRA file or folder, or base")
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="run, checkpoint, LoRA file or folder, or base")
    ],
    coef: Annotated[
        float, typer.Option("--coef", help="share of A; B gets 1 - coef; may be outside 0 to 1")
    ] = 0.5,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Mix two LoRAs into one: coef times A's change of every weight plus (1 - coef) times B's.

    The mix is exact; its rank is the sum of the members' ranks. With `base` as a member it is the
    other one at a lower strength.

    Examples:

      alignprop soup runs/clip runs/brightness --coef 0.7

      alignprop soup runs/clip base --coef 0.5 --output runs/clip-half
    """
    import math
    from pathlib import Path

    from alignprop_cli import adapter
    from alignprop_cli.commands.outputs import check_output
    from alignprop_cli.console import Console
    from alignprop_cli.errors import ConfigError
    from alignprop_cli.models.base import LORA_FILE

    console = Console(as_json=as_json, quiet=quiet)
    if not math.isfinite(coef):
        raise ConfigError(f"--coef: expected a finite number, got {coef}")
    names, coefficients = (first, second), (coef, 1.0 - coef)
    if all(name in BASE for name in names):
        raise ConfigError("soup: A and B are both the base model: there is nothing to mix")
    located = [None if name in BASE else adapter.locate(name) for name in names]
    labels = ["base" if found is None else found.label for found in located]
    folder = Path(output or f"soup-{labels[0]}-{labels[1]}-{coef:g}").expanduser()
    check_output(folder, overwrite=overwrite, ours=(LORA_FILE,))
    if not 0.0 <= coef <= 1.0:
        console.note(f"--coef {coef:g} is outside 0 to 1: this goes on beyond a member")
    adapters = [None if found is None else adapter.read(found.file) for found in located]
    _mix(console, folder, names, adapters, coefficients)


def _mix(
    console: Console,
    folder: Path,
    names: tuple[str, str],
    adapters: list[Adapter | None],
    coefficients: tuple[float, float],
) -> None:
    """Check the members, mix them, write the result and print it."""
    from alignprop_cli import adapter, checkpoint
    from alignprop_cli import soup as maths

    present = [(a, c) for a, c in zip(adapters, coefficients, strict=True) if a is not None]
    _check_members([a for a, _ in present])
    mixed = maths.mix([a.layers for a, _ in present], [c for _, c in present])
    members = [
        {"name": name, "sha256": a.sha256 if a else None, "coefficient": c}
        for name, a, c in zip(names, adapters, coefficients, strict=True)
    ]
    header = _header([a for a, _ in present], members)
    checkpoint.write_whole(folder, lambda made: adapter.write(made, mixed, header))
    file = folder / checkpoint.LORA_FILE
    ranks = sorted({factors.rank for factors in mixed.values()})
    values: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "adapter": str(file.resolve()),
        "sha256": adapter.sha256(file),
        "members": members,
        "layers": len(mixed),
        "ranks": ranks,
        "bytes": file.stat().st_size,
    }
    rank = " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))
    recipe = " + ".join(f"{m['coefficient']:g} x {m['name']}" for m in members)
    lines = [
        f"soup     {recipe}",
        f"adapter  {file}",
        f"{len(mixed)} layers of rank {rank}, {file.stat().st_size / 2**20:.2f} MiB",
        f"next: alignprop evaluate {folder}",
    ]
    console.result("alignprop.soup/1", values, lines)


def _check_members(adapters: list[Adapter]) -> None:
    """Refuse members of different base models, of different layers, or with damaged weights.

    Raises:
        ConfigError: If they do not belong together.
        RunError: If weights are not finite.
    """
    from alignprop_cli import soup as maths
    from alignprop_cli.errors import ConfigError, RunError

    for member in adapters:
        damage = maths.not_finite(member.layers)
        if damage:
            raise RunError(f"{member.file}: {damage}", hint="use an earlier checkpoint")
    first = adapters[0]
    for other in adapters[1:]:
        key = "alignprop.base_fingerprint"
        prints = [a.header.get(key) for a in (first, other)]
        if all(prints) and prints[0] != prints[1]:
            models = [a.header.get("alignprop.base_model", "unknown") for a in (first, other)]
            raise ConfigError(
                f"soup: different base models: {first.file} belongs to {models[0]}, "
                f"{other.file} to {models[1]}",
                hint="only LoRAs of the same base model can be mixed",
            )
        difference = maths.mismatch(first.layers, other.layers)
        if difference:
            raise ConfigError(
                f"{other.file}: {difference}",
                hint="members need the same base model and the same lora.target_modules",
            )


def _header(adapters: list[Adapter], members: list[dict[str, Any]]) -> dict[str, str]:
    """Return what the result says of itself: its members, and how to draw with it."""
    import json

    from alignprop_cli import __version__
    from alignprop_cli.adapter import recorded_config

    header = {
        "alignprop.version": __version__,
        "alignprop.merged_from": json.dumps(members),
    }
    for key in ("alignprop.base_model", "alignprop.base_fingerprint"):
        known = [a.header[key] for a in adapters if a.header.get(key)]
        header |= {key: known[0]} if known else {}
    configs = [recorded_config(a.header, a.file) for a in adapters]
    config = next((c for c in configs if c is not None), None)
    if config is not None:
        # A soup was not trained, so only what evaluation needs stays true of it.
        kept = {k: config[k] for k in ("model", "sample", "reward", "loss", "eval") if k in config}
        header["alignprop.config"] = json.dumps(kept, sort_keys=True)
    return header
