"""What the functions for Python return: the object that `--json` prints, with types.

`values` is that object as it is; the other fields are those of it that are mostly wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignprop_cli.evaluation.compare import Metric, Metrics, Paired


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        run: Its folder.
        adapter: The LoRA file: the last step's or, where the guard stopped the run, the best one's.
        ema_adapter: The average of the weights; None without `train.ema_decay`.
        sheet: Held-out images before and after.
        steps: Optimiser steps, with those of the run before it was resumed.
        images_seen: Images in all steps.
        seconds: Wall-clock time of this call.
        peak_memory_gib: Most memory: allocated on a GPU, else of the process.
        stopped_by_guard: Whether the run was stopped since it got worse.
        best_step: The best step by what is not trained on, if there was any.
        best: Its LoRA file.
        rewards: By name, of held-out images before and after.
        checker: By part of the prompt, the share of images that are right before and after; empty
            where nothing checks the prompts.
        card: The model card, beside the adapter.
        exports: What `export` asked for, by its name: a file, or the folder of `merged`.
        hub: Address on the hub, if it was uploaded.
        warnings: Messages that the command would print.
        values: The object that `alignprop train --json` prints.
    """

    run: Path
    adapter: Path
    ema_adapter: Path | None
    sheet: Path
    steps: int
    images_seen: int
    seconds: float
    peak_memory_gib: float
    stopped_by_guard: bool
    best_step: int | None
    best: Path | None
    rewards: Mapping[str, Paired]
    checker: Mapping[str, Paired]
    card: Path
    exports: Mapping[str, Path]
    hub: str | None
    warnings: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class EvaluateResult:
    """Models compared on the same images.

    Args:
        output: The folder with the images and the following files.
        results: results.json.
        report: report.html.
        sheet: sheet.png.
        images: Images of each model.
        seconds: Wall-clock time.
        rewards: Name of the reward, then of the model (`base`, `tuned` ...): mean, deviation, and
            the comparison with the base model.
        checker: The same for the shares of images that are right.
        exports: As in `TrainResult`.
        layout: The folder that a benchmark's own scorer reads; None if none was asked for.
        warnings: Messages that the command would print.
        values: The object that `alignprop evaluate --json` prints.
    """

    output: Path
    results: Path
    report: Path
    sheet: Path
    images: int
    seconds: float
    rewards: Metrics
    checker: Metrics
    exports: Mapping[str, Path]
    layout: Path | None
    warnings: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class SoupResult:
    """A mix of LoRAs, or the mixes of a sweep.

    Args:
        folder: Where it is.
        adapter: The LoRA file; None for a sweep, whose mixes are in folders inside.
        error: Relative L2 distance to the exact mix; 0 for the exact method, None for a sweep.
        evaluation: The comparison with the base model, if one was asked for.
        exports: As in `TrainResult`.
        hub: Address on the hub, if it was uploaded.
        warnings: Messages that the command would print.
        values: The object that `alignprop soup --json` prints; empty for a sweep.
    """

    folder: Path
    adapter: Path | None
    error: float | None
    evaluation: EvaluateResult | None
    exports: Mapping[str, Path]
    hub: str | None
    warnings: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Summary:
    """One reward over many images.

    Args:
        mean: Their mean.
        std: Their standard deviation.
        min: The smallest.
        max: The largest.
        quantiles: The values below which these shares of them are.
    """

    mean: float
    std: float
    min: float
    max: float
    quantiles: Mapping[float, float]


@dataclass(frozen=True)
class ScoreResult:
    """Measured image files.

    Args:
        scored: How many were measured.
        skipped: Those that were not, each with the reason.
        same_content: How many have the content of another one.
        rewards: By name.
        images: A mapping for each image: `file`, the rewards by name, `prompt`, `prompt_source` and
            `content` (a hash). Only the best with `top`, none with `output`, which has them.
        output: The file of the rows, if one was asked for.
        gallery: The page, if one was asked for.
        notes: Remarks on the images.
        warnings: Messages that the command would print.
        values: The object that `alignprop score --json` prints.
    """

    scored: int
    skipped: Mapping[Path, str]
    same_content: int
    rewards: Mapping[str, Summary]
    images: Sequence[Mapping[str, Any]]
    output: Path | None
    gallery: Path | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)


