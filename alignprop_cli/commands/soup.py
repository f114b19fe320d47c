"""`alignprop soup`: mix LoRAs into one."""

from __future__ import annotations

from typing import Annotated

import typer

from alignprop_cli.commands.options import (
    CoefOption,
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
from alignprop_cli.commands.places import Members
from alignprop_cli.commands.sharing import ExportOption, PushOption
from alignprop_cli.commands.trackers import LogWithOption, tracker_names

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
    export: ExportOption = None,
    push_to_hub: PushOption = None,
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

      alignprop soup runs/clip --export comfyui

      alignprop soup runs/clip runs/brightness --sweep 0:1:0.25 --reward clip,brightness
    """
    # Only now, so that --help is quick.
    from alignprop_cli.commands.bodies import soup as body
    from alignprop_cli.console import Console
    from alignprop_cli.lora.recipe import Recipe

    body.soup(
        Console(as_json=as_json, quiet=quiet),
        members,
        recipe=Recipe(method, rank, density, seed, allow_missing, file_format),
        coef=coef,
        evaluate=evaluate,
        sweep=sweep,
        reward=reward,
        model=model,
        sets=sets,
        images=images,
        output=output,
        overwrite=overwrite,
        log_with=tracker_names(log_with, used=evaluate or sweep is not None),
        export=export,
        push_to_hub=push_to_hub,
    )
