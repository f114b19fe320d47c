"""What `alignprop evaluate` leaves: pictures, the sheet, tables, the report, and what it prints."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli import __version__
from alignprop_cli.console import Console, table
from alignprop_cli.evaluation import page
from alignprop_cli.evaluation import sheet as report
from alignprop_cli.storage import write_text

if TYPE_CHECKING:
    from alignprop_cli.evaluation.compare import Evaluation, Figure

_SHEET_CELLS = 60
"""More would make the sheet too large to look at; all pictures are in the folder."""

_PAGE_PICTURES = 200
"""The same for the report."""


def write(result: Evaluation, folder: Path) -> None:
    """Write pictures, the sheet, results.json, results.csv, the report, and the curve."""
    for name, drawn in result.drawn.items():
        images = folder / "images" / name
        images.mkdir(parents=True)
        for index, image in enumerate(drawn.images):
            report.save_picture(image, images / _file(index), _metadata(result, name, index))
    titles = tuple(result.drawn)
    cells = [
        report.Cell(
            picture.prompt,
            tuple(result.drawn[name].images[i] for name in titles),
            tuple(result.drawn[name].caption(i) for name in titles),
        )
        for i, picture in enumerate(result.drawn["base"].pictures[:_SHEET_CELLS])
    ]
    report.contact_sheet(cells, folder / "sheet.png", titles=titles)
    values = _values(result)
    text = json.dumps({"schema": "alignprop.evaluate/3", **values}, indent=2)
    write_text(folder / "results.json", text + "\n")
    _write_csv(result, folder / "results.csv")
    if len(result.curve) > 1:
        means = {
            name: [by_model[which].mean for which in result.variants]
            for name, by_model in result.figures.items()
        }
        report.curves(result.curve, means, folder / "curve.png", x_title=result.axis)
    _write_page(result, values, folder)


def _file(index: int) -> str:
    return f"{index:04d}.png"


def _metadata(result: Evaluation, name: str, index: int) -> dict[str, str]:
    """Return what a picture says of itself; `alignprop score` reads `prompt` back."""
    drawn, sample = result.drawn[name], result.config.sample
    picture = drawn.pictures[index]
    texts = {
        "prompt": picture.prompt,
        "seed": str(result.config.eval.seed),
        "prompt_index": str(picture.prompt_index),
        "image_index": str(picture.image_index),
        "model": result.model["id"],
        "num_inference_steps": str(sample.num_inference_steps),
        "guidance_scale": str(sample.guidance_scale),
        "eta": str(sample.eta),
        "rewards": json.dumps({k: float(v[index]) for k, v in drawn.rewards.items()}),
        "Software": f"alignprop {__version__}",
    }
    if name in result.variants:
        texts["adapter_sha256"] = str(result.variants[name]["sha256"])
        texts["adapter_strength"] = str(result.variants[name]["strength"])
    return texts


def _values(result: Evaluation) -> dict[str, Any]:
    """Return everything that results.json holds."""
    base = result.drawn["base"]
    return {
        "version": __version__,
        "model": dict(result.model),
        "adapters": {name: dict(identity) for name, identity in result.variants.items()},
        "prompts": result.config.eval.prompts,
        "seed": result.config.eval.seed,
        "sample": result.config.sample.model_dump(mode="json"),
        "images": len(base.pictures),
        "rewards": _figure_values(result, result.figures),
        "groups": {group: _figure_values(result, own) for group, own in result.groups.items()},
        "checker": _figure_values(result, result.checker),
        "seconds": result.seconds,
        "by_prompt": _by_prompt(result),
        "pictures": [
            {
                "number": i,
                **asdict(picture),
                "group": result.group_of.get(picture.prompt),
                "rewards": {
                    name: {k: float(v[i]) for k, v in drawn.rewards.items()}
                    for name, drawn in result.drawn.items()
                },
            }
            for i, picture in enumerate(base.pictures)
        ],
    }


def _figure_values(
    result: Evaluation, figures: Mapping[str, Mapping[str, Figure]]
) -> dict[str, Any]:
    return {
        name: {
            "trained_on": name in result.trained,
            **{
                which: {
                    "mean": figure.mean,
                    "std": figure.std,
                    **(asdict(figure.paired) if figure.paired else {}),
                }
                for which, figure in by_model.items()
            },
        }
        for name, by_model in figures.items()
    }


def _by_prompt(result: Evaluation) -> list[dict[str, Any]]:
    """Return the mean rewards of every prompt, by model."""
    base = result.drawn["base"]
    groups: dict[int, list[int]] = {}
    for i, picture in enumerate(base.pictures):
        groups.setdefault(picture.prompt_index, []).append(i)
    return [
        {
            "prompt": base.pictures[members[0]].prompt,
            "images": len(members),
            "rewards": {
                name: {k: float(v[members].mean()) for k, v in drawn.rewards.items()}
                for name, drawn in result.drawn.items()
            },
        }
        for members in groups.values()
    ]


def _write_csv(result: Evaluation, path: Path) -> None:
    """Write one row for every picture of every model."""
    rewards = tuple(result.drawn["base"].rewards)
    columns = ("model", "file", "prompt_index", "image_index", "seed", "group", "prompt", *rewards)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        for name, drawn in result.drawn.items():
            for i, picture in enumerate(drawn.pictures):
                rows.writerow(
                    [
                        name,
                        f"images/{name}/{_file(i)}",
                        picture.prompt_index,
                        picture.image_index,
                        result.config.eval.seed,
                        result.group_of.get(picture.prompt, ""),
                        picture.prompt,
                        *(f"{drawn.rewards[reward][i]:.6g}" for reward in rewards),
                    ]
                )


def _write_page(result: Evaluation, values: Mapping[str, Any], folder: Path) -> None:
    base = result.drawn["base"]
    last = list(result.drawn)[-1]
    cards = [
        page.Card(
            picture.prompt,
            {
                name: page.picture(drawn.images[i], f"images/{name}/{_file(i)}")
                for name, drawn in result.drawn.items()
            },
            {name: drawn.caption(i) for name, drawn in result.drawn.items()},
            {
                reward: float(result.drawn[last].rewards[reward][i] - own[i])
                for reward, own in base.rewards.items()
            },
        )
        for i, picture in enumerate(base.pictures[:_PAGE_PICTURES])
    ]
    curve = folder / "curve.png"
    page.write(
        folder / "report.html",
        "evaluation.html",
        title=f"{', '.join(result.variants) or 'base'}: {result.config.model.id}",
        values=values,
        rows=_rows(result.figures, result.trained),
        groups={g: _rows(own, result.trained) for g, own in result.groups.items()},
        checker=_rows(result.checker, set(), shares=True),
        cards=cards,
        sorts=list(base.rewards),
        curve=page.file(curve) if curve.is_file() else None,
        axis=result.axis,
    )


def _rows(
    figures: Mapping[str, Mapping[str, Figure]], trained: set[str], *, shares: bool = False
) -> list[tuple[str, ...]]:
    """Return a row for every reward or share and model: what the table and the report show."""
    rows: list[tuple[str, ...]] = []
    mean, change = ("{:.0%}", "{:+.1%}") if shares else ("{:.4f}", "{:+.4f}")
    for name, by_model in figures.items():
        for which, figure in by_model.items():
            title = f"{name} (trained on)" if name in trained else name
            title = f"{name} right" if shares else title
            row = (title if which == "base" else "", which, mean.format(figure.mean))
            paired = figure.paired
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


def show(console: Console, result: Evaluation, folder: Path) -> None:
    """Print tables for people or one object for programs."""
    files = {name: folder / name for name in ("results.json", "report.html", "sheet.png")}
    values = {**_values(result), "output": str(folder.resolve())}
    values["sheet"] = str(files["sheet.png"].resolve())
    values["report"] = str(files["report.html"].resolve())
    count = len(result.drawn["base"].pictures)
    title = f"{count} pictures ({result.config.eval.prompts}), seed {result.config.eval.seed}"
    parts: list[Any] = []
    if len(result.variants) == 1:
        rows = [
            (name, f"{by['base'].mean:.4f}", *own[2:])
            for name, by in result.figures.items()
            for own in _rows({name: by}, set())[1:]
        ]
        (which,) = result.variants
        for part, by in result.checker.items():
            base, own = _rows({part: by}, set(), shares=True)
            rows.append((base[0], base[2], *own[2:]))
        columns = ("", "base", which, *COLUMNS[3:])
        parts.append(table(title, columns, rows))
    elif result.variants:
        rows = [*_rows(result.figures, set()), *_rows(result.checker, set(), shares=True)]
        parts.append(table(title, COLUMNS, rows))
    else:
        rows = [
            (n, f"{by['base'].mean:.4f}", f"{by['base'].std:.4f}")
            for n, by in result.figures.items()
        ]
        rows += [(f"{p} right", f"{s['base'].mean:.0%}", "") for p, s in result.checker.items()]
        parts.append(table(title, ("", "mean", "std"), rows))
    parts += ["", *(f"{name:12s} {path}" for name, path in files.items())]
    if count > _SHEET_CELLS:
        parts.append(
            f"the sheet shows the first {_SHEET_CELLS} of {count} pictures"
            + (f", the report {_PAGE_PICTURES}" if count > _PAGE_PICTURES else "")
        )
    console.result("alignprop.evaluate/3", values, parts)
