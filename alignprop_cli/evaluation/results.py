"""The result of `alignprop evaluate`: images, sheet, tables, report, and what is printed."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignprop_cli import __version__
from alignprop_cli.console import Console, table
from alignprop_cli.evaluation import page
from alignprop_cli.evaluation.compare import Evaluation, Metrics, remarks
from alignprop_cli.evaluation.plots import Group, histogram, sweep
from alignprop_cli.evaluation.sheet import Cell, contact_sheet, curves, save_image
from alignprop_cli.publishing.request import Published
from alignprop_cli.storage import write_text

SCHEMA = "alignprop.evaluate/4"
"""Name and version of the JSON object; the version changes when a key changes its meaning."""

# More would make the sheet and the report too large to look at; all images are in the folder.
_SHEET_CELLS = 60
_PAGE_CARDS = 200


def write(result: Evaluation, folder: Path) -> None:
    """Write images, the sheet, results.json, results.csv, the report, and the curve."""
    # 1. Every image of every model, with how it was made in its metadata.
    for name, sampled in result.sampled.items():
        (folder / "images" / name).mkdir(parents=True)
        for index, image in enumerate(sampled.images):
            save_image(image, folder / image_path(name, index), _metadata(result, name, index))
    # 2. The sheet, for a look without a browser.
    titles = tuple(result.sampled)
    cells = [
        Cell(
            sample.prompt,
            tuple(result.sampled[name].images[i] for name in titles),
            tuple(result.sampled[name].caption(i) for name in titles),
        )
        for i, sample in enumerate(result.samples[:_SHEET_CELLS])
    ]
    contact_sheet(cells, folder / "sheet.png", titles=titles)
    # 3. The numbers, for programs and spreadsheets.
    values = _values(result)
    text = json.dumps({"schema": SCHEMA, **values}, indent=2)
    write_text(folder / "results.json", text + "\n")
    _write_csv(result, folder / "results.csv")
    # 4. The curve, then the report.
    if len(result.curve) > 1:
        means = {
            name: [by_model[variant].mean for variant in result.variants]
            for name, by_model in result.metrics.items()
        }
        curves(result.curve, means, folder / "curve.png", x_title=result.axis)
    _write_page(result, values, folder)


def image_path(model: str, index: int) -> str:
    """Return where an image of a model is, relative to the folder of the evaluation."""
    return f"images/{model}/{index:04d}.png"


def _metadata(result: Evaluation, name: str, index: int) -> dict[str, str]:
    """Return an image's metadata; `alignprop score` reads `prompt` back."""
    sampled = result.sampled[name]
    sample = sampled.samples[index]
    texts = {
        "prompt": sample.prompt,
        "seed": str(result.seed),
        "prompt_index": str(sample.prompt_index),
        "image_index": str(sample.image_index),
        "model": result.model["id"],
        "num_inference_steps": str(result.sample["num_inference_steps"]),
        "guidance_scale": str(result.sample["guidance_scale"]),
        "eta": str(result.sample["eta"]),
        "rewards": json.dumps({k: float(v[index]) for k, v in sampled.rewards.items()}),
        "Software": f"alignprop {__version__}",
    }
    # The LoRA's hash rather than its name: files are renamed and overwritten.
    if name in result.variants:
        texts["adapter_sha256"] = result.variants[name].sha256
        texts["adapter_strength"] = str(result.variants[name].strength)
        texts["adapter_base_until"] = str(result.variants[name].base_until)
        if (trained_on := result.variants[name].base_model) is not None:
            texts["adapter_base_model"] = trained_on
    return texts


def _values(result: Evaluation) -> dict[str, Any]:
    """Return the content of results.json."""
    return {
        "version": __version__,
        "model": dict(result.model),
        "adapters": {name: asdict(identity) for name, identity in result.variants.items()},
        "prompts": result.prompt_set,
        "prompt_files": dict(result.prompt_files),
        "seed": result.seed,
        "sample": dict(result.sample),
        "images": len(result.samples),
        "rewards": _metric_values(result, result.metrics),
        "groups": {group: _metric_values(result, each) for group, each in result.groups.items()},
        "checker": _metric_values(result, result.checker),
        "seconds": result.seconds,
        "by_prompt": _by_prompt(result),
        "samples": [
            {
                "number": i,
                **asdict(sample),
                "group": result.group_of.get(sample.prompt_index),
                "rewards": {
                    name: {k: float(v[i]) for k, v in sampled.rewards.items()}
                    for name, sampled in result.sampled.items()
                },
            }
            for i, sample in enumerate(result.samples)
        ],
    }


