"""`alignprop train`: teach a model a reward."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_cli.commands import (
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

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from alignprop_cli.config import Config
    from alignprop_cli.console import Console


def train(
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", "-r", help="NAME or NAME:WEIGHT, repeatable or with commas"),
    ] = None,
    model: ModelOption = None,
    output: OutputOption = None,
    steps: Annotated[int | None, typer.Option("--steps", help="optimiser steps")] = None,
    seed: SeedOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", help="run folder to go on with, or auto: the newest one, else a new one"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be done and stop")
    ] = False,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", help="of one card, as 12GB: plan for it; with --dry-run only"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="cards; with --dry-run --gpu-memory only")
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="list the shipped presets and stop")
    ] = False,
    show_preset: Annotated[
        bool, typer.Option("--show-preset", help="print the complete configuration and stop")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Teach a model a reward, into a LoRA.

    Examples:

      alignprop train --preset tiny

      alignprop train --preset tiny --steps 5 --output runs/first --seed 1

      alignprop train --preset tiny --reward clip --reward colourfulness:0.1

      alignprop train --resume runs/first --steps 10
    """
    from alignprop_cli.commands.settings import reward_weights
    from alignprop_cli.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    if list_presets:
        _list(console)
        return
    flags = {"model.id": model, "train.steps": steps, "train.seed": seed, "output.dir": output}
    run = None if resume is None else _run_to_resume(resume, preset, config, output)
    settings = _settings(preset, config, run, sets or [], reward_weights(reward), flags)
    name = _run_name(preset, config) if run is None else run.name
    if show_preset:
        _show(console, settings)
        return

    from alignprop_cli.commands.training import describe, run_training

    _only_with_dry_run(dry_run, gpu_memory, gpus)
    if dry_run:
        describe(settings, console, name=name, resume=run, gpu_memory=gpu_memory, gpus=gpus)
        return
    run_training(settings, console, name=name, resume=run)


def _only_with_dry_run(dry_run: bool, gpu_memory: str | None, gpus: int | None) -> None:
    """Refuse to plan a run that happens here for cards that may be elsewhere."""
    from alignprop_cli.errors import ConfigError

    for flag, given, needs in (
        ("--gpu-memory", gpu_memory, dry_run),
        ("--gpus", gpus, dry_run and gpu_memory is not None),
    ):
        if given is not None and not needs:
            raise ConfigError(
                f"{flag} plans for cards that need not be here: it goes with --dry-run"
                + (" and --gpu-memory" if flag == "--gpus" else "")
            )


def _list(console: Console) -> None:
    from alignprop_cli import presets
    from alignprop_cli.console import table

    rows = [(name, presets.summary(name)) for name in presets.names()]
    listing = table("Presets", ("name", "what it does"), rows, numbers=False)
    console.result("alignprop.presets/1", {"presets": dict(rows)}, [listing])


def _settings(
    preset: str | None,
    config: str | None,
    run: Path | None,
    sets: list[str],
    rewards: dict[str, float | None],
    flags: dict[str, str | int | None],
) -> Config:
    """Resolve the configuration: that of a run to go on with, or of a new one."""
    from pathlib import Path

    from alignprop_cli import presets
    from alignprop_cli.commands import settings
    from alignprop_cli.errors import ConfigError

    file = Path(config).expanduser() if config else None
    if run is not None:
        return settings.resume(
            run,
            preset=preset,
            config=file,
            assignments=sets,
            rewards=rewards,
            # Where the run is, it stays.
            flags={**flags, "output.dir": None},
        )
    if preset is None and config is None and not (flags["model.id"] and rewards):
        raise ConfigError(
            "train: nothing to do: give --preset or --config, or --model and --reward",
            hint="`alignprop train --preset tiny` works at once; --list-presets lists the others",
        )
    return presets.resolve(
        preset=preset,
        config=file,
        assignments=sets,
        rewards=rewards,
        flags=flags,
    )


def _run_to_resume(
    resume: str, preset: str | None, config: str | None, output: str | None
) -> Path | None:
    """Return the run to go on with; None where `auto` finds none and a new one can be started."""
    from pathlib import Path

    from alignprop_cli.errors import AssetError, ConfigError

    if resume == "auto":
        name = None if preset is None and config is None else _run_name(preset, config)
        if output is not None:
            run = Path(output).expanduser()
            runs = [run] if (run / "config.yaml").is_file() else []
        else:
            runs = _resumable(Path("runs").glob("*"))
        if output is None and name is not None:
            # As new runs of this name are called.
            runs = [run for run in runs if re.fullmatch(rf"{re.escape(name)}(-\d+)?", run.name)]
        if not runs and name is None:
            raise AssetError(
                f"--resume auto: there is no run in {output or 'runs/'} to go on with",
                hint="with --preset or --config a new one is begun",
            )
        return runs[0] if runs else None
    for flag, value in (("--preset", preset), ("--config", config)):
        if value is not None:
            raise ConfigError(
                f"--resume and {flag} exclude each other: a run has its own config.yaml"
            )
    if output is not None:
        raise ConfigError("--resume and --output exclude each other: a run goes on where it is")
    run = Path(resume).expanduser()
    if not (run / "config.yaml").is_file():
        raise AssetError(
            f"--resume: {run} is not a run: config.yaml is missing",
            hint="give the folder that `alignprop train` printed, such as runs/tiny",
        )
    return run


def _resumable(folders: Iterable[Path]) -> list[Path]:
    """Return those that are runs with a checkpoint, newest first."""
    found = [
        folder
        for folder in folders
        if (folder / "config.yaml").is_file() and any((folder / "checkpoints").glob("step-*"))
    ]
    return sorted(found, key=lambda run: (run / "checkpoints").stat().st_mtime, reverse=True)


def _run_name(preset: str | None, config: str | None) -> str:
    from pathlib import Path

    if config is None:
        return preset or "run"
    path = Path(config)
    return path.parent.name if path.name == "config.yaml" and path.parent.name else path.stem


def _show(console: Console, settings: Config) -> None:
    from alignprop_cli.config import dump

    console.result(
        "alignprop.config/1",
        {"config": settings.model_dump(mode="json")},
        [dump(settings).rstrip()],
    )
