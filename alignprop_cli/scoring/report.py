"""What `score` shows at the end: the summary, the best images, the gallery."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from alignprop_cli.console import Console, printable, table
from alignprop_cli.errors import RunError
from alignprop_cli.evaluation import page
from alignprop_cli.evaluation.plots import bin_edges, histogram
from alignprop_cli.scoring.files import read_image
from alignprop_cli.scoring.rows import Row
from alignprop_cli.scoring.run import GALLERY, LISTED, Tally

# Quantiles and bins are in the JSON result; the table shows some of the quantiles.
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 20
# Characters of a prompt on the page.
_SHOWN = 2000
_BLOCKS = " ▁▂▃▄▅▆▇█"


def finish(console: Console, tally: Tally) -> None:
    """Write the gallery if one is wanted, and print notes, the table of rows and the summary.

    Raises:
        RunError: If an image of the gallery cannot be read any more.
    """
    for said in tally.notes():
        console.note(said)
    if tally.wanted.gallery is not None:
        _write_gallery(tally.wanted.gallery, tally)
    _show(console, tally)


def _show(console: Console, tally: Tally) -> None:
    """Print the table of rows, and the summary."""
    # 1. One sentence that says what was done.
    target, top, gallery = tally.wanted.target, tally.wanted.top, tally.wanted.gallery
    summary = {name: _summary(np.asarray(values)) for name, values in tally.values.items()}
    said = f"{tally.count} images measured, {len(tally.skipped)} skipped"
    said += f", {tally.again} with the content of another" if tally.again else ""
    said += f", rows in {target}" if target else ""
    lines = [said, *([f"gallery: {gallery}"] if gallery else [])]
    if target is None and tally.wanted.chosen != "table":
        # Rows went to standard output, so the summary goes to standard error.
        for name, s in summary.items():
            console.note(f"{name}: mean {s['mean']:.4f}, std {s['std']:.4f}")
        for line in lines:
            console.note(line)
        return

    # 2. For people: the best rows if asked for, or all if they are few and in no file.
    listed = tally.ranked(top) if top else tally.first
    parts: list[Any] = []
    if top or (target is None and tally.count <= LISTED):
        parts = [_listing(listed, tally.names), ""]
    elif target is None:
        lines.append(f"more than {LISTED} images are not listed: give --top N or --output FILE")
    parts += [_summary_table(summary), *lines]
    # 3. For programs: the same values, with the rows unless a file has them.
    result: dict[str, Any] = {
        "scored": tally.count,
        "skipped": [{"file": str(s.path), "reason": s.reason} for s in tally.skipped],
        "same_content": tally.again,
        "notes": tally.notes(),
        "rewards": summary,
        "output": str(target.resolve()) if target else None,
        "gallery": str(gallery.resolve()) if gallery else None,
    }
    if target is None or top:
        result["images"] = listed
    console.result("alignprop.score/3", result, parts)


def _write_gallery(file: Path, tally: Tally) -> None:
    """Write a page of the best images."""
    # Decoded again: while they were measured, it was not known which are the best.
    cards: list[page.Card] = []
    for row in tally.ranked(tally.wanted.top or GALLERY):
        try:
            decoded = read_image(Path(row["file"]))
        except ValueError as error:
            raise RunError(f"--gallery: {row['file']} cannot be read any more: {error}") from error
        # Relative to the page, so that both can be moved together; as bytes, since a name need not
        # be UTF-8.
        link = quote(os.fsencode(os.path.relpath(row["file"], file.parent)))
        name, values = printable(Path(row["file"]).name), {n: row[n] for n in tally.names}
        prompt = row["prompt"] or ""
        cards.append(
            page.Card(
                prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}...",
                {name: page.thumbnail(decoded.pixels, link)},
                {name: ", ".join(f"{n} {v:.4f}" for n, v in values.items())},
                values,
            )
        )
    page.write(
        file,
        "gallery.html",
        title=f"{len(cards)} of {tally.count} images",
        names=tally.names,
        cards=cards,
        # Of all images, not of the best alone.
        groups=[("Distributions", [histogram(n, {"images": v}) for n, v in tally.values.items()])],
    )


def _summary(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Return statistics of one metric over all images, shape (N,)."""
    counts, edges = np.histogram(values, bins=bin_edges(values, _BINS))
    quantiles = np.quantile(values, _QUANTILES)
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": {str(q): float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _summary_table(summary: dict[str, dict[str, Any]]) -> Any:
    cells = [
        (
            name,
            *(f"{s[k]:.4f}" for k in ("mean", "std", "min")),
            *(f"{s['quantiles'][str(q)]:.4f}" for q in (0.05, 0.5, 0.95)),
            f"{s['max']:.4f}",
            _bars(s["histogram"]["counts"]),
        )
        for name, s in summary.items()
    ]
    titles = ("", "mean", "std", "min", "5 %", "median", "95 %", "max", "from min to max")
    return table("Rewards", titles, cells)


def _bars(counts: Sequence[int]) -> str:
    """Return a histogram of one character per bin."""
    top = len(_BLOCKS) - 1
    # -(-a // b) rounds up, so that a bin with a single image is visible.
    return "".join(_BLOCKS[-(-count * top // max(counts))] for count in counts)


def _listing(listed: Sequence[Row], names: Sequence[str]) -> Any:
    """Return the rows as a table, with file names relative to the folder that contains them all."""
    folder = Path(os.path.commonpath([Path(row["file"]).absolute().parent for row in listed]))
    cells = [
        (
            printable(Path(row["file"]).absolute().relative_to(folder).as_posix()),
            *(f"{row[name]:.4f}" for name in names),
            row["prompt_source"],
        )
        for row in listed
    ]
    return table(f"Images in {folder}", ("file", *names, "prompt from"), cells)
