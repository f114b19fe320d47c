"""`alignprop evaluate`: compare LoRAs with the base model on the same prompts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from alignprop_cli.commands.places import CheckpointOption, Targets
from alignprop_cli.commands.strengths import BaseUntilOption, ScaleOption, choose
from alignprop_cli.commands.trackers import LogWithOption, tracker_names
from alignprop_cli.errors import ConfigError
from alignprop_cli.paths import user_path

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located

# The base model's name as a target; a folder of that name has to be written ./base.
BASE = "base"

PromptsOption = Annotated[
    str | None, typer.Option("--prompts", help="prompt set, or .txt, .jsonl, .json or .csv file")
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
    """
    from alignprop_cli.commands.settings import for_evaluation
    from alignprop_cli.console import Console

    # 1. What the command line says, before a configuration is read or torch is imported.
    located = _locate(targets, checkpoint, ema)
    chosen = choose(scale, base_until, located)
    folder = _default_folder(located) if output is None else user_path(output, "--output")
    # 2. The configuration. A flag sets one of its keys and wins over every other source.
    flags: dict[str, Any] = {"model.id": model, "eval.prompts": prompts, "eval.images": images}
    flags |= {"eval.images_per_prompt": images_per_prompt, "eval.seed": seed}
    flags |= {"eval.batch_size": batch_size, "tracking.log_with": tracker_names(log_with)}
    with claimed(folder, overwrite=overwrite, ours=EVALUATION, sign="results.json"):
        first = next(iter(located), None)
        resolved = for_evaluation(
            targets[0], first, preset, config, sets=sets, reward=reward, flags=flags
        )
        from alignprop_cli.evaluation.run import run_evaluation, variants

        console, axis = Console(as_json=as_json, quiet=quiet), chosen.axis
        compared = variants(located, chosen.strengths, chosen.base_until)
        run_evaluation(resolved, console, compared, folder, replace=overwrite, axis=axis)


def _locate(targets: list[str], checkpoint: str | None, ema: bool) -> list[Located]:
    """Return the LoRAs that the targets name; none for the base model alone."""
    from alignprop_cli.lora import files

    # Everything is compared with the base model, so it cannot be one of several targets.
    if BASE in targets and (len(targets) > 1 or ema):
        raise ConfigError("evaluate: the base model is always sampled: name the LoRAs alone")
    names = [] if targets == [BASE] else targets
    folders = [user_path(name, "evaluate") / "checkpoints" for name in names]
    if checkpoint is not None and not (folders and all(f.is_dir() for f in folders)):
        raise ConfigError("--checkpoint goes with runs")
    return [files.locate(target, "evaluate", checkpoint, averaged=ema) for target in names]


def _default_folder(located: list[Located]) -> Path:
    """Return <run>/evaluation, or evaluation-<names> in the working folder for anything else."""
    if not located:
        return Path("evaluation-base")
    if len(located) == 1 and (run := located[0].run) is not None:
        return run / f"evaluation{located[0].suffix}"
    return Path("-".join(["evaluation", *(found.label for found in located)])[:200])
