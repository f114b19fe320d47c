"""The end of a run: the before/after sheet, summary.json, the report, and what is printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from alignprop_cli.console import Console, table
from alignprop_cli.device import is_first, peak_gib
from alignprop_cli.errors import AssetError
from alignprop_cli.evaluation.compare import Paired, checks, compare, remarks
from alignprop_cli.evaluation.draw import Samples
from alignprop_cli.evaluation.sheet import Cell, contact_sheet
from alignprop_cli.lora.files import BEST, EMA_FOLDER, LORA_FILE, latest
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text
from alignprop_cli.publishing import card
from alignprop_cli.publishing.request import CARD, Published
from alignprop_cli.publishing.results import publish, write_card
from alignprop_cli.shipped import next_command, python_call
from alignprop_cli.storage import write_text
from alignprop_cli.training.callbacks import Run
from alignprop_cli.training.guard import Verdict
from alignprop_cli.training.report import REPORT, Outcome, Report

SCHEMA = "alignprop.train/2"
"""Name and version of the JSON object; the version changes when a key changes its meaning."""

# Pairs on the sheet: with more it would be too large to look at.
_SHEET_CELLS = 32


def finish(
    run: Run, base: Samples, tuned: Samples, verdict: Verdict, seconds: float, report: Report
) -> Published:
    """Write the before/after sheet, the summary and the report, and print the result.

    Args:
        run: The run.
        base: Held-out samples of the base model.
        tuned: The same of the adapter; where the guard stopped the run, of its best checkpoint.
        verdict: What the guard says.
        seconds: Of the whole run.
        report: Gets what is known now.

    Returns:
        What was made of the result. Where that failed the result is complete all the same.
    """
    # 1. The comparison: the same samples of the base and the tuned model, pair by pair.
    folder, console = run.folder, run.console
    paired, checked = _compare(run, base, tuned)
    # 2. Files. The tuned model is that of the last step, unless the guard stopped the run there.
    took_best = verdict.stopped and verdict.best is not None
    adapter = folder / "checkpoints" / BEST if took_best else latest(folder)
    names = ("base", f"step {verdict.best}" if took_best else "tuned")
    sheet = folder / "before_after.png"
    write_sheet(sheet, base, tuned, names)
    values = _values(run, verdict, seconds, adapter, sheet)
    values["held_out"] = held_out = _held_out(run, base, paired, checked)
    # 3. The same for people.
    rows = [*map(_reward_row, paired, paired.values()), *map(_check_row, checked, checked.values())]
    columns = ("", *names, "difference", "95 % interval")
    title = f"{held_out['images']} held-out samples ({held_out['prompts']}), {' and '.join(names)}"
    report.finish(Outcome(title, columns, rows, base, tuned, names, seconds))
    # The card first: a run that is killed before its summary is resumed to write both.
    about = _card(run, values, base)
    values["card"] = str(write_card(adapter, about, sheet).resolve())
    write_text(folder / "summary.json", json.dumps(values, indent=2) + "\n")
    if verdict.stopped:
        console.warn(verdict.told)
    # 4. What is made of the result, which is on the disk whatever fails here.
    published = _publish(run, adapter, about, sheet)
    values |= published.values
    console.result(
        SCHEMA,
        values,
        [
            *_compared(title, columns, rows, base),
            *([f"guard: {verdict.told}"] if verdict.told else []),
            f"adapter  {adapter / LORA_FILE}",
            *_average_line(adapter),
            f"images   {sheet}{_some(len(base.samples))}",
            f"report   {folder / REPORT}",
            f"card     {adapter / CARD}",
            *published.lines,
            f"{values['steps']} steps, {values['images_seen']} images, "
            f"{seconds:.0f} s, at most {values['peak_memory_gib']:.2f} GiB",
            f"next: {values['next']}",
        ],
    )
    return published


def _compared(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], base: Samples
) -> list[Any]:
    """Return the table of differences, and what has to be said beside it."""
    return [table(title, columns, rows), *remarks(base.samples), ""]


def show_again(console: Console, run: Path, published: Published) -> bool:
    """Print what has now been made of the result of an earlier run, with that result for programs.

    Args:
        console: Prints it.
        run: The run folder.
        published: What was made of it.

    Returns:
        Whether there is anything to print.
    """
    if not published.values:
        return False
    if not is_first():
        return True
    try:
        found = read_json(read_text(run / "summary.json", "--resume"))
    except (AssetError, ParseError):
        found = {}  # damaged; what was asked for is done all the same
    values = {**found, **published.values} if isinstance(found, dict) else published.values
    console.result(SCHEMA, values, published.lines)
    return True


def _compare(
    run: Run, base: Samples, tuned: Samples
) -> tuple[dict[str, Paired], dict[str, Paired]]:
    """Return how rewards and extra metrics compare, and what the checker found right."""
    metrics = (run.measured or run.trainer.mixture).metrics
    paired = {
        name: compare(base.samples, base.rewards[name], tuned.rewards[name]) for name in metrics
    }
    checked = {
        part: compare(base.samples, right["base"], right["tuned"])
        for part, right in checks({"base": base, "tuned": tuned}).items()
    }
    return paired, checked


def _held_out(
    run: Run, base: Samples, paired: Mapping[str, Paired], checked: Mapping[str, Paired]
) -> dict[str, Any]:
    """Return the comparison as summary.json has it."""
    return {
        "prompts": run.config.eval.prompts,
        "images": len(base.samples),
        "rewards": {name: asdict(result) for name, result in paired.items()},
        "checker": {part: asdict(result) for part, result in checked.items()},
    }


def _card(run: Run, values: Mapping[str, Any], base: Samples) -> card.Card:
    model, prompts = run.trainer.model, [sample.prompt for sample in base.samples]
    title, kind = run.folder.resolve().name, model.family.pipeline_class
    known = run.trainer.stream.prompts
    return card.of_run(run.config, title, kind, model.fingerprint, values, prompts, known)


def _publish(run: Run, adapter: Path, about: card.Card, sheet: Path) -> Published:
    file, title = adapter / LORA_FILE, run.folder.resolve().name
    return publish(run.publish, file, run.config.model, run.folder, title, about, sheet)


def _values(
    run: Run, verdict: Verdict, seconds: float, adapter: Path, sheet: Path
) -> dict[str, Any]:
    """Return the content of summary.json, but for the comparison."""
    folder, steps = run.folder, run.trainer.step_number
    average = adapter / EMA_FOLDER / LORA_FILE
    named = f"--checkpoint {BEST} " if adapter.name == BEST else ""
    place = shlex.quote(str(folder))
    # It repeats the options that config.yaml may not set by itself (config/trust.py).
    command = next_command(f"alignprop evaluate {named}{place}", run.config)
    best = {"checkpoint": BEST} if named else {}
    command = python_call("evaluate", run.config, target=str(folder), **best) or command
    return {
        "run": str(folder.resolve()),
        "adapter": str((adapter / LORA_FILE).resolve()),
        "weights": f"step {verdict.best}" if adapter.name == BEST else "last step",
        **({"ema_adapter": str(average.resolve())} if average.is_file() else {}),
        "sheet": str(sheet.resolve()),
        "steps": steps,
        "images_seen": steps * run.config.train.batch_size,
        "seconds": seconds,
        "peak_memory_gib": peak_gib(run.trainer.model.device),
        "guard": {
            "stopped": verdict.stopped,
            "told": verdict.told,
            "best_step": verdict.best,
            "best": None
            if verdict.best is None
            else str((folder / "checkpoints" / BEST / LORA_FILE).resolve()),
        },
        "next": command,
    }


def _average_line(adapter: Path) -> list[str]:
    """Return what is said about the average of the weights; nothing where there is none."""
    file = adapter / EMA_FOLDER / LORA_FILE
    # It may be better or worse than the step's own weights, which are what was compared.
    said = f"ema      {file} (not what the table shows; evaluate it with --ema)"
    return [said] if file.is_file() else []


def _some(count: int) -> str:
    """Return what is said of a sheet that does not show everything."""
    return f" ({_SHEET_CELLS} of {count})" if count > _SHEET_CELLS else ""


def write_sheet(path: Path, base: Samples, tuned: Samples, titles: tuple[str, str]) -> None:
    """Write a sheet with images of the base model next to those of the tuned model."""
    # Some at random, where there are many: the first ones of a sorted set would be of one kind.
    shown = np.sort(np.random.default_rng(0).permutation(len(base.samples))[:_SHEET_CELLS])
    base, tuned = base[shown], tuned[shown]
    cells = [
        Cell(sample.prompt, (before, after), (base.caption(i), tuned.caption(i)))
        for i, (sample, before, after) in enumerate(
            zip(base.samples, base.images, tuned.images, strict=True)
        )
    ]
    contact_sheet(cells, path, titles=titles)


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
