"""What `alignprop evaluate` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli.commands.importing import large_imports
from alignprop_cli.commands.layouts import with_layout
from alignprop_cli.commands.output import EVALUATION, claimed
from alignprop_cli.commands.settings import for_evaluation
from alignprop_cli.commands.sharing import of_evaluation
from alignprop_cli.commands.strengths import choose
from alignprop_cli.console import Console
from alignprop_cli.errors import ConfigError
from alignprop_cli.paths import user_path
from alignprop_cli.publishing.request import FILES

if TYPE_CHECKING:
    from alignprop_cli.evaluation.scorers import Layout
    from alignprop_cli.lora.files import Located

# The base model's name as a target; a folder of that name has to be written ./base.
BASE = "base"


def evaluate(
    console: Console,
    targets: Sequence[str],
    *,
    preset: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    sets: Sequence[str] | None = None,
    model: str | None = None,
    reward: Sequence[str] | None = None,
    prompts: str | None = None,
    images: int | None = None,
    images_per_prompt: int | None = None,
    scale: str | None = None,
    base_until: str | None = None,
    ema: bool = False,
    seed: int | None = None,
    batch_size: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    log_with: Sequence[str] | None = None,
    export: Sequence[str] | None = None,
    layout: Layout | None = None,
) -> None:
    """Compare LoRAs with the base model, and give the console the result.

    Args:
        console: For people and for the result.
        targets: Runs, checkpoints, LoRA files or folders; or `base` alone.
        preset: As the option of the same name, and so are the others.
        config: File of the user's own, or its values.
        checkpoint: Of the runs.
        sets: Texts of `--set`.
        model: Of `model.id`.
        reward: Names.
        prompts: Of `eval.prompts`.
        images: Of `eval.images`.
        images_per_prompt: Of `eval.images_per_prompt`.
        scale: Strengths, separated by commas.
        base_until: Shares, separated by commas.
        ema: Whether the average of the weights is taken.
        seed: Of `eval.seed`.
        batch_size: Of `eval.batch_size`.
        output: The folder of the result.
        overwrite: Whether it may be replaced.
        log_with: Names of trackers.
        export: Formats to write the LoRA in.
        layout: Folders of a benchmark's own scorer to write, with its prompts.

    Raises:
        AlignPropError: Whatever is wrong with the options, the files, the model or the rewards.
    """
    # 1. What the command line says, before a configuration is read or torch is imported.
    located = _locate(targets, checkpoint, ema)
    chosen = choose(scale, base_until, located)
    folder = _default_folder(located) if output is None else user_path(output, "--output")
    # 2. The configuration. A flag sets one of its keys and wins over every other source.
    flags: dict[str, Any] = {"model.id": model, "eval.prompts": prompts, "eval.images": images}
    flags |= {"eval.images_per_prompt": images_per_prompt, "eval.seed": seed}
    flags |= {"eval.batch_size": batch_size, "tracking.log_with": log_with}
    # 3. The folder is held until the result is in it: sampling may take hours.
    with claimed(folder, overwrite=overwrite, ours=(*EVALUATION, *FILES), sign="results.json"):
        first = next(iter(located), None)
        flags = with_layout(layout, flags, sets)
        resolved = for_evaluation(
            targets[0], first, preset, config, sets=sets, reward=reward, flags=flags
        )
        # Imports diffusers, so only now.
        from alignprop_cli.evaluation.run import run_evaluation, variants

        compared = variants(located, chosen.strengths, chosen.base_until)
        publish = of_evaluation(export, located, chosen, resolved.model, folder)
        more: dict[str, Any] = {"replace": overwrite, "axis": chosen.axis, "publish": publish}
        run_evaluation(resolved, console, compared, folder, layout=layout, **more)


def _locate(targets: Sequence[str], checkpoint: str | None, ema: bool) -> list[Located]:
    """Return the LoRAs that the targets name; none for the base model alone."""
    with large_imports():
        from alignprop_cli.lora import files

    # Everything is compared with the base model, so it cannot be one of several targets.
    if BASE in targets and (len(targets) > 1 or ema):
        raise ConfigError("evaluate: the base model is always sampled: name the LoRAs alone")
    names = [] if list(targets) == [BASE] else targets
    # Only a run has checkpoints to choose from.
    folders = [user_path(name, "evaluate") / "checkpoints" for name in names]
    if checkpoint is not None and not (folders and all(f.is_dir() for f in folders)):
        raise ConfigError("--checkpoint goes with runs")
    return [files.locate(target, "evaluate", checkpoint, averaged=ema) for target in names]


def _default_folder(located: list[Located]) -> Path:
    """Return <run>/evaluation, or evaluation-<names> in the working folder for anything else."""
    # The base model has no folder of its own that the result could go into.
    if not located:
        return Path("evaluation-base")
    if len(located) == 1 and (run := located[0].run) is not None:
        return run / f"evaluation{located[0].suffix}"
    return Path("-".join(["evaluation", *(found.label for found in located)])[:200])
