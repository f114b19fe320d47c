"""`alignprop evaluate`: compare LoRAs with the base model on the same prompts and noise."""

from __future__ import annotations

from typing import Annotated

import typer

from alignprop_cli.commands.layouts import LayoutOption
from alignprop_cli.commands.options import (
    ConfigOption,
    DebugOption,
    EmaOption,
    JsonOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    PresetOption,
    QuietOption,
    RewardOption,
    SeedOption,
    SetOption,
)
from alignprop_cli.commands.places import CheckpointOption, Targets
from alignprop_cli.commands.sharing import ExportOption
from alignprop_cli.commands.strengths import BaseUntilOption, ScaleOption
from alignprop_cli.commands.trackers import LogWithOption, tracker_names

PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", help="prompt set, or .txt, .jsonl, .json, .csv, .tsv file"),
]
ImagesOption = Annotated[
    int | None, typer.Option("--images", "-n", min=1, help="images sampled with each model")
]
PerPromptOption = Annotated[
    int | None, typer.Option("--images-per-prompt", min=1, help="of these, images of each prompt")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="images sampled together; changes no image"),
]


def evaluate(
    targets: Targets,
    preset: PresetOption = None,
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    sets: SetOption = None,
    model: ModelOption = None,
    reward: RewardOption = None,
    prompts: PromptsOption = None,
    images: ImagesOption = None,
    images_per_prompt: PerPromptOption = None,
    scale: ScaleOption = None,
    base_until: BaseUntilOption = None,
    ema: EmaOption = False,
    seed: SeedOption = None,
    batch_size: BatchOption = None,
    export: ExportOption = None,
    layout: LayoutOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    log_with: LogWithOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Sample the same images with the base model and with LoRAs, and compare their rewards.

    A run or a checkpoint brings its configuration; with several targets the first one's is used.
    A run means its newest checkpoint. A LoRA that was trained elsewhere needs --preset, --config or
    --model. `base` samples with the base model alone.

    Examples:

      alignprop evaluate runs/tiny

      alignprop evaluate runs/a runs/b --reward clip,brightness --images 64 --images-per-prompt 4

      alignprop evaluate my_lora.safetensors --preset tiny --scale 0,0.5,1,1.5

      alignprop evaluate runs/tiny --checkpoint best --base-until 0,0.2,0.4,0.6

      alignprop evaluate my_lora.safetensors --preset aesthetic --layout geneval
    """
    # Only now, so that --help is quick.
    from alignprop_cli.commands.bodies import evaluate as body
    from alignprop_cli.console import Console

    body.evaluate(
        Console(as_json=as_json, quiet=quiet),
        targets,
        preset=preset,
        config=config,
        checkpoint=checkpoint,
        sets=sets,
        model=model,
        reward=reward,
        prompts=prompts,
        images=images,
        images_per_prompt=images_per_prompt,
        scale=scale,
        base_until=base_until,
        ema=ema,
        seed=seed,
        batch_size=batch_size,
        output=output,
        overwrite=overwrite,
        log_with=tracker_names(log_with),
        export=export,
        layout=layout,
    )
