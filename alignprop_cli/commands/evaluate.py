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

    from alignprop_cli.config.schema import Config
    from alignprop_cli.lora.files import Located

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
    resolved = configuration(targets[0], first, preset, config, sets or [], reward, flags)
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

    from alignprop_cli.evaluation.compare import run_evaluation, variants

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
    from alignprop_cli.errors import ConfigError
    from alignprop_cli.lora import files as adapter

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
    located: Located | None,
    preset: str | None,
    config: str | None,
    sets: list[str],
    reward: list[str] | None,
    flags: dict[str, tuple[str, Any]],
) -> Config:
    """Return the complete configuration, its rewards' names and options checked.

    Args:
        target: What the user named, for messages.
        located: Its LoRA; None is the base model.
        preset: Name of a preset, instead of what comes with the LoRA.
        config: File of the user's own, likewise.
        sets: `--set` texts.
        reward: Those of `--reward`.
        flags: Dotted key to name and value of the other flags.
    """
    from pathlib import Path

    from alignprop_cli.commands import settings
    from alignprop_cli.lora import files as adapter
    from alignprop_cli.rewards import registry

    header = {} if located is None else adapter.read_header(located.file)
    given = preset is not None or config is not None
    own, values = _own_settings(located, header, given=given, model=flags["model.id"][1])
    resolved = settings.build(
        preset=preset,
        config=Path(config).expanduser() if config else own,
        header=values,
        assignments=sets,
        rewards=settings.reward_names(reward),
        flags=flags,
        source=str(own or target),
    )
    for name, member in resolved.reward.items():
        registry.check(name, member.options)
    return resolved


def _own_settings(
    located: Located | None, header: dict[str, str], *, given: bool, model: str | None
) -> tuple[Path | None, dict[str, object]]:
    """Return the configuration that comes with the weights: a run's file, or a header's values.

    Args:
        located: The weights; None is the base model.
        header: Of their file.
        given: Whether the command line names a preset or a configuration, which then counts.
        model: What the command line names as the base model.

    Raises:
        AssetError: If the configuration in the header is damaged.
        ConfigError: If there is no configuration and nothing says what the base model is.
    """
    from alignprop_cli.errors import ConfigError
    from alignprop_cli.lora.files import recorded_config

    if given:
        return None, {}
    if located is not None and located.run is not None:
        return located.run / "config.yaml", {}
    if located is not None:
        recorded = recorded_config(header, located.file)
        if recorded is not None:
            return None, recorded
    if "alignprop.base_model" in header:
        return None, {"model": {"id": header["alignprop.base_model"]}}
    if model is None:
        what = "base" if located is None else str(located.file)
        raise ConfigError(
            f"{what}: nothing says which base model to draw with",
            hint=f"give --preset, --config or --model: alignprop evaluate {what} --preset tiny",
        )
    return None, {}


def _default_folder(located: list[Located]) -> Path:
    """Return <run>/evaluation, or evaluation-<names> here for what is not in one run."""
    from pathlib import Path

    if not located:
        return Path("evaluation-base")
    if len(located) == 1 and (run := located[0].run) is not None:
        return run / ("evaluation" + (f"-{located[0].step}" if located[0].step else ""))
    return Path("-".join(["evaluation", *(found.label for found in located)])[:200])
