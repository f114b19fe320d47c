"""Measuring of `score`: rows as they come, then the summary, the best and the gallery."""

from __future__ import annotations

import heapq
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console, table
from alignprop_cli.device import make_accelerator
from alignprop_cli.errors import RunError
from alignprop_cli.evaluation import page
from alignprop_cli.rewards.mixture import Mixture, build_mixture
from alignprop_cli.scoring import files as pictures
from alignprop_cli.scoring import rows, scorer
from alignprop_cli.scoring.captions import PromptFinder
from alignprop_cli.scoring.rows import Format, Row
from alignprop_cli.scoring.scorer import Scored, Skipped

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 20
_BLOCKS = " ▁▂▃▄▅▆▇█"
# More rows than this are for a file, and more thumbnails make a page of many megabytes.
_LISTED = 100
_GALLERY = 500
# For fewer pictures the start of a process takes longer than the decoding.
_WORTH_WORKERS = 4 * scorer.CHUNK


@dataclass(frozen=True)
class Wanted:
    """What becomes of the measurements.

    Args:
        chosen: Format of the rows.
        target: Their file; None is standard output.
        resume: Whether to keep the rows that the file has.
        top: List only so many, the best; None lists all.
        page: The gallery, if one is asked for.
        strict: Whether a skipped picture is a failure.
        workers: Processes that decode; None chooses.
    """

    chosen: Format
    target: Path | None
    resume: bool
    top: int | None
    page: Path | None
    strict: bool
    workers: int | None


@dataclass
class _Tally:
    """What is kept of the rows: all figures, few rows."""

    names: tuple[str, ...]
    wanted: Wanted
    all_rows: bool
    values: dict[str, array[float]] = field(init=False)
    first: list[Row] = field(default_factory=list[Row])
    best: list[tuple[float, int, Row]] = field(default_factory=list[tuple[float, int, Row]])
    skipped: list[Skipped] = field(default_factory=list[Skipped])
    again: int = 0

    def __post_init__(self) -> None:
        self.values = {name: array("d") for name in self.names}

    @property
    def count(self) -> int:
        return len(self.values[self.names[0]])

    def add(self, row: Row) -> None:
        for name, values in self.values.items():
            values.append(row[name])
        if self.all_rows or self.count <= _LISTED + 1:
            self.first.append(row)
        most = max(self.wanted.top or 0, _GALLERY if self.wanted.page else 0)
        if most:
            # Of equals the earlier one is better.
            heapq.heappush(self.best, (row[self.names[0]], -self.count, row))
            if len(self.best) > most:
                heapq.heappop(self.best)

    def ranked(self, most: int) -> list[Row]:
        """Return the rows with the highest first reward, highest first."""
        return [row for _, _, row in sorted(self.best, key=lambda b: b[:2], reverse=True)[:most]]


def run(
    config: Config,
    console: Console,
    found: list[pictures.Found],
    finder: PromptFinder,
    wanted: Wanted,
) -> None:
    """Measure pictures and say what came out.

    Args:
        config: Its rewards are measured.
        console: For people and for the result.
        found: The files.
        finder: Of the prompts.
        wanted: What becomes of the measurements.

    Raises:
        ConfigError, AssetError: Whatever is wrong with the options, the tables or earlier rows.
        RunError: If nothing was measured, or with `strict` not everything.
    """
    if not found:
        raise RunError(
            "nothing was measured: no pictures were found",
            hint=f"folders are searched for {', '.join(pictures.SUFFIXES)}",
        )
    device = make_accelerator().device
    mixture = build_mixture(config.reward, config.loss, device)
    tally = _Tally(mixture.metrics, wanted, console.as_json and wanted.target is None)
    asked = {
        "rewards": {n: r.model_dump(mode="json") for n, r in config.reward.items()},
        "prompt": finder.prompt,
        "prompts": str(finder.table) if finder.table else None,
    }
    kept = _kept(wanted, mixture, found, asked)
    for row in kept:
        tally.add(row)
    divided = scorer.chunks(found, {pictures.named(Path(row["file"])) for row in kept})
    left = sum(map(len, divided))
    if wanted.resume:
        console.note(f"{len(found) - left} of {len(found)} pictures are measured already")
    with _open(wanted, mixture.metrics, asked, kept) as write:
        with console.bar(left, "scoring") as bar:
            for result in scorer.score(
                divided,
                mixture,
                finder,
                asking=[n for n, r in config.reward.items() if scorer.needs_prompt(n, r.options)],
                device=device,
                workers=_workers(wanted.workers, left),
                known={_key(row): {n: row[n] for n in mixture.metrics} for row in kept},
            ):
                bar.advance()
                if isinstance(result, Skipped):
                    tally.skipped.append(result)
                    console.warn(f"skipped {shown(result.path)}: {result.reason}")
                    continue
                tally.again += result.again
                row = _row(result)
                tally.add(row)
                write(row)
        if not tally.count:
            raise RunError(f"nothing was measured: all {len(found)} pictures were skipped")
    if wanted.page is not None:
        _write_page(wanted.page, tally)
    _report(console, tally)
    if wanted.strict and tally.skipped:
        raise RunError(f"--strict: {len(tally.skipped)} of {len(found)} pictures were skipped")


