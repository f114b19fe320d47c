"""The rows of `score`: streamed to standard output, or written to a file that can be resumed.

Until the run is complete, the rows of NAME are lines of JSON in `NAME.partial`. Then they are
converted to the wanted format, and the partial file is removed.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from alignprop_cli.console import write_bytes
from alignprop_cli.errors import AssetError, ConfigError

Format = Literal["table", "csv", "jsonl", "parquet"]
Row = dict[str, Any]

SCHEMA = "alignprop.score.partial/1"
# File names need not be UTF-8: surrogateescape writes their bytes back unchanged.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
_FIXED = ("prompt", "prompt_source", "content")


def columns(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a row with these metrics."""
    return ("file", *names, *_FIXED)


def partial_of(target: Path) -> Path:
    """Return the file that has the rows of `target` until the run is complete."""
    return target.with_name(f"{target.name}.partial")


def refuse_partial(target: Path) -> None:
    """Refuse to overwrite the rows of an interrupted run.

    Raises:
        ConfigError: If there is a partial file.
    """
    if partial_of(target).exists():
        raise ConfigError(
            f"--output: {partial_of(target)} has the rows of a run that was interrupted",
            hint="resume it with --resume, or start again with --overwrite",
        )


def choose_format(
    wanted: Format | None, target: Path | None, *, as_json: bool, resume: bool
) -> Format:
    """Return the format of the rows: the wanted one, or else that of the file's suffix.

    Args:
        wanted: The value of --format, if given.
        target: The file; None is standard output, where the default is a table.
        as_json: Whether standard output is for one JSON object.
        resume: Whether the rows of an earlier run are kept.

    Raises:
        ConfigError: If the format cannot be written there, or pyarrow is missing.
    """
    # 1. Standard output: one format at a time, which can be streamed.
    if target is None:
        if as_json and wanted not in (None, "table"):
            raise ConfigError(
                f"--json and --format {wanted} both write to standard output",
                hint="write the rows to a file with --output",
            )
        if resume or wanted == "parquet":
            which = "--resume" if resume else "--format parquet"
            raise ConfigError(f"{which} needs a file: give --output FILE")
        return wanted or "table"
    # 2. A file.
    by_suffix: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
    chosen = wanted or by_suffix.get(target.suffix.lower())
    if chosen is None or chosen == "table":
        raise ConfigError(
            f"--output: {target}: rows are written as csv, jsonl or parquet",
            hint="end the name in .csv, .jsonl or .parquet, or give --format",
        )
    if chosen == "parquet" and find_spec("pyarrow") is None:
        raise ConfigError(
            "--format parquet needs pyarrow, which is not installed",
            hint="pip install 'alignprop[parquet]'",
        )
    return chosen