def _metric_values(result: Evaluation, metrics: Metrics) -> dict[str, Any]:
    return {
        name: {
            "trained_on": name in result.trained_on,
            **{
                model: {
                    "mean": metric.mean,
                    "std": metric.std,
                    **(asdict(metric.paired) if metric.paired else {}),
                }
                for model, metric in by_model.items()
            },
        }
        for name, by_model in metrics.items()
    }


def _by_prompt(result: Evaluation) -> list[dict[str, Any]]:
    """Return the mean rewards of every prompt, by model."""
    # By index, not by text: a file of prompts may contain one twice.
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(result.samples):
        groups.setdefault(sample.prompt_index, []).append(i)
    return [
        {
            "prompt": result.samples[members[0]].prompt,
            "images": len(members),
            "rewards": {
                name: {k: float(v[members].mean()) for k, v in sampled.rewards.items()}
                for name, sampled in result.sampled.items()
            },
        }
        for members in groups.values()
    ]


def _write_csv(result: Evaluation, path: Path) -> None:
    """Write one row per image of every model."""
    rewards = tuple(result.sampled["base"].rewards)
    columns = ("model", "file", "prompt_index", "image_index", "seed", "group", "prompt", *rewards)
    # The csv module does not quote a lone carriage return, but readers end a row there.
    texts = (*result.group_of.values(), *(sample.prompt for sample in result.samples))
    quoting = csv.QUOTE_ALL if any("\r" in text for text in texts) else csv.QUOTE_MINIMAL
    with path.open("w", encoding="utf-8", newline="") as file:
        # Line ends as on Unix on every system; the csv module's own are those of Windows.
        rows = csv.writer(file, lineterminator="\n", quoting=quoting)
        rows.writerow(columns)
        for name, sampled in result.sampled.items():
            for i, sample in enumerate(sampled.samples):
                rows.writerow(
                    [
                        name,
                        image_path(name, i),
                        sample.prompt_index,
                        sample.image_index,
                        result.seed,
                        result.group_of.get(sample.prompt_index, ""),
                        sample.prompt,
                        *(f"{sampled.rewards[reward][i]:.6g}" for reward in rewards),
                    ]
                )


def _write_page(result: Evaluation, values: Mapping[str, Any], folder: Path) -> None:
    base = result.sampled["base"]
    # Cards are sorted by the change from the base model to the last one; alone it has no change.
    last = list(result.sampled)[-1]
    cards = [
        page.Card(
            sample.prompt,
            {
                name: page.thumbnail(sampled.images[i], image_path(name, i))
                for name, sampled in result.sampled.items()
            },
            {name: sampled.caption(i) for name, sampled in result.sampled.items()},
            {
                reward: float(result.sampled[last].rewards[reward][i])
                - (float(before[i]) if result.variants else 0.0)
                for reward, before in base.rewards.items()
            },
        )
        for i, sample in enumerate(base.samples[:_PAGE_CARDS])
    ]
    page.write(
        folder / "report.html",
        "evaluation.html",
        title=f"{', '.join(result.variants) or 'base'}: {result.model['id']}",
        values=values,
        sampled_with=_sampled_with(result) if result.other_models else None,
        rows=_rows(result.metrics, result.trained_on),
        columns=COLUMNS,
        by_group={g: _rows(each, result.trained_on) for g, each in result.groups.items()},
        checker=_rows(result.checker, set(), shares=True),
        cards=cards,
        sorts=list(base.rewards),
        sorted_by="change of " if result.variants else "",
        groups=_plots(result),
    )


