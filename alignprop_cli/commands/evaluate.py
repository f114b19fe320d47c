"""`alignprop evaluate`: what LoRAs changed, on the same prompts and noise as the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignprop_cli.commands import (
    ConfigOption,
    DebugOption,
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

if TYPE_CHECKING:
    from pathlib import Path

    from alignprop_cli.adapter import Located
    from alignprop_cli.config import Config

BASE = "base"
"""What the base model alone is called; a folder of that name is ./base."""

OURS = ("results.json", "results.csv", "report.html", "sheet.png", "curve.png", "images")
"""What is in an evaluation's folder."""


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...", help="runs, checkpoints, LoRA files or folders, or base"
        ),
    ],
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    model: ModelOption = None,
    reward: RewardOption = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="prompt set, or .txt, .jsonl or .csv file")
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", "-n", min=1, help="pictures drawn with each model")
    ] = None,
    images_per_prompt: Annotated[
        int | None,
        typer.Option("--images-per-prompt", min=1, help="of these, pictures of each prompt"),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option("--scale", help="strengths to draw a LoRA with: 0,0.5,1; 1 is as trained"),
    ] = None,
    seed: SeedOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="pictures drawn at once; changes no picture"),
    ] = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw the same pictures with the base model and with LoRAs, and compare their rewards.

    A run and its checkpoints bring their configuration, the first target's counts; of a run the
    newest checkpoint is taken. A LoRA that was trained elsewhere needs --preset, --config or
    --model. `base` draws the base model alone.

    Examples:

      alignprop evaluate runs/tiny

      alignprop evaluate runs/a runs/b --reward clip,brightness --images 64 --images-per-prompt 4

      alignprop evaluate my_lora.safetensors --preset tiny --scale 0,0.5,1,1.5
    """
    from alignprop_cli import adapter

    flags = {
        "model.id": ("--model", model),
        "eval.prompts": ("--prompts", prompts),
        "eval.images": ("--images", images),
        "eval.images_per_prompt": ("--images-per-prompt", images_per_prompt),
        "eval.seed": ("--seed", seed),
        "eval.batch_size": ("--batch-size", batch_size),
    }
    located = _locate(targets)
    strengths = _strengths(scale, located)
    first = located[0] if located else None
    header = {} if first is None else adapter.read_header(first.file)
    resolved = configuration(
        targets[0] if first is None else str(first.file),
        header,
        None if first is None else first.run,
        preset,
        config,
        sets or [],
        reward,
        flags,
    )
    _run(resolved, located, strengths, (output, overwrite), (as_json, quiet))


def _run(
    config: Config,
    located: list[Located],
    strengths: list[float] | None,
    place: tuple[str | None, bool],
    console: tuple[bool, bool],
) -> None:
    """Check the prompts and the folder, and go."""
    from pathlib import Path

    from alignprop_cli.commands.outputs import check_output
    from alignprop_cli.console import Console
    from alignprop_cli.prompts import load_groups, load_prompts

    (output, overwrite), (as_json, quiet) = place, console
    prompts, groups = load_prompts(config.eval.prompts), load_groups(config.eval.prompts)
    folder = Path(output).expanduser() if output else _default_folder(located)
    check_output(folder, overwrite=overwrite, ours=OURS)

    from alignprop_cli.commands.evaluation import run_evaluation, variants

    run_evaluation(
        config,
        Console(as_json=as_json, quiet=quiet),
        variants(located, strengths),
        prompts,
        groups,
        folder,
    )


def _locate(targets: list[str]) -> list[Located]:
    """Return the LoRAs that are named; none for the base model alone."""
    from alignprop_cli import adapter
    from alignprop_cli.errors import ConfigError

    if BASE in targets and len(targets) > 1:
        raise ConfigError("evaluate: the base model is always drawn: name the LoRAs alone")
    return [] if targets == [BASE] else [adapter.locate(target) for target in targets]


def _strengths(text: str | None, located: list[Located]) -> list[float] | None:
    """Return the strengths that were asked for, each once, rising.

    Raises:
        ConfigError: If one is not a finite number, or there is not one LoRA.
    """
    import math

    from alignprop_cli.errors import ConfigError

    if text is None:
        return None
    if len(located) != 1:
        raise ConfigError(f"--scale goes with one LoRA, got {len(located)}")
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"--scale {text}: expected numbers such as 0,0.5,1") from error
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"--scale {text}: expected finite numbers")
    return found


def configuration(
    target: str,
    header: dict[str, str],
    run: Path | None,
    preset: str | None,
    config: str | None,
    sets: list[str],
    reward: list[str] | None,
    flags: dict[str, tuple[str, Any]],
) -> Config:
    """Return the complete configuration, its rewards' names and options checked.

    Args:
        target: What is drawn, for messages.
        header: Of its file; empty for the base model.
        run: The run it belongs to, where there is one.
        preset: Name of a preset, instead of what comes with the LoRA.
        config: File of the user's own, likewise.
        sets: `--set` texts.
        reward: Those of `--reward`.
        flags: Dotted key to name and value of the other flags.

    Raises:
        AssetError, ConfigError: As `settings.build`; if nothing says what the base model is.
    """
    from pathlib import Path

    from alignprop_cli.commands import settings
    from alignprop_cli.rewards import registry

    values: dict[str, object] = {}
    # What the command line names takes the place of what came with the weights.
    if preset is not None or config is not None:
        run = None
    elif run is None:
        values = _values(target, header, model=flags["model.id"][1])
    resolved = settings.build(
        preset=preset,
        config=Path(config).expanduser() if config else None,
        header=values,
        run=run,
        assignments=sets,
        rewards=settings.reward_names(reward),
        flags=flags,
        source=target if run is None else str(run / "config.yaml"),
    )
    for name, member in resolved.reward.items():
        registry.check(name, member.options)
    return resolved


def _values(target: str, header: dict[str, str], *, model: str | None) -> dict[str, object]:
    """Return the configuration in the header of weights, or the base model that it names.

    Args:
        target: The weights, for messages.
        header: Of their file; empty for the base model.
        model: What the command line names as the base model.

    Raises:
        AssetError: If the configuration in the header is damaged.
        ConfigError: If there is none and nothing says what the base model is.
    """
    from pathlib import Path

    from alignprop_cli.adapter import recorded_config
    from alignprop_cli.errors import ConfigError

    recorded = recorded_config(header, Path(target))
    if recorded is not None:
        return recorded
    if "alignprop.base_model" in header:
        return {"model": {"id": header["alignprop.base_model"]}}
    if model is None:
        raise ConfigError(
            f"{target}: nothing says which base model to draw with",
            hint=f"give --preset, --config or --model: alignprop evaluate {target} --preset tiny",
        )
    return {}


def _default_folder(located: list[Located]) -> Path:
    """Return <run>/evaluation, or evaluation-<names> here for what is not in one run."""
    from pathlib import Path

    if not located:
        return Path("evaluation-base")
    if len(located) == 1 and (run := located[0].run) is not None:
        return run / ("evaluation" + (f"-{located[0].step}" if located[0].step else ""))
    return Path("-".join(["evaluation", *(found.label for found in located)])[:200])
