"""The only printer: results go to standard output, everything for people to standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from alignprop_cli.errors import AlignPropError


class _Rate(ProgressColumn):
    """Seconds for each, or how many a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1.0 else f"{1.0 / speed:.1f} s each")


class Bar:
    """One progress bar; `advance` moves it, and shows a text such as the smoothed reward."""

    def __init__(self, progress: Progress | None, total: int, label: str) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(label, total=total, note="")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Move on by `count`; `note` replaces the text at the end of the line."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count)
            if note is not None:
                self._progress.update(self._task, note=escape(note))


class Console:
    """Prints for people, or one JSON object, or nothing but errors.

    Args:
        as_json: The result is one JSON object on standard output, nothing else is printed there.
        quiet: No progress, no notes; results, warnings and errors remain.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._out = RichConsole(highlight=False, emoji=False, soft_wrap=True)
        self._err = RichConsole(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        if not self._out.is_terminal:
            # In a file or a pipe a table is as wide as it needs to be.
            self._out.width = 200

    def note(self, text: str) -> None:
        """Tell people something on standard error, unless quiet."""
        if not self.quiet:
            self._err.print(escape(text))

    def warn(self, text: str) -> None:
        """Warn on standard error."""
        self._err.print(f"[yellow]warning:[/] {escape(text)}")

    def error(self, error: AlignPropError) -> None:
        """Print a known error and what to do about it on standard error."""
        self._err.print(f"[red]error:[/] {escape(error.message)}")
        if error.hint:
            self._err.print(f"[cyan]hint:[/] {escape(error.hint)}")

    def text(self, text: str) -> None:
        """Print a result as it is on standard output."""
        self._out.print(escape(text))

    def result(self, schema: str, values: Mapping[str, Any], human: Sequence[Any] = ()) -> None:
        """Print the result of a command: one JSON object, or tables and lines for people.

        Args:
            schema: Name and version of the object, such as alignprop.train/1.
            values: The object; non-finite numbers become null.
            human: Texts and tables to print instead when not in JSON mode.
        """
        if self.as_json:
            # Not through rich, which would wrap or colour it.
            text = json.dumps({"schema": schema, **_plain(values)}, ensure_ascii=False)
            # A file's name need not be UTF-8.
            self._out.file.write(text.encode("utf-8", "replace").decode("utf-8") + "\n")
            return
        for part in human:
            self._out.print(escape(part) if isinstance(part, str) else part)

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Bar]:
        """Show a progress bar with rate and time left on standard error while the block runs."""
        if self.quiet or self.as_json or not self._err.is_terminal:
            yield Bar(None, total, label)
            return
        # `transient`: the bar is gone afterwards, and the result stands alone.
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            _Rate(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._err, transient=True) as progress:
            yield Bar(progress, total, label)


def printable(text: str) -> str:
    """Return a text, such as a file's name, on one line and without what steers a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def write_bytes(data: bytes) -> None:
    """Write to standard output as it is: names of files need not be UTF-8."""
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True
) -> Table:
    """Return a plain table; columns of numbers, all but the first, are aligned to the right."""
    made = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(escape(column), justify="right" if numbers and index else "left")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in cast(Sequence[Any], value)]
    # JSON has no NaN; readers other than Python's refuse it.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