def of_training(values: Mapping[str, Any], warnings: Sequence[str]) -> TrainResult:
    """Return the result of a training."""
    # The keys of summary.json, which are those of --json.
    guard, held_out = values["guard"], values["held_out"]
    return TrainResult(
        run=Path(values["run"]),
        adapter=Path(values["adapter"]),
        ema_adapter=_path(values.get("ema_adapter")),
        sheet=Path(values["sheet"]),
        steps=values["steps"],
        images_seen=values["images_seen"],
        seconds=values["seconds"],
        peak_memory_gib=values["peak_memory_gib"],
        # What the guard says, and what it kept.
        stopped_by_guard=guard["stopped"],
        best_step=guard["best_step"],
        best=_path(guard["best"]),
        # Held-out images before and after.
        rewards={name: Paired(**each) for name, each in held_out["rewards"].items()},
        checker={part: Paired(**each) for part, each in held_out["checker"].items()},
        # What it was made for.
        card=Path(values["card"]),
        exports=_paths(values.get("exports", {})),
        hub=values.get("hub"),
        warnings=tuple(warnings),
        values=values,
    )


def of_evaluation(values: Mapping[str, Any], warnings: Sequence[str]) -> EvaluateResult:
    """Return the result of an evaluation."""
    output = Path(values["output"])
    return EvaluateResult(
        output=output,
        # Its name is fixed; the others are told.
        results=output / "results.json",
        report=Path(values["report"]),
        sheet=Path(values["sheet"]),
        images=values["images"],
        seconds=values["seconds"],
        rewards=_metrics(values["rewards"]),
        checker=_metrics(values["checker"]),
        exports=_paths(values.get("exports", {})),
        layout=Path(values["layout"]) if "layout" in values else None,
        warnings=tuple(warnings),
        values=values,
    )


def of_soup(
    made: Mapping[str, Any], evaluation: Mapping[str, Any] | None, warnings: Sequence[str]
) -> SoupResult:
    """Return the result of a soup: what was made, and its evaluation if there is one."""
    compared = None if evaluation is None else of_evaluation(evaluation, warnings)
    # A sweep makes nothing of its own: all that it has is compared, inside its folder.
    folder = Path(made["folder"]) if compared is None or made else compared.output.parent
    # What is published of a mix is told with what is told last.
    told = made if evaluation is None else evaluation
    return SoupResult(
        folder=folder,
        adapter=_path(made.get("adapter")),
        error=made.get("error"),
        evaluation=compared,
        exports=_paths(told.get("exports", {})),
        hub=told.get("hub"),
        warnings=tuple(warnings),
        values=made,
    )


def of_scoring(values: Mapping[str, Any], warnings: Sequence[str]) -> ScoreResult:
    """Return the result of scoring."""
    return ScoreResult(
        scored=values["scored"],
        # Names need not be UTF-8, which paths may be and JSON may not.
        skipped={Path(each["file"]): each["reason"] for each in values["skipped"]},
        same_content=values["same_content"],
        rewards={name: _summary(each) for name, each in values["rewards"].items()},
        # Only where they are not in a file.
        images=[{**row, "file": Path(row["file"])} for row in values.get("images", ())],
        output=_path(values["output"]),
        gallery=_path(values["gallery"]),
        notes=tuple(values["notes"]),
        warnings=tuple(warnings),
        values=values,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _paths(values: Mapping[str, str]) -> Mapping[str, Path]:
    return {name: Path(text) for name, text in values.items()}


def _metrics(values: Mapping[str, Any]) -> Metrics:
    """Return metrics by name and model from their plain values."""
    return {
        name: {model: _metric(each) for model, each in by_model.items() if model != "trained_on"}
        for name, by_model in values.items()
    }


def _metric(values: Mapping[str, Any]) -> Metric:
    # The base model has no comparison with itself.
    paired = {key: value for key, value in values.items() if key not in ("mean", "std")}
    return Metric(values["mean"], values["std"], Paired(**paired) if paired else None)


def _summary(values: Mapping[str, Any]) -> Summary:
    # JSON has no numbers as keys.
    quantiles = {float(share): value for share, value in values["quantiles"].items()}
    return Summary(values["mean"], values["std"], values["min"], values["max"], quantiles)
