"""`alignprop evaluate`: compare LoRAs with the base model on the same prompts and noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from alignprop_cli.commands.output import EVALUATION, claimed
from alignprop_cli.errors import ConfigError
from alignprop_cli.paths import user_path

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located

# The base model's name as a target; a folder of that name has to be written ./base.
BASE = "base"

Targets = Annotated[
    list[str],
    typer.Argument(metavar="TARGET...", help="runs, checkpoints, LoRA files or folders, or base"),
]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", help="prompt set, or .txt, .jsonl, .json or .csv file")
]
ImagesOption = Annotated[
    int | None, typer.Option("--images", "-n", min=1, help="images sampled with each model")
]
PerPromptOption = Annotated[
    int | None, typer.Option("--images-per-prompt", min=1, help="of these, images of each prompt")
]
ScaleOption = Annotated[
    str | None, typer.Option("--scale", help="strengths of the LoRA: 0,0.5,1; 1 is as trained")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="images sampled together; changes no image"),
]


def evaluate(
    targets: Targets,
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    model: ModelOption = None,
    reward: RewardOption = None,
    prompts: PromptsOption = None,
    images: ImagesOption = None,
    images_per_prompt: PerPromptOption = None,
    scale: ScaleOption = None,
    ema: EmaOption = False,
    seed: SeedOption = None,
    batch_size: BatchOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
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
    """
    from alignprop_cli.commands.settings import for_evaluation
    from alignprop_cli.console import Console

    # 1. What the command line says, before a configuration is read or torch is imported.
    located = _locate(targets, ema)
    strengths = _strengths(scale, located)
    folder = _default_folder(located) if output is None else user_path(output, "--output")
    # 2. The configuration. A flag sets one of its keys and wins over every other source.
    flags = {
        "model.id": model,
        "eval.prompts": prompts,
        "eval.images": images,
        "eval.images_per_prompt": images_per_prompt,
        "eval.seed": seed,
        "eval.batch_size": batch_size,
    }
    with claimed(folder, overwrite=overwrite, ours=EVALUATION, sign="results.json"):
        first = next(iter(located), None)
        resolved = for_evaluation(
            targets[0], first, preset, config, sets=sets, reward=reward, flags=flags
        )
        from alignprop_cli.evaluation.run import run_evaluation, variants

        console = Console(as_json=as_json, quiet=quiet)
        run_evaluation(resolved, console, variants(located, strengths), folder, replace=overwrite)


def _locate(targets: list[str], ema: bool) -> list[Located]:
    """Return the LoRAs that the targets name; none for the base model alone."""
    from alignprop_cli.lora import files

    # Everything is compared with the base model, so it cannot be one of several targets.
    if BASE in targets and (len(targets) > 1 or ema):
        raise ConfigError("evaluate: the base model is always sampled: name the LoRAs alone")
    return [files.locate(t, "evaluate", averaged=ema) for t in targets if t != BASE]


def _strengths(text: str | None, located: list[Located]) -> list[float] | None:
    """Return the strengths of `--scale`, each once, rising."""
    # Rising, since they are the x values of a curve.
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


def _default_folder(located: list[Located]) -> Path:
    """Return <run>/evaluation, or evaluation-<names> in the working folder for anything else."""
    if not located:
        return Path("evaluation-base")
    if len(located) == 1 and (run := located[0].run) is not None:
        return run / f"evaluation{located[0].suffix}"
    return Path("-".join(["evaluation", *(found.label for found in located)])[:200])
