"""Measure image files: write their rows one by one, and keep a tally for the summary."""

from __future__ import annotations

import heapq
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.console import Console, printable
from alignprop_cli.errors import RunError
from alignprop_cli.prompts import cut_note
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.mixture import Mixture, build_mixture, no_latents
from alignprop_cli.scoring import files, rows, scorer
from alignprop_cli.scoring.captions import PromptFinder
from alignprop_cli.scoring.rows import Format, Row
from alignprop_cli.scoring.scorer import Scored, Skipped

LISTED = 100
"""Most rows that are printed as a table; more belong in a file."""

GALLERY = 500
"""Most thumbnails on a page; more would make it many megabytes."""

# Remarks on images that are printed.
_REMARKS = 10

# For fewer images, starting a worker process takes longer than decoding them.
_WORTH_WORKERS = 4 * scorer.CHUNK


@dataclass(frozen=True)
class Measures:
    """What is measured.

    Args:
        mixture: The rewards.
        device: The device that they are on.
        needing: Names of the rewards that need a prompt; see `scorer.needs_prompt`.
        described: The rewards and their options as plain values. Rows of an earlier run are kept
            only if its rewards and options were the same.
    """

    mixture: Mixture
    device: torch.device
    needing: Sequence[str]
    described: Mapping[str, Any]


def build_measures(
    rewards: Mapping[str, RewardConfig], loss: LossConfig, device: torch.device
) -> Measures:
    """Build the rewards of a configuration on a device.

    Raises:
        ConfigError, AssetError: As `build_mixture`; also a ConfigError for a reward that takes
            latents.
    """
    # Before weights are loaded that can measure nothing.
    for name, reward in rewards.items():
        registry.check(name, reward.options)
        if registry.takes_latents(name):
            raise no_latents(name)
    return Measures(
        build_mixture(rewards, loss, device),
        device,
        needing=[n for n, r in rewards.items() if scorer.needs_prompt(n, r.options)],
        described={n: r.model_dump(mode="json") for n, r in rewards.items()},
    )


@dataclass(frozen=True)
class Wanted:
    """What to do with the measurements.

    Args:
        chosen: Format of the rows.
        target: File of the rows; None is standard output.
        resume: Whether to keep the rows that the file has.
        top: List only this many rows, the best by the first reward; None lists all.
        gallery: File of a page with thumbnails of the best images; None writes no page.
        all_rows: Whether to keep every row in memory, for one JSON object.
        workers: Number of processes that decode; None chooses it.
    """

    chosen: Format
    target: Path | None = None
    resume: bool = False
    top: int | None = None
    gallery: Path | None = None
    all_rows: bool = False
    workers: int | None = None


@dataclass
class Tally:
    """What is kept in memory: every value, but only few rows.

    Args:
        names: Names of the metrics.
        wanted: What to do with the measurements.
    """

    names: tuple[str, ...]
    wanted: Wanted
    values: dict[str, array[float]] = field(init=False)
    first: list[Row] = field(default_factory=list[Row])
    best: list[tuple[float, int, Row]] = field(default_factory=list[tuple[float, int, Row]])
    skipped: list[Skipped] = field(default_factory=list[Skipped])
    again: int = 0
    # How many images there are for each remark, and the first of them.
    remarks: dict[str, tuple[int, Path]] = field(default_factory=dict[str, tuple[int, Path]])
    # Of each reward: the prompts that it does not read to their end.
    cut: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    prompts: set[int] = field(default_factory=set[int])

    def __post_init__(self) -> None:
        # Arrays of doubles: millions of images take 8 bytes per value.
        self.values = {name: array("d") for name in self.names}

    @property
    def count(self) -> int:
        """Return the number of images that were measured."""
        return len(self.values[self.names[0]])

    def add(self, row: Row) -> None:
        """Add a row."""
        for name, values in self.values.items():
            values.append(row[name])
        # One row more than are listed shows that there are too many for a table.
        if self.wanted.all_rows or self.count <= LISTED + 1:
            self.first.append(row)
        most = max(self.wanted.top or 0, GALLERY if self.wanted.gallery else 0)
        if most:
            # A heap of the best so far, the worst of them first. Of equal rewards the earlier image
            # is better, and the different counts keep the heap from comparing rows.
            heapq.heappush(self.best, (row[self.names[0]], -self.count, row))
            if len(self.best) > most:
                heapq.heappop(self.best)

    def note(self, result: Scored, mixture: Mixture) -> None:
        """Take down what is to be said about an image that was measured."""
        for remark in filter(None, (result.remark, result.why)):
            count, first = self.remarks.get(remark, (0, result.path))
            self.remarks[remark] = count + 1, first
        # Each different prompt once; their hashes, since there may be millions.
        if result.prompt is not None and hash(result.prompt) not in self.prompts:
            self.prompts.add(hash(result.prompt))
            for name in mixture.cutting(result.prompt):
                self.cut.setdefault(name, set()).add(result.prompt)

    def notes(self) -> list[str]:
        """Return the sentences about all images."""
        found = [
            f"{count} images: {remark} (the first is {printable(first.as_posix())})"
            for remark, (count, first) in islice(self.remarks.items(), _REMARKS)
        ]
        if (more := len(self.remarks) - len(found)) > 0:
            found.append(f"and {more} more remarks")
        total = len(self.prompts)
        return [*found, *(cut_note(name, cut, total) for name, cut in self.cut.items())]

    def ranked(self, most: int) -> list[Row]:
        """Return the rows with the highest first reward, highest first."""
        return [row for _, _, row in sorted(self.best, key=lambda b: b[:2], reverse=True)[:most]]


