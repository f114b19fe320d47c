"""`alignprop soup`: mix LoRAs into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    from alignprop_cli.soup import Mixed

BASE = ("base", "stablediffusion")
"""What the base model is called as a member; a folder of that name is ./base."""

Method = Literal["exact", "factor", "svd", "ties", "dare_linear"]


@dataclass(frozen=True)
class Recipe:
    """How members are mixed; see `alignprop_cli.soup.mix`."""

    method: Method = "exact"
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    allow_missing: bool = False


def soup(
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="MEMBER...",
            help="runs, checkpoints, LoRA files or folders, or base; MEMBER=0.7 gives its share",
        ),
    ],
    coef: Annotated[
        str | None,
        typer.Option(
            "--coef",
            help="share of A, B gets the rest; or one share for each member: 0.2,0.3,0.5; "
            "default: equal shares",
        ),
    ] = None,
    method: Annotated[Method, typer.Option("--method", help="how the members are mixed")] = "exact",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, help="of the result; for svd, ties, dare_linear; default: the largest"
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="share of values that ties, dare_linear keep; default 0.5"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of dare_linear")] = 0,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="mix LoRAs that change different layers"),
    ] = False,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Mix LoRAs into one: the sum of the members' changes of every weight, each times its share.

    The mix is exact; its rank is the sum of the members' ranks. With `base` as a member it is the
    others at a lower strength. Shares may be negative and need not add up to 1.

    Other methods: svd brings the exact mix back to a rank and says what is lost; ties and
    dare_linear prune the changes first; factor averages the two factors of every change one by
    one, which is another model than the average of the changes.

    Examples:

      alignprop soup runs/clip runs/brightness --coef 0.7

      alignprop soup runs/clip base --coef 0.5 --output runs/clip-half

      alignprop soup runs/clip=0.5 runs/brightness=0.3 runs/contrast=0.4 --method svd --rank 8
    """
    from pathlib import Path

    from alignprop_cli import adapter
    from alignprop_cli.commands.outputs import check_output
    from alignprop_cli.console import Console
    from alignprop_cli.errors import ConfigError
    from alignprop_cli.models.base import LORA_FILE

    console = Console(as_json=as_json, quiet=quiet)
    recipe = Recipe(method, rank, density, seed, allow_missing)
    _check_recipe(recipe)
    names, coefficients = _shares(members, coef)
    if all(name in BASE for name in names):
        raise ConfigError("soup: all members are the base model: there is nothing to mix")
    located = [None if name in BASE else adapter.locate(name) for name in names]
    labels = ["base" if found is None else found.label for found in located]
    folder = Path(output or _default_name(labels, coefficients)).expanduser()
    check_output(folder, overwrite=overwrite, ours=(LORA_FILE,))
    adapters = [None if found is None else adapter.read(found.file) for found in located]
    _tell(console, adapters, coefficients)
    _mix(console, folder, names, adapters, coefficients, recipe)


def _tell(console: Console, adapters: list[Adapter | None], coefficients: list[float]) -> None:
    """Say what is unusual about the members and their shares."""
    if (total := sum(coefficients)) < 0.999 or total > 1.001:
        console.note(f"the shares add up to {total:g}: the mix is not an average")
    elif min(coefficients) < 0.0:
        console.note("a share is negative: this goes on beyond a member")
    for member in adapters:
        if member is not None and member.left_out:
            console.warn(
                f"{member.file}: its {member.left_out} layers of the text encoder are left out"
            )


def _check_recipe(recipe: Recipe) -> None:
    """Refuse options that the method does not have.

    Raises:
        ConfigError: Names the option and the methods that have it.
    """
    from alignprop_cli.errors import ConfigError

    ranked = ("svd", "ties", "dare_linear")
    if recipe.rank is not None and recipe.method not in ranked:
        raise ConfigError(
            f"--rank: method {recipe.method} has no choice of rank",
            hint=f"--rank goes with --method {', '.join(ranked)}",
        )
    if recipe.density is None:
        return
    if recipe.method not in ranked[1:]:
        raise ConfigError(
            f"--density: method {recipe.method} prunes nothing",
            hint=f"--density goes with --method {', '.join(ranked[1:])}",
        )
    if not 0.0 < recipe.density <= 1.0:
        raise ConfigError(f"--density: expected more than 0 and at most 1, got {recipe.density:g}")


