"""`alignprop soup`: mix LoRAs into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignprop_cli.commands import (
    DebugOption,
    JsonOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RewardOption,
    SetOption,
)
from alignprop_cli.commands.recipe import (
    Method,
    Recipe,
    check_recipe,
    default_name,
    member_shares,
    share_name,
    sweep_shares,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from alignprop_cli.adapter import Adapter, Located
    from alignprop_cli.config import Config
    from alignprop_cli.console import Console
    from alignprop_cli.soup import Mixed

CoefOption = Annotated[
    str | None,
    typer.Option(
        "--coef",
        help="share of A, B gets the rest; or one share for each member: 0.2,0.3,0.5; "
        "default: equal shares",
    ),
]

BASE = ("base", "stablediffusion")
"""What the base model is called as a member; a folder of that name is ./base."""


def soup(
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="MEMBER...",
            help="runs, checkpoints, LoRA files or folders, or base; MEMBER=0.7 gives its share",
        ),
    ],
    coef: CoefOption = None,
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
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="compare the mix with the base model right away")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", help="FROM:TO:STEP: a mix of A and B for each share of A, compared"
        ),
    ] = None,
    reward: RewardOption = None,
    model: ModelOption = None,
    sets: SetOption = None,
    images: Annotated[
        int | None, typer.Option("--images", "-n", min=1, help="pictures drawn with each mix")
    ] = None,
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

      alignprop soup runs/clip runs/brightness --sweep 0:1:0.25 --reward clip,brightness
    """
    from alignprop_cli.console import Console

    recipe = Recipe(method, rank, density, seed, allow_missing)
    check_recipe(recipe)
    shares = None if sweep is None else sweep_shares(sweep, members, coef)
    console, alone = Console(as_json=as_json, quiet=quiet), not evaluate and shares is None
    chosen = member_shares(members, coef)
    # Before anything is mixed.
    config = None if alone else _configuration(chosen[0], sets, reward, model, images)
    made = _make(console, chosen, recipe, shares, (output, overwrite), alone=alone)
    if config is not None:
        _compare(console, made, config)


def _make(
    console: Console,
    members: tuple[list[str], list[float]],
    recipe: Recipe,
    shares: list[float] | None,
    place: tuple[str | None, bool],
    *,
    alone: bool,
) -> dict[float | None, Path]:
    """Mix the members, once or for each share of a sweep.

    Args:
        console: For people and for the result.
        members: Names and coefficients.
        recipe: How they are mixed.
        shares: Of the first member, along a sweep; None is one mix with the coefficients.
        place: What the user said of the folder: its name, and whether it may be replaced.
        alone: Whether the mix is the result to print, or an evaluation will be.

    Returns:
        The folders of the mixes, by the share of the first member; None of one alone.
    """
    from pathlib import Path

    from alignprop_cli import adapter
    from alignprop_cli.commands.outputs import check_output
    from alignprop_cli.models.base import LORA_FILE

    (names, coefficients), (output, overwrite) = members, place
    located = _locate(names)
    labels = ["base" if found is None else found.label for found in located]
    suffix = [] if shares is None else ["sweep"]
    folder = Path(output or default_name(labels, coefficients, suffix)).expanduser()
    parts = [] if shares is None else [share_name(share) for share in shares]
    check_output(folder, overwrite=overwrite, ours=(LORA_FILE, "evaluation", *parts))
    adapters = [None if found is None else adapter.read(found.file) for found in located]
    if shares is not None:
        made: dict[float | None, Path] = {s: folder / share_name(s) for s in shares}
        for share in shares:
            _mix(made[share], names, adapters, [share, 1.0 - share], recipe)
        return made
    _tell(console, adapters, coefficients)
    values, lines = _mix(folder, names, adapters, coefficients, recipe)
    if alone:
        lines.append(f"next: alignprop evaluate {folder}")
        console.result("alignprop.soup/1", values, lines)
    else:
        for line in lines:
            console.note(line)
    return {None: folder}