def run(
    found: Sequence[files.Found],
    measures: Measures,
    finder: PromptFinder,
    wanted: Wanted,
    console: Console,
) -> Tally:
    """Measure image files and write their rows.

    Args:
        found: The files, at least one.
        measures: What is measured.
        finder: Finds the prompts.
        wanted: What to do with the measurements.
        console: For progress and warnings.

    Raises:
        ConfigError, AssetError: If a table of prompts or the rows of an earlier run are invalid.
        RunError: If nothing was measured.
    """
    names = measures.mixture.metrics
    settings = _settings(measures, finder)
    tally = Tally(names, wanted)
    # 1. Rows of an earlier run count as measured.
    kept = _kept(wanted, names, found, settings, finder)
    known = _count(kept, tally)
    divided = scorer.chunks(found, {files.named(Path(row["file"])) for row in kept})
    left = sum(map(len, divided))
    _say_unused(finder, found, console)
    if wanted.resume:
        console.note(f"{len(found) - left} of {len(found)} images have been measured already")

    # 2. Measure the others. Each row is written as soon as it is there.
    with _open(wanted, names, settings, kept) as write:
        with console.bar(left, "scoring") as bar:
            for result in scorer.score(
                divided,
                measures.mixture,
                finder,
                needing=measures.needing,
                device=measures.device,
                workers=_workers(wanted.workers, left),
                # An image of an earlier run is not measured again under another name.
                known=known,
            ):
                bar.advance()
                if isinstance(result, Skipped):
                    tally.skipped.append(result)
                    console.warn(f"skipped {printable(result.path.as_posix())}: {result.reason}")
                    continue
                tally.again += result.again
                tally.note(result, measures.mixture)
                row = _row(result)
                tally.add(row)
                write(row)
        # Raised inside the block, so that no empty file is written.
        if not tally.count:
            raise RunError(f"nothing was measured: all {len(found)} images were skipped")
    return tally


def _count(kept: Sequence[Row], tally: Tally) -> scorer.Known:
    """Count the rows of an earlier run, and return the rewards that are known by them."""
    known: dict[tuple[str, str | None], dict[str, float]] = {}
    for row in kept:
        tally.add(row)
        tally.again += _key(row) in known
        known[_key(row)] = {name: row[name] for name in tally.names}
    return known


def _say_unused(finder: PromptFinder, found: Sequence[files.Found], console: Console) -> None:
    """Warn of a table of prompts that is about other files."""
    if finder.table is not None and all(finder.given(each) is None for each in found):
        console.warn(
            f"--prompts: {finder.table} names none of the images; its file_name is relative to its "
            "folder, or to the one that is searched"
        )


def _settings(measures: Measures, finder: PromptFinder) -> dict[str, Any]:
    """Return what the rows depend on. Rows of an earlier run are valid if it is the same."""
    return {
        "rewards": measures.described,
        "prompt": finder.prompt,
        "prompts": str(finder.table) if finder.table else None,
    }


def _kept(
    wanted: Wanted,
    names: Sequence[str],
    found: Sequence[files.Found],
    settings: Mapping[str, Any],
    finder: PromptFinder,
) -> list[Row]:
    """Return the rows of an earlier run that are kept."""
    if not wanted.resume or wanted.target is None:
        return []
    resumed = rows.resume(wanted.target, wanted.chosen, names, settings)
    # A table that is new or was changed since may have other prompts.
    images = {files.named(each.path): each for each in found}
    for row in resumed.rows:
        if (image := images.get(files.named(Path(row["file"])))) is not None:
            given = finder.given(image)
            same = row["prompt_source"] != "file" if given is None else given[0] == row["prompt"]
            if not same:
                raise rows.other(wanted.target)
    if resumed.whole or not resumed.rows:
        return resumed.rows
    # The run may have stopped within a chunk. All of the chunk is measured again: in a batch with
    # fewer images the last digits could differ.
    last = resumed.rows[-1]["file"]
    chunk = next((c for c in scorer.chunks(found) if last in {str(f.path) for f in c}), [])
    return resumed.keep({str(each.path) for each in chunk})


def _open(
    wanted: Wanted, names: Sequence[str], settings: Mapping[str, Any], kept: list[Row]
) -> AbstractContextManager[Callable[[Row], None]]:
    """Return a context manager that yields the function that writes a row."""
    if wanted.target is not None:
        return rows.to_file(wanted.target, wanted.chosen, names, settings, kept)
    return rows.to_standard_output(wanted.chosen, names, listed=wanted.chosen == "table")


def _workers(wanted: int | None, count: int) -> int:
    """Return how many processes decode: half of the cores, at most four; none for few images."""
    if wanted is not None:
        return wanted
    # The affinity is what a container or a batch system grants; cpu_count() is the whole machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, (cores or 1) // 2) if count >= _WORTH_WORKERS else 0


def _row(result: Scored) -> Row:
    """Return the row of a measured image, with its columns in the order of `rows.columns`."""
    return {
        "file": str(result.path),
        **result.rewards,
        "prompt": result.prompt,
        "prompt_source": result.prompt_source,
        "content": result.content,
    }


def _key(row: Row) -> tuple[str, str | None]:
    """Return what the rewards of an image depend on, its pixels and its prompt."""
    return row["content"], row["prompt"]
