"""`alignprop train`: fine-tune a model to raise a reward."""

from __future__ import annotations

from typing import Annotated

import typer

from alignprop_cli.commands import completion
from alignprop_cli.commands.cards import GpuMemoryOption, GpuOption, GpusOption
from alignprop_cli.commands.listing import ListOption, list_shipped
from alignprop_cli.commands.options import (
    ConfigOption,
    DebugOption,
    JsonOption,
    ModelOption,
    OutputOption,
    PresetOption,
    QuietOption,
    SeedOption,
    SetOption,
)
from alignprop_cli.commands.places import BackToOption, ResumeOption
from alignprop_cli.commands.sharing import ExportOption, PushOption
from alignprop_cli.commands.trackers import LogWithOption, tracker_names
from alignprop_cli.errors import NothingToDo

WeightedRewardOption = Annotated[
    list[str] | None,
    typer.Option(
        *("--reward", "-r"),
        help="NAME or NAME:WEIGHT, repeatable or with commas",
        autocompletion=completion.rewards,
    ),
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="optimiser steps")]
NonfiniteOption = Annotated[
    str | None,
    typer.Option("--on-nonfinite", help="at NaN or infinity: stop, or skip the step's update"),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="print the plan and the configuration, and stop")
]
ShowOption = Annotated[
    bool, typer.Option("--show-preset", help="print the complete configuration and stop")
]


def train(
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    reward: WeightedRewardOption = None,
    model: ModelOption = None,
    output: OutputOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    on_nonfinite: NonfiniteOption = None,
    resume: ResumeOption = None,
    checkpoint: BackToOption = None,
    dry_run: DryRunOption = False,
    gpu_memory: GpuMemoryOption = None,
    gpu: GpuOption = None,
    gpus: GpusOption = None,
    export: ExportOption = None,
    push_to_hub: PushOption = None,
    list_presets: ListOption = False,
    show_preset: ShowOption = False,
    log_with: LogWithOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a model with a LoRA to raise a reward.

    Examples:

      alignprop train --preset tiny

      alignprop train --preset tiny --steps 5 --output runs/first --seed 1

      alignprop train --preset tiny --reward clip --reward colourfulness:0.1

      alignprop train --resume runs/first --steps 10
    """
    # Only now, so that --help is quick.
    from alignprop_cli.commands.bodies import train as body
    from alignprop_cli.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    if list_presets:
        return list_shipped(console)
    try:
        body.train(
            console,
            preset=preset,
            config=config,
            sets=sets,
            reward=reward,
            model=model,
            output=output,
            steps=steps,
            seed=seed,
            on_nonfinite=on_nonfinite,
            resume=resume,
            checkpoint=checkpoint,
            dry_run=dry_run,
            gpu_memory=gpu_memory,
            gpu=gpu,
            gpus=gpus,
            show_preset=show_preset,
            log_with=tracker_names(log_with),
            export=export,
            push_to_hub=push_to_hub,
        )
    except NothingToDo as error:
        # Where a scheduler's line finds its run done, that is no error.
        if resume != "auto":
            raise
        console.note(error.message)
        if error.hint:
            console.note(error.hint)
