"""`alignprop soup`: mix LoRAs into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_cli.commands.options import (
    DebugOption,
    DensityOption,
    FormatOption,
    JsonOption,
    MethodOption,
    MissingOption,
    MixSeedOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RankOption,
    RewardOption,
    SetOption,
)
from alignprop_cli.commands.output import EVALUATION, claimed
from alignprop_cli.commands.places import Members
from alignprop_cli.commands.trackers import LogWithOption, tracker_names
from alignprop_cli.lora.recipe import Recipe, check_recipe, member_shares, sweep_shares

if TYPE_CHECKING:
    from alignprop_cli.config.schema import Config
    from alignprop_cli.console import Console
    from alignprop_cli.lora.soup import Soup

CoefOption = Annotated[
    str | None,
    typer.Option(
        "--coef",
        help="share of A, B gets the rest; or one share for each member: 0.2,0.3,0.5; "
        "default: equal shares",
    ),
]
EvaluateOption = Annotated[
    bool, typer.Option("--evaluate", help="compare the mix with the base model right away")
]
SweepOption = Annotated[
    str | None,
    typer.Option("--sweep", help="FROM:TO:STEP: one mix for each share of A, compared"),
]
ImagesOption = Annotated[
    int | None, typer.Option("--images", "-n", min=1, help="images sampled with each mix")
]


def soup(
    members: Members,
    coef: CoefOption = None,
    method: MethodOption = "exact",
    rank: RankOption = None,
    density: DensityOption = None,
    seed: MixSeedOption = 0,
    allow_missing: MissingOption = False,
    file_format: FormatOption = "diffusers",
    evaluate: EvaluateOption = False,
    sweep: SweepOption = None,
    reward: RewardOption = None,
    model: ModelOption = None,
    sets: SetOption = None,
    images: ImagesOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    log_with: LogWithOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Mix LoRAs into one: each weight changes by the members' changes, each times its share.

    The mix is exact; its rank is the sum of the members' ranks. With `base` as a member the others
    get a lower strength. Shares may be negative and need not add up to 1.

    Other methods: svd brings the exact mix back to a rank and says what is lost; ties and
    dare_linear prune the changes first; factor averages the two factors of every change one by
    one, which is another model than the average of the changes.

    Examples:

      alignprop soup runs/clip runs/brightness --coef 0.7

      alignprop soup runs/clip base --coef 0.5 --output runs/clip-half

      alignprop soup runs/clip --format comfyui

      alignprop soup runs/clip runs/brightness --sweep 0:1:0.25 --reward clip,brightness
    """
    from alignprop_cli.commands import settings
    from alignprop_cli.console import Console

    # 1. Everything on the command line is checked before a file is read.
    recipe = Recipe(method, rank, density, seed, allow_missing, file_format)
    check_recipe(recipe)
    shares = None if sweep is None else sweep_shares(sweep, members, coef)
    names, coefficients = member_shares(members, coef)
    trackers = tracker_names(log_with, used=evaluate or shares is not None)
    from alignprop_cli.lora.soup import prepare

    # 2. The members are read and checked, and the configuration they record; nothing is written.
    made = prepare(names, coefficients, shares, output, recipe)
    with claimed(made.folder, overwrite=overwrite, ours=made.contents(EVALUATION)):
        config, console = None, Console(as_json=as_json, quiet=quiet)
        if evaluate or shares is not None:
            flags = {"model.id": model, "eval.images": images, "tracking.log_with": trackers}
            config = settings.for_soup(made, sets=sets, reward=reward, flags=flags)
        _make(console, made, config, replace=overwrite)


def _make(console: Console, soup: Soup, config: Config | None, *, replace: bool) -> None:
    """Make the mixes; print what was made or, with a `config`, evaluate them."""
    from alignprop_cli.commands import settings
    from alignprop_cli.lora.files import locate

    for text in soup.left_out:
        console.warn(text)
    for text in soup.remarks:
        console.note(text)
    values, lines = soup.make(replace=replace)
    if config is None:
        lines.append(f"next: {settings.evaluate_command(soup.folder, soup.header)}")
        console.result("alignprop.soup/1", values, lines)
        return
    for line in lines:  # with --evaluate the result is that of the evaluation
        console.note(line)
    from alignprop_cli.evaluation.run import Variant, run_evaluation

    mixes = [
        Variant("tuned" if m.share is None else m.folder.name, locate(str(m.folder)), at=m.share)
        for m in soup.mixes
    ]
    folder, axis = soup.folder / "evaluation", "share of the first member"
    run_evaluation(config, console, mixes, folder, replace=replace, axis=axis)
