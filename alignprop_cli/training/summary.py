"""The end of a run: the before/after sheet, summary.json and the table that is printed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignprop_cli.console import table
from alignprop_cli.device import peak_gib
from alignprop_cli.evaluation.compare import Paired, checks, compare
from alignprop_cli.evaluation.draw import Samples
from alignprop_cli.evaluation.sheet import Cell, contact_sheet
from alignprop_cli.lora.files import EMA_FOLDER, LORA_FILE, latest
from alignprop_cli.shipped import next_command
from alignprop_cli.storage import write_text
from alignprop_cli.training.callbacks import Run


def finish(run: Run, base: Samples, tuned: Samples, seconds: float) -> None:
    """Write the before/after sheet and the summary, and print the result."""
    # 1. The comparison: the same samples of the base and the tuned model, pair by pair.
    folder, config, trainer = run.folder, run.config, run.trainer
    images_seen = trainer.step_number * config.train.batch_size
    peak, count = peak_gib(trainer.model.device), len(base.samples)
    paired = {
        name: compare(base.samples, base.rewards[name], tuned.rewards[name])
        for name in trainer.mixture.metrics
    }
    checked = {
        part: compare(base.samples, right["base"], right["tuned"])
        for part, right in checks({"base": base, "tuned": tuned}).items()
    }
    # 2. Files.
    sheet = folder / "before_after.png"
    _write_sheet(sheet, base, tuned)
    last = latest(folder)
    adapter, average = last / LORA_FILE, last / EMA_FOLDER / LORA_FILE
    # It repeats the options that config.yaml may not set by itself (config/trust.py).
    command = next_command(f"alignprop evaluate {folder}", config)
    values: dict[str, Any] = {
        "run": str(folder.resolve()),
        "adapter": str(adapter.resolve()),
        "weights": "last step",
        "sheet": str(sheet.resolve()),
        "steps": trainer.step_number,
        "images_seen": images_seen,
        "seconds": seconds,
        "peak_memory_gib": peak,
        "held_out": {
            "prompts": config.eval.prompts,
            "images": count,
            "rewards": {name: asdict(result) for name, result in paired.items()},
            "checker": {part: asdict(result) for part, result in checked.items()},
        },
        "next": command,
    }
    if average.is_file():
        values["ema_adapter"] = str(average.resolve())
    write_text(folder / "summary.json", json.dumps(values, indent=2) + "\n")
    # 3. The same for people.
    title = f"{count} held-out samples ({config.eval.prompts}), base and tuned"
    rows = [*map(_reward_row, paired, paired.values()), *map(_check_row, checked, checked.values())]
    run.console.result(
        "alignprop.train/2",
        values,
        [
            table(title, ("", "base", "tuned", "difference", "95 % interval"), rows),
            "",
            f"adapter  {adapter}",
            *_average_line(average),
            f"images   {sheet}",
            f"{trainer.step_number} steps, {images_seen} images, "
            f"{seconds:.0f} s, at most {peak:.2f} GiB",
            f"next: {command}",
        ],
    )


def _average_line(file: Path) -> list[str]:
    """Return what is said about the average of the weights; nothing where there is none."""
    # It may be better or worse than the last step's, which are what was compared.
    said = f"ema      {file} (the table is of the last step; evaluate it with --ema)"
    return [said] if file.is_file() else []


def _write_sheet(path: Path, base: Samples, tuned: Samples) -> None:
    """Write a sheet with each image of the base model next to that of the tuned model."""
    cells = [
        Cell(sample.prompt, (before, after), (base.caption(i), tuned.caption(i)))
        for i, (sample, before, after) in enumerate(
            zip(base.samples, base.images, tuned.images, strict=True)
        )
    ]
    contact_sheet(cells, path, titles=("base", "tuned"))


def _reward_row(name: str, result: Paired) -> tuple[str, ...]:
    return (
        name,
        f"{result.base:.4f}",
        f"{result.tuned:.4f}",
        f"{result.difference:+.4f}",
        f"{result.low:+.4f} to {result.high:+.4f}",
    )


def _check_row(part: str, result: Paired) -> tuple[str, ...]:
    return (
        f"{part} right",
        f"{result.base:.0%}",
        f"{result.tuned:.0%}",
        f"{result.difference:+.1%}",
        f"{result.low:+.1%} to {result.high:+.1%}",
    )
