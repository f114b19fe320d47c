"""`alignprop train`: fine-tune a model to raise a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_cli.commands.cards import GpuMemoryOption, GpuOption, GpusOption, checked
from alignprop_cli.commands.listing import list_shipped, show
from alignprop_cli.commands.options import (
    ConfigOption,
    DebugOption,
    JsonOption,
    ListOption,
    ModelOption,
    OutputOption,
    PresetOption,
    QuietOption,
    SeedOption,
    SetOption,
)
from alignprop_cli.commands.sharing import ExportOption, PushOption, of_training

if TYPE_CHECKING:
    from pathlib import Path

    from alignprop_cli.config.schema import Config
    from alignprop_cli.console import Console
    from alignprop_cli.publishing.request import Request

WeightedRewardOption = Annotated[
    list[str] | None,
    typer.Option("--reward", "-r", help="NAME or NAME:WEIGHT, repeatable or with commas"),
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="optimiser steps")]
NonfiniteOption = Annotated[
    str | None,
    typer.Option("--on-nonfinite", help="at NaN or infinity: stop, or skip the step's update"),
]
ResumeOption = Annotated[
    str | None,
    typer.Option("--resume", help="run folder to resume, or auto: the newest, else a new one"),
]
BackToOption = Annotated[
    str | None,
    typer.Option("--checkpoint", help="with --resume: go back to best, or to a step such as 40"),
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
    from alignprop_cli.commands import settings
    from alignprop_cli.console import Console
    from alignprop_cli.training.folders import run_name, run_to_resume

    console = Console(as_json=as_json, quiet=quiet)
    if list_presets:
        return list_shipped(console)  # 1. without any configuration
    cards = checked(dry_run, gpu_memory, gpu, gpus)
    # 2. The configuration of the run to resume, or of a new one.
    run = run_to_resume(resume, preset, config, output, checkpoint)
    flags = {"model.id": model, "train.steps": steps, "train.seed": seed, "output.dir": output}
    flags |= {"train.on_nonfinite": on_nonfinite}
    flags |= {} if dry_run else {"train.memory_limit": gpu_memory}
    resolved = settings.for_training(run, preset, config, sets=sets, reward=reward, flags=flags)
    if show_preset:
        return show(resolved, console)
    # 3. From here on torch and diffusers are needed.
    name = run_name(preset, config) if run is None else run.name
    if dry_run:
        from alignprop_cli.training.plans import describe

        return describe(resolved, console, name=name, resume=run, **cards)
    publish, is_auto = of_training(resolved, export, push_to_hub), resume == "auto"
    _run(resolved, console, name, run, checkpoint, publish, is_auto=is_auto)


def _run(
    config: Config,
    console: Console,
    name: str,
    run: Path | None,
    back_to: str | None,
    publish: Request,
    *,
    is_auto: bool,
) -> None:
    """Train; where a scheduler's line finds its run done, that is no error."""
    from alignprop_cli.training.resume import NothingToDo
    from alignprop_cli.training.run import run_training

    try:
        run_training(config, console, name=name, resume=run, back_to=back_to, publish=publish)
    except NothingToDo as error:
        if not is_auto:
            raise
        console.note(error.message)