def _plots(result: Evaluation) -> list[Group]:
    """Return the rewards along the curve, if there is one, and their distributions."""
    groups: list[Group] = []
    if len(result.curve) > 1:
        found = sweep(result.curve, result.metrics, list(result.variants), result.axis)
        groups.append((f"By {result.axis}", found))
    spread = [
        histogram(name, {model: each.rewards[name] for model, each in result.sampled.items()})
        for name in result.sampled["base"].rewards
    ]
    return [*groups, ("Distributions of the rewards", spread)]


def _rows(metrics: Metrics, trained: set[str], *, shares: bool = False) -> list[tuple[str, ...]]:
    """Return the rows of the table and the report, one per metric (or share) and model."""
    # `shares` are of the checker, and shown in per cent.
    rows: list[tuple[str, ...]] = []
    mean, change = ("{:.0%}", "{:+.1%}") if shares else ("{:.4f}", "{:+.4f}")
    for name, by_model in metrics.items():
        for model, metric in by_model.items():
            title = f"{name} (trained on)" if name in trained else name
            title = f"{name} right" if shares else title
            # The title once per metric, in the row of the base model.
            row = (title if model == "base" else "", model, mean.format(metric.mean))
            paired = metric.paired
            if paired is not None:
                row += (
                    change.format(paired.difference),
                    f"{change.format(paired.low)} to {change.format(paired.high)}",
                    f"{paired.wins:.0%}",
                    f"{paired.ties:.0%}",
                )
            else:
                row += ("", "", "", "")
            rows.append(row)
    return rows


COLUMNS = ("", "model", "mean", "difference", "95 % interval", "higher", "equal")


def show(
    console: Console,
    result: Evaluation,
    folder: Path,
    published: Published | None = None,
    layout: str | None = None,
) -> None:
    """Print a table for people, or one JSON object for programs.

    Args:
        console: Prints it.
        result: What is shown.
        folder: Where it was written.
        published: What was exported of it.
        layout: Folder in it that another scorer reads.
    """
    published = published or Published()
    files = {name: folder / name for name in ("results.json", "report.html", "sheet.png")}
    values = {**_values(result), "output": str(folder.resolve())}
    values["sheet"] = str(files["sheet.png"].resolve())
    values["report"] = str(files["report.html"].resolve())
    if layout is not None:
        files["layout"] = folder / layout
        values["layout"] = str(files["layout"].resolve())
    values |= published.values
    parts: list[Any] = [_table(result)]
    if result.other_models:
        parts.append(_sampled_with(result))
    if result.variants:
        parts += remarks(result.samples)
    parts += ["", *(f"{name:12s} {path}" for name, path in files.items()), *published.lines]
    # Said, since a sheet of 60 looks complete.
    count = len(result.samples)
    if count > _SHEET_CELLS:
        parts.append(
            f"the sheet shows the first {_SHEET_CELLS} of {count} images"
            + (f", the report {_PAGE_CARDS}" if count > _PAGE_CARDS else "")
        )
    console.result(SCHEMA, values, parts)


def _sampled_with(result: Evaluation) -> str:
    """Return which model sampled and which ones were trained on, where they differ."""
    return (
        f"all images, with and without a LoRA, are sampled with {result.model['id']}; "
        f"trained on {', '.join(result.other_models)}"
    )


def _table(result: Evaluation) -> Any:
    """Return the table: one row per metric with one LoRA, one row per model with several."""
    title = f"{len(result.samples)} images ({result.prompt_set}), seed {result.seed}"
    metrics, checker = result.metrics, result.checker
    # Several LoRAs: a row for each model, as in the report.
    if len(result.variants) > 1:
        rows = [*_rows(metrics, set()), *_rows(checker, set(), shares=True)]
        return table(title, COLUMNS, rows)
    # One LoRA, or none: its mean is next to the base model's; without one, the spread.
    rows = []
    for measured, shares in ((metrics, False), (checker, True)):
        for name, by_model in measured.items():
            base, *tuned = _rows({name: by_model}, set(), shares=shares)
            spread = "" if shares else f"{by_model['base'].std:.4f}"
            rows.append((base[0], base[2], *(tuned[0][2:] if tuned else (spread,))))
    which = tuple(result.variants)
    return table(title, ("", "base", *which, *COLUMNS[3:]) if which else ("", "mean", "std"), rows)