def _kept(
    wanted: Wanted, mixture: Mixture, found: Sequence[pictures.Found], asked: dict[str, Any]
) -> list[Row]:
    """Return the rows of an earlier run that stay."""
    if not wanted.resume or wanted.target is None:
        return []
    names = mixture.metrics
    resumed = rows.resume(wanted.target, wanted.chosen, names, asked)
    if resumed.whole or not resumed.rows:
        return resumed.rows
    # The last chunk may be incomplete; measured in another company, the last digits could differ.
    last = resumed.rows[-1]["file"]
    chunk = next((c for c in scorer.chunks(found) if last in {str(f.path) for f in c}), [])
    return resumed.keep({str(each.path) for each in chunk})


def _open(
    wanted: Wanted, names: Sequence[str], asked: dict[str, Any], kept: list[Row]
) -> AbstractContextManager[Callable[[Row], None]]:
    if wanted.target is not None:
        return rows.to_file(wanted.target, wanted.chosen, names, asked, kept)
    return rows.to_standard_output(wanted.chosen, names, listed=wanted.chosen == "table")


def _workers(wanted: int | None, count: int) -> int:
    """Return how many processes decode: half of the cores, at most four."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, (cores or 1) // 2) if count >= _WORTH_WORKERS else 0


def _row(result: Scored) -> Row:
    return {
        "file": str(result.path),
        **result.rewards,
        "prompt": result.prompt,
        "prompt_source": result.prompt_source,
        "content": result.content,
    }


def _key(row: Row) -> tuple[str, str | None]:
    return row["content"], row["prompt"]


def _report(console: Console, tally: _Tally) -> None:
    """Print the rows that are for people, and the summary."""
    wanted = tally.wanted
    summary = {name: _figures(np.asarray(values)) for name, values in tally.values.items()}
    said = f"{tally.count} pictures measured, {len(tally.skipped)} skipped"
    said += f", {tally.again} with the content of another" if tally.again else ""
    said += f", rows in {wanted.target}" if wanted.target else ""
    lines = [said, *([f"gallery: {wanted.page}"] if wanted.page else [])]
    if wanted.target is None and wanted.chosen != "table":
        # Standard output belongs to the rows.
        for name, s in summary.items():
            console.note(f"{name}: mean {s['mean']:.4f}, std {s['std']:.4f}")
        for line in lines:
            console.note(line)
        return
    listed = tally.ranked(wanted.top) if wanted.top else tally.first
    parts: list[Any] = []
    if wanted.top or (wanted.target is None and tally.count <= _LISTED):
        parts = [_listing(listed, tally.names), ""]
    elif wanted.target is None:
        lines.append(f"more than {_LISTED} pictures are not listed: give --top N or --output FILE")
    figures = [
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
    parts += [table("Rewards", titles, figures), *lines]
    result: dict[str, Any] = {
        "scored": tally.count,
        "skipped": [{"file": str(s.path), "reason": s.reason} for s in tally.skipped],
        "same_content": tally.again,
        "rewards": summary,
        "output": str(wanted.target.resolve()) if wanted.target else None,
        "gallery": str(wanted.page.resolve()) if wanted.page else None,
    }
    if wanted.target is None or wanted.top:
        result["pictures"] = listed
    console.result("alignprop.score/2", result, parts)


def shown(path: Path) -> str:
    """Return a path for a screen: on one line, without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path.as_posix())


def _figures(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=_BINS)
    quantiles = np.quantile(values, _QUANTILES)
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": {str(q): float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _bars(counts: Sequence[int]) -> str:
    """Return a small histogram; what is not empty is seen, however low."""
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[-(-count * top // max(counts))] for count in counts)


def _listing(listed: Sequence[Row], names: Sequence[str]) -> Any:
    """Return the rows as a table, with files named from the folder that holds them all."""
    folder = Path(os.path.commonpath([Path(row["file"]).absolute().parent for row in listed]))
    cells = [
        (
            shown(Path(row["file"]).absolute().relative_to(folder)),
            *(f"{row[name]:.4f}" for name in names),
            row["prompt_source"],
        )
        for row in listed
    ]
    return table(f"Pictures in {folder}", ("file", *names, "prompt from"), cells)


def _write_page(file: Path, tally: _Tally) -> None:
    """Write the gallery of the best pictures, decoding them once more."""
    cards: list[page.Card] = []
    for row in tally.ranked(tally.wanted.top or _GALLERY):
        try:
            decoded = pictures.read_picture(Path(row["file"]))
        except ValueError as error:
            raise RunError(f"--gallery: {row['file']} cannot be read any more: {error}") from error
        link = quote(os.path.relpath(row["file"], file.parent))
        name, figures = Path(row["file"]).name, {n: row[n] for n in tally.names}
        cards.append(
            page.Card(
                row["prompt"] or "",
                {name: page.thumbnail(decoded.pixels, link)},
                {name: ", ".join(f"{n} {v:.4f}" for n, v in figures.items())},
                figures,
            )
        )
    page.write(
        file,
        "gallery.html",
        title=f"{len(cards)} of {tally.count} pictures",
        names=tally.names,
        cards=cards,
    )