def _locate(names: list[str]) -> list[Located | None]:
    """Return the LoRAs of the members; None is the base model."""
    from alignprop_cli import adapter
    from alignprop_cli.errors import ConfigError

    if all(name in BASE for name in names):
        raise ConfigError("soup: all members are the base model: there is nothing to mix")
    return [None if name in BASE else adapter.locate(name) for name in names]


def _configuration(
    names: list[str],
    sets: list[str] | None,
    reward: list[str] | None,
    model: str | None,
    images: int | None,
) -> Config:
    """Return what a mix of these members is evaluated with.

    Args:
        names: Of the members.
        sets: `--set` texts.
        reward: Those of `--reward`; None are those of the members.
        model: Of `--model`, likewise.
        images: Pictures drawn with each; None is what the members were evaluated with.
    """
    from alignprop_cli import adapter
    from alignprop_cli.commands.evaluate import configuration

    files = [found.file for found in _locate(names) if found is not None]
    header = _recorded((file, adapter.read_header(file)) for file in files)
    flags = {"model.id": ("--model", model), "eval.images": ("--images", images)}
    return configuration(str(files[0]), header, None, None, None, sets or [], reward, flags)


def _compare(
    console: Console,
    made: Mapping[float | None, Path],
    config: Config,
) -> None:
    """Evaluate mixes as `alignprop evaluate` does, and print its result.

    Args:
        console: For people and for the result.
        made: The folders of the mixes, by the share of the first member; None of one alone.
        config: Theirs.
    """
    from alignprop_cli import adapter
    from alignprop_cli.prompts import load_groups, load_prompts

    located = {share: adapter.locate(str(place)) for share, place in made.items()}
    first = next(iter(located.values()))
    prompts, groups = load_prompts(config.eval.prompts), load_groups(config.eval.prompts)

    from alignprop_cli.commands.evaluation import Variant, run_evaluation

    variants = [
        Variant("tuned" if share is None else share_name(share), found, at=share)
        for share, found in located.items()
    ]
    place = made.get(None, first.file.parent.parent)
    axis = "share of the first member"
    run_evaluation(config, console, variants, prompts, groups, place / "evaluation", axis=axis)


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


def _mix(
    folder: Path,
    names: list[str],
    adapters: list[Adapter | None],
    coefficients: list[float],
    recipe: Recipe,
) -> tuple[dict[str, Any], list[str]]:
    """Check the members, mix them, write the result, and return what there is to say of it."""
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
    return _describe(folder, made_of, mixed, recipe)


def _describe(
    folder: Path, members: list[dict[str, Any]], mixed: Mixed, recipe: Recipe
) -> tuple[dict[str, Any], list[str]]:
    """Return what was made, for programs and for people."""
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
    return values, lines


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

    return {
        "alignprop.version": __version__,
        "alignprop.merged_from": json.dumps(members),
        "alignprop.merged_by": json.dumps(asdict(recipe)),
        **_recorded((member.file, member.header) for member in adapters),
    }


def _recorded(members: Iterable[tuple[Path, Mapping[str, str]]]) -> dict[str, str]:
    """Return the base model of the members, by file and header, and how to draw with it."""
    import json

    from alignprop_cli.adapter import recorded_config

    found, header = list(members), dict[str, str]()
    for key in ("alignprop.base_model", "alignprop.base_fingerprint"):
        known = [texts[key] for _, texts in found if texts.get(key)]
        header |= {key: known[0]} if known else {}
    configs = [recorded_config(texts, file) for file, texts in found]
    config = next((c for c in configs if c is not None), None)
    if config is not None:
        # A soup was not trained, so only what evaluation needs stays true of it.
        kept = {k: config[k] for k in ("model", "sample", "reward", "loss", "eval") if k in config}
        header["alignprop.config"] = json.dumps(kept, sort_keys=True)
    return header
