"""What `alignprop train` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignprop_cli.commands import cards, settings
from alignprop_cli.commands.importing import large_imports
from alignprop_cli.commands.listing import show
from alignprop_cli.commands.sharing import of_training
from alignprop_cli.console import Console
from alignprop_cli.errors import NothingToDo
from alignprop_cli.publishing.request import read_kinds


def train(
    console: Console,
    *,
    preset: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    sets: Sequence[str] | None = None,
    reward: Sequence[str] | None = None,
    model: str | None = None,
    output: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    on_nonfinite: str | None = None,
    resume: str | None = None,
    checkpoint: str | None = None,
    dry_run: bool = False,
    gpu_memory: str | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    show_preset: bool = False,
    log_with: Sequence[str] | None = None,
    export: Sequence[str] | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Train, or plan a training, and give the console the result.

    Args:
        console: For people and for the result.
        preset: As the option of the same name, and so are the others.
        config: File of the user's own, or its values.
        sets: Texts of `--set`.
        reward: NAME or NAME:WEIGHT.
        model: Of `model.id`.
        output: The run folder.
        steps: Of `train.steps`.
        seed: Of `train.seed`.
        on_nonfinite: Of `train.on_nonfinite`.
        resume: The run to resume, or `auto`.
        checkpoint: Of the run to resume.
        dry_run: Whether to plan only.
        gpu_memory: Memory to plan for; several, separated by commas, in a dry run.
        gpu: Card to plan for.
        gpus: How many of them.
        show_preset: Whether to print the configuration only.
        log_with: Names of trackers.
        export: Formats to write the adapter in.
        push_to_hub: Id on the hub to upload it to.

    Raises:
        AlignPropError: Whatever is wrong with the configuration, the files or the run.
    """
    from alignprop_cli.training.folders import run_name, run_to_resume

    # 1. Cards of another machine go with a plan alone.
    planned = cards.checked(dry_run, gpu_memory, gpu, gpus)
    # A plan exports nothing, and is where a mistyped format should be noticed.
    read_kinds(export)
    # 2. The configuration of the run to resume, or of a new one.
    run = run_to_resume(resume, preset, config, output, checkpoint)
    flags = {"model.id": model, "train.steps": steps, "train.seed": seed, "output.dir": output}
    flags |= {"train.on_nonfinite": on_nonfinite, "tracking.log_with": log_with}
    # In a dry run it is the memory to plan for, and no limit on this machine's.
    flags |= {} if dry_run else {"train.memory_limit": gpu_memory}
    resolved = settings.for_training(run, preset, config, sets=sets, reward=reward, flags=flags)
    # Looked at often, so it must not wait for torch.
    if show_preset:
        return show(resolved, console)

    # 3. From here on torch and diffusers are needed.
    # A resumed run keeps its name, whatever file it was once started with.
    name = run_name(preset, config) if run is None else run.name
    if dry_run:
        with large_imports():
            from alignprop_cli.training.dry_run import describe

        return describe(resolved, console, name=name, resume=run, back_to=checkpoint, **planned)
    with large_imports():
        from alignprop_cli.training.resume import refuse_stopped
        from alignprop_cli.training.run import run_training

    publish = of_training(resolved, export, push_to_hub)
    try:
        if run is not None and resume == "auto":
            refuse_stopped(run, resolved)
        run_training(resolved, console, name=name, resume=run, back_to=checkpoint, publish=publish)
    except NothingToDo:
        # Started again by the same line, after it was ended in the middle of an export or upload.
        from alignprop_cli.publishing.results import catch_up
        from alignprop_cli.training.summary import show_again

        done = None if run is None else catch_up(publish, run, dora=resolved.lora.dora)
        if run is None or done is None or not show_again(console, run, done):
            raise