def _shares(members: list[str], coef: str | None) -> tuple[list[str], list[float]]:
    """Return the members' names and coefficients.

    Raises:
        ConfigError: If they do not go together, or one is not a finite number.
    """
    from pathlib import Path

    from alignprop_cli.errors import ConfigError

    names: list[str] = []
    given: list[float | None] = []
    for member in members:
        name, sign, share = member.rpartition("=")
        # A path may have an equals sign of its own.
        plain = not sign or Path(member).expanduser().exists()
        names.append(member if plain else name)
        given.append(None if plain else _number(share, member))
    own = [share for share in given if share is not None]
    if own and len(own) < len(names):
        raise ConfigError(
            f"soup: {len(own)} of {len(names)} members have a share",
            hint="give every member one: A=0.7 B=0.3",
        )
    if own and coef is not None:
        raise ConfigError("soup: shares are given twice, by --coef and by MEMBER=SHARE")
    if own:
        return names, own
    if coef is None:
        return names, [1.0 / len(names)] * len(names)
    shares = [_number(text, f"--coef {coef}") for text in coef.split(",")]
    if len(shares) == 1 and len(names) == 2:
        shares.append(1.0 - shares[0])
    if len(shares) != len(names):
        raise ConfigError(
            f"--coef: {len(shares)} shares for {len(names)} members",
            hint="give one for each, such as --coef 0.2,0.3,0.5; one alone goes with two members",
        )
    return names, shares


def _number(text: str, where: str) -> float:
    import math

    from alignprop_cli.errors import ConfigError

    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, got '{text}'")
    return number


def _default_name(labels: list[str], coefficients: list[float]) -> str:
    """Return soup-<label>-<share>-... for the folder; of two members only the first's share."""
    if len(labels) == 2 and abs(sum(coefficients) - 1.0) < 1e-9:
        return f"soup-{labels[0]}-{labels[1]}-{coefficients[0]:g}"
    pairs = zip(labels, coefficients, strict=True)
    return "-".join(["soup", *(f"{label}-{share:g}" for label, share in pairs)])[:200]


def _mix(
    console: Console,
    folder: Path,
    names: list[str],
    adapters: list[Adapter | None],
    coefficients: list[float],
    recipe: Recipe,
) -> None:
    """Check the members, mix them, write the result and print it."""
    from alignprop_cli import adapter, checkpoint
    from alignprop_cli import soup as maths
    from alignprop_cli.errors import ConfigError

    present = [(a, c) for a, c in zip(adapters, coefficients, strict=True) if a is not None]
    _check_members([a for a, _ in present], allow_missing=recipe.allow_missing)
    try:
        mixed = maths.mix(
            [a.layers for a, _ in present],
            [c for _, c in present],
            recipe.method,
            rank=recipe.rank,
            density=0.5 if recipe.density is None else recipe.density,
            seed=recipe.seed,
        )
    except ValueError as error:
        raise ConfigError(f"soup: {error}", hint="the default method, exact, mixes any") from error
    made_of = [
        {"name": name, "sha256": a.sha256 if a else None, "coefficient": c}
        for name, a, c in zip(names, adapters, coefficients, strict=True)
    ]
    header = _header([a for a, _ in present], made_of, recipe)
    checkpoint.write_whole(folder, lambda made: adapter.write(made, mixed.layers, header))
    _print(console, folder, made_of, mixed, recipe)


def _print(
    console: Console, folder: Path, members: list[dict[str, Any]], mixed: Mixed, recipe: Recipe
) -> None:
    """Print what was made, for people or for programs."""
    from alignprop_cli import adapter
    from alignprop_cli.models.base import LORA_FILE

    file = folder / LORA_FILE
    ranks = sorted({factors.rank for factors in mixed.layers.values()})
    values: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "adapter": str(file.resolve()),
        "sha256": adapter.sha256(file),
        "members": members,
        "method": recipe.method,
        "error": mixed.error,
        "layers": len(mixed.layers),
        "ranks": ranks,
        "bytes": file.stat().st_size,
    }
    rank = " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))
    made_of = " + ".join(f"{m['coefficient']:g} x {m['name']}" for m in members)
    lines = [
        f"soup     {made_of}",
        f"adapter  {file}",
        f"{len(mixed.layers)} layers of rank {rank}, {file.stat().st_size / 2**20:.2f} MiB",
    ]
    if recipe.method in ("svd", "ties", "dare_linear"):
        lines.append(f"the rank leaves out {mixed.error:.2%} of the mix (relative L2 distance)")
    lines.append(f"next: alignprop evaluate {folder}")
    console.result("alignprop.soup/1", values, lines)


def _check_members(adapters: list[Adapter], *, allow_missing: bool) -> None:
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
        difference = maths.other_shape(first.layers, other.layers)
        if difference:
            raise ConfigError(
                f"{other.file}: {difference}", hint="members need the same base model"
            )
        lacking = maths.missing(first.layers, other.layers)
        if lacking and not allow_missing:
            raise ConfigError(
                f"{other.file}: {lacking}",
                hint="they were trained with other lora.target_modules; with --allow-missing a "
                "member changes nothing in a layer that it lacks",
            )


def _header(
    adapters: list[Adapter], members: list[dict[str, Any]], recipe: Recipe
) -> dict[str, str]:
    """Return what the result says of itself: its members, and how to draw with it."""
    import json
    from dataclasses import asdict

    from alignprop_cli import __version__
    from alignprop_cli.adapter import recorded_config

    header = {
        "alignprop.version": __version__,
        "alignprop.merged_from": json.dumps(members),
        "alignprop.merged_by": json.dumps(asdict(recipe)),
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
