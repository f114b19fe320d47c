"""The only module that prints: results to standard output, messages to standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    """Items per second or, where they are slow, seconds per item."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1.0 else f"{1.0 / speed:.1f} s each")


class Bar:
    """A progress bar with a text at its end, such as the smoothed reward."""

    def __init__(self, progress: Progress | None, total: int, label: str) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(label, total=total, note="")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Advance by `count`; `note` replaces the text at the end of the line."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count)
            if note is not None:
                self._progress.update(self._task, note=_safe(note))


class Console:
    """Prints results, notes, warnings and errors, for people or for programs.

    Args:
        as_json: Print the result as one JSON object; nothing else goes to standard output.
        quiet: Print no progress and no notes; results, warnings and errors remain.

    Attributes:
        warned: The warnings that were printed, for the report of a run.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.warned: list[str] = []
        # soft_wrap: the terminal breaks lines, so that copied paths and commands stay whole.
        self._out = RichConsole(highlight=False, emoji=False, soft_wrap=True)
        self._err = RichConsole(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        if not self._out.is_terminal:
            # In a file or a pipe rich would take 80 columns and cut tables.
            self._out.width = 200

    def note(self, text: str) -> None:
        """Print a message on standard error, unless quiet."""
        if not self.quiet:
            self._err.print(_safe(text))

    def warn(self, text: str) -> None:
        """Print a warning on standard error."""
        self.warned.append(text)
        self._err.print(f"[yellow]warning:[/] {_safe(text)}")

    def error(self, error: AlignPropError) -> None:
        """Print an error and its hint on standard error."""
        # Where standard error is full or closed, the exit code still tells.
        with suppress(OSError):
            self._err.print(f"[red]error:[/] {_safe(error.message)}")
            if error.hint:
                self._err.print(f"[cyan]hint:[/] {_safe(error.hint)}")

    def text(self, text: str) -> None:
        """Print a text result on standard output."""
        self._out.print(_safe(text))

    def result(self, schema: str, values: Mapping[str, Any], human: Sequence[Any] = ()) -> None:
        """Print the result of a command: one JSON object, or tables and lines for people.

        Args:
            schema: Name and version of the object, such as alignprop.train/1.
            values: The object; non-finite numbers become null.
            human: Texts and tables that are printed instead if the result is not JSON.
        """
        if self.as_json:
            # Not through rich, which would colour it and read its brackets as markup.
            text = json.dumps({"schema": schema, **_plain(values)}, ensure_ascii=False)
            # File names need not be UTF-8, but JSON must be.
            self._out.file.write(text.encode("utf-8", "replace").decode("utf-8") + "\n")
            return
        for part in human:
            self._out.print(_safe(part) if isinstance(part, str) else part)

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Bar]:
        """Show a progress bar with rate and time left on standard error while the block runs."""
        # In a log file every update would be a line of its own.
        if self.quiet or self.as_json or not self._err.is_terminal:
            yield Bar(None, total, label)
            return
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
        # transient: the bar disappears at the end, so that only the result stays.
        with Progress(*columns, console=self._err, transient=True) as progress:
            yield Bar(progress, total, label)


def printable(text: str) -> str:
    """Return a text, such as a file name, with control characters escaped, on one line."""
    # A file name from elsewhere could move the cursor or clear the screen.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _safe(text: str) -> str:
    """Return a text of several lines that neither the terminal nor rich takes for a command."""
    # Names and prompts may hold [brackets], which are rich's markup.
    return escape("\n".join(map(printable, text.split("\n"))))


def write_bytes(data: bytes) -> None:
    """Write bytes to standard output unchanged: file names need not be UTF-8."""
    # Flushed, so that the reader of a pipe gets each row when it is ready.
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True
) -> Table:
    """Return a table without borders; `numbers` aligns all columns but the first to the right."""
    made = Table(title=_safe(title), title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(
            _safe(column),
            justify="right" if numbers and index else "left",
            # Names, such as those of files, go on in the next line: cut they may all be the same.
            overflow="ellipsis" if index else "fold",
        )
    for row in rows:
        made.add_row(*map(_safe, row))
    return made


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: mappings, lists and finite numbers."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in cast(Sequence[Any], value)]
    # JSON has no NaN: Python would write it, and other readers would refuse it.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