@contextmanager
def to_standard_output(
    chosen: Format, names: Sequence[str], *, listed: bool
) -> Iterator[Callable[[Row], None]]:
    """Yield a function that prints a row as csv or jsonl; it does nothing if rows are `listed`."""
    if listed:
        yield lambda row: None
        return

    def echo(text: str) -> None:
        write_bytes(text.encode(**_TEXT))

    if chosen == "csv":
        echo(_csv(columns(names)))
        yield lambda row: echo(_csv(list(row.values())))
    else:
        yield lambda row: echo(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def to_file(
    target: Path, chosen: Format, names: Sequence[str], settings: Mapping[str, Any], kept: list[Row]
) -> Iterator[Callable[[Row], None]]:
    """Yield a function that adds a row; after the block the file is complete.

    If the block fails, the rows so far stay in the partial file.

    Args:
        target: The file.
        chosen: csv, jsonl or parquet.
        names: Names of the metrics.
        settings: What the rows depend on; `resume` compares them.
        kept: Rows of an earlier run to begin with.
    """
    # 1. A new partial file, with the process's number in its name, so that no other run uses it. It
    # replaces the old one when the kept rows are on the disk, so that no crash can lose them.
    partial = partial_of(target)
    started = partial.with_name(f".{partial.name}.{os.getpid()}")
    try:
        with started.open("w", **_TEXT) as file:
            for line in ({"schema": SCHEMA, **settings}, *kept):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            started.replace(partial)
            # 2. The rows of this run, each flushed: what is measured survives an interruption.
            empty = not kept

            def add(row: Row) -> None:
                nonlocal empty
                empty = False
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            try:
                yield add
            finally:
                if empty:
                    partial.unlink()  # nothing in it could be resumed
        # 3. The wanted format, again by a new file that replaces the old one when it is complete.
        _convert(partial, started, chosen, columns(names))
        started.replace(target)
        partial.unlink()
    finally:
        started.unlink(missing_ok=True)


def resume(
    target: Path, chosen: Format, names: Sequence[str], settings: Mapping[str, Any]
) -> Resumed:
    """Return the rows that a file or its partial file already has.

    Raises:
        AssetError: If the file cannot be read.
        ConfigError: If it was made with other rewards or prompts.
    """
    # 1. An interrupted run: its settings, in the first line of the partial file, must be the same.
    partial = partial_of(target)
    if partial.is_file():
        header, *rows = _lines(partial, torn=True) or [{}]
        if header != {"schema": SCHEMA, **settings}:
            raise _other(partial)
        return Resumed(rows, whole=False)
    # 2. A complete run, or none.
    if not target.is_file():
        return Resumed([], whole=True)
    try:
        rows = _read(target, chosen, names)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise AssetError(f"--resume: cannot read {target}: {error}") from error
    # A complete file has no settings in it, but its columns and the prompt of --prompt must fit.
    prompt = settings["prompt"]
    for row in rows:
        if tuple(row) != columns(names):
            raise _other(target)
        if (row["prompt_source"] == "flag" or prompt is not None) and row["prompt"] != prompt:
            raise _other(target)
    return Resumed(rows, whole=True)


class Resumed:
    """Rows of an earlier run.

    Args:
        rows: The rows in their order.
        whole: Whether that run was complete.
    """

    def __init__(self, rows: list[Row], *, whole: bool) -> None:
        self.rows = rows
        self.whole = whole

    def keep(self, unfinished: set[str]) -> list[Row]:
        """Return the rows, without those of files that will be measured again."""
        return [row for row in self.rows if row["file"] not in unfinished]


def _other(file: Path) -> ConfigError:
    """Return the error for a file whose rows are not those of this run."""
    return ConfigError(
        f"--resume: {file} was made with other rewards, options or prompts",
        hint="choose another file with --output, or start again with --overwrite",
    )


def _csv(cells: Sequence[Any]) -> str:
    """Return one line of csv."""
    text = io.StringIO()
    # The csv module does not quote a lone carriage return, but readers end a row there.
    quoting = csv.QUOTE_ALL if any("\r" in str(cell) for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue()


def _lines(file: Path, *, torn: bool) -> list[Row]:
    """Return the lines of JSON; the last line of a torn file may be cut off."""
    try:
        # Not splitlines(): a prompt may contain line separators other than \n. After the last \n is
        # nothing or, in a torn file, half a row.
        lines = file.read_text(**_TEXT).split("\n")
        rows = [json.loads(line) for line in (lines[:-1] if torn else lines) if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("expected an object in every line")
        return rows
    except (OSError, ValueError) as error:
        raise AssetError(
            f"--resume: cannot read {file}: {error}", hint="start again with --overwrite"
        ) from error


def _convert(partial: Path, file: Path, chosen: Format, header: Sequence[str]) -> None:
    """Write the rows of a partial file in the chosen format."""
    # Line by line, since the rows may not fit in memory.
    with partial.open(**_TEXT) as lines:
        next(lines)  # the settings
        if chosen == "parquet":
            _write_parquet((json.loads(line) for line in lines), file, header)
            return
        with file.open("w", newline="", **_TEXT) as out:
            if chosen == "csv":
                out.write(_csv(header))
            for line in lines:
                out.write(line if chosen == "jsonl" else _csv(list(json.loads(line).values())))


def _write_parquet(rows: Iterator[Row], file: Path, header: Sequence[str]) -> None:
    # Imported by name: pyarrow is an extra, and has no type hints.
    pyarrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    texts = ("file", *_FIXED)
    schema = pyarrow.schema(
        [(name, pyarrow.string() if name in texts else pyarrow.float64()) for name in header]
    )
    with parquet.ParquetWriter(file, schema) as writer:
        # In groups of rows, of which parquet files consist. Their texts must be UTF-8.
        while group := list(islice(rows, 4096)):
            for row in group:
                row["file"] = row["file"].encode(**_TEXT).decode("utf-8", "replace")
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


def _read(target: Path, chosen: Format, names: Sequence[str]) -> list[Row]:
    """Return the rows of a complete file."""
    if chosen == "jsonl":
        return _lines(target, torn=False)
    if chosen == "parquet":
        parquet: Any = import_module("pyarrow.parquet")
        return parquet.read_table(target).to_pylist()
    # CSV has only texts: metrics become numbers again, and an empty prompt becomes None.
    with target.open(newline="", **_TEXT) as file:
        return [
            {
                name: float(cell) if name in names else (cell or None if name == "prompt" else cell)
                for name, cell in row.items()
            }
            for row in csv.DictReader(file)
        ]
