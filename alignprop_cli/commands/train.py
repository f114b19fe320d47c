"""`alignprop train`: fine-tune a model to raise a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_cli.commands import completion
from alignprop_cli.commands.cards import GpuMemoryOption, GpuOption, GpusOption, checked
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
from alignprop_cli.commands.trackers import LogWithOption, tracker_names

if TYPE_CHECKING:
    from pathlib import Path

    from alignprop_cli.config.schema import Config
    from alignprop_cli.console import Console

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
ListOption = Annotated[
    bool, typer.Option("--list-presets", help="list the shipped presets and stop")
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
    from alignprop_cli.commands import settings
    from alignprop_cli.config.schema import dump
    from alignprop_cli.console import Console
    from alignprop_cli.training.folders import run_name, run_to_resume

    console = Console(as_json=as_json, quiet=quiet)
    if list_presets:
        return _list(console)  # 1. without any configuration
    cards = checked(dry_run, gpu_memory, gpu, gpus)
    # 2. The configuration of the run to resume, or of a new one.
    run = run_to_resume(resume, preset, config, output, checkpoint)
    flags = {"model.id": model, "train.steps": steps, "train.seed": seed, "output.dir": output}
    flags |= {"train.on_nonfinite": on_nonfinite, "tracking.log_with": tracker_names(log_with)}
    flags |= {} if dry_run else {"train.memory_limit": gpu_memory}
    resolved = settings.for_training(run, preset, config, sets=sets, reward=reward, flags=flags)
    if show_preset:
        values = {"config": resolved.model_dump(mode="json")}
        return console.result("alignprop.config/1", values, [dump(resolved).rstrip()])
    # 3. From here on torch and diffusers are needed.
    name = run_name(preset, config) if run is None else run.name
    if dry_run:
        from alignprop_cli.training.plans import describe

        return describe(resolved, console, name=name, resume=run, **cards)
    _run(resolved, console, name, run, checkpoint, is_auto=resume == "auto")


def _run(
    config: Config,
    console: Console,
    name: str,
    run: Path | None,
    back_to: str | None,
    *,
    is_auto: bool,
) -> None:
    """Train; where a scheduler's line finds its run done, that is no error."""
    from alignprop_cli.training.resume import NothingToDo
    from alignprop_cli.training.run import run_training

    try:
        run_training(config, console, name=name, resume=run, back_to=back_to)
    except NothingToDo as error:
        if not is_auto:
            raise
        console.note(error.message)


def _list(console: Console) -> None:
    """Print the shipped presets, each with the first comment line of its file."""
    from alignprop_cli.config import presets
    from alignprop_cli.console import table

    rows = [(name, presets.summary(name)) for name in presets.names()]
    listing = table("Presets", ("name", "what it does"), rows, numbers=False)
    console.result("alignprop.presets/1", {"presets": dict(rows)}, [listing])
