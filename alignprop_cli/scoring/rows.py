"""The rows of `score`: streamed to standard output, or written to a file that can be resumed.

Until the run is complete, the rows of NAME are lines of JSON in `NAME.partial`. Then they are
converted to the wanted format, and the partial file is removed.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from alignprop_cli.console import printable, write_bytes
from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.parsing import ParseError, read_json

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

    # On a terminal a file name could move the cursor; files and pipes get what there is.
    safe = sys.stdout.isatty()

    def echo(text: str) -> None:
        shown = printable(text.removesuffix("\n")) + "\n" if safe else text
        write_bytes(shown.encode(**_TEXT))

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
    # The caller holds a lock, so that these were left by runs that are gone.
    for left in partial.parent.glob(f".{glob.escape(partial.name)}.*"):
        left.unlink(missing_ok=True)
    count = len(kept)
    try:
        with started.open("w+", **_TEXT) as file:
            for line in ({"schema": SCHEMA, **settings}, *kept):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            started.replace(partial)

            # 2. The rows of this run, each flushed: what is measured survives an interruption.
            def add(row: Row) -> None:
                nonlocal count
                count += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            try:
                yield add
            finally:
                if not count:
                    partial.unlink(missing_ok=True)  # nothing in it could be resumed
            # 3. The wanted format, again by a new file that replaces the old one when it is
            # complete. From the open file: another run could have put its own in its place.
            file.seek(0)
            converted = _convert(file, started, chosen, columns(names))
        if converted != count:
            raise RunError(f"--output: {partial} has {converted} rows where {count} were written")
        started.replace(target)
        partial.unlink(missing_ok=True)
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
        (_, header), *rows = _lines(partial, torn=True) or [(0, {})]
        if header != {"schema": SCHEMA, **settings}:
            raise other(partial)
        return Resumed([_checked(row, names, f"{partial}:{n}") for n, row in rows], whole=False)
    # 2. A complete run, or none.
    if not target.is_file():
        return Resumed([], whole=True)
    try:
        found = _read(target, chosen, names)
    # pyarrow's errors are all of these.
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise AssetError(f"--resume: cannot read {target}: {error}") from error
    # A complete file has no settings in it, but its columns and the prompt of --prompt must fit.
    if found and {*found[0][1]} - {"file", *_FIXED} != {*names}:
        raise other(target)
    rows = [_checked(row, names, f"{target}:{number}") for number, row in found]
    prompt = settings["prompt"]
    for row in rows:
        if (row["prompt_source"] == "flag" or prompt is not None) and row["prompt"] != prompt:
            raise other(target)
    return Resumed(rows, whole=True)


def _checked(row: Row, names: Sequence[str], place: str) -> Row:
    """Return a row of an earlier run if every cell is of its kind.

    Raises:
        AssetError: With the file and the line.
    """
    texts = {name: row.get(name) for name in ("file", *_FIXED) if name != "prompt"}
    prompt = row.get("prompt")
    wrong = [
        *(name for name, text in texts.items() if not isinstance(text, str) or not text),
        *(["prompt"] if not isinstance(prompt, str | None) else []),
        # What could not be written again.
        *(name for name, text in {**texts, "prompt": prompt}.items() if not _is_text(name, text)),
        *(n for n in names if not isinstance(row.get(n), float) or not math.isfinite(row[n])),
    ]
    if not wrong and tuple(row) == columns(names):
        return row
    what = f"{wrong[0]} is {str(row.get(wrong[0]))[:60]!r}" if wrong else "it has other columns"
    raise AssetError(
        f"--resume: {place}: this row is damaged: {what}",
        hint="mend or remove the line, or start again with --overwrite",
    )


def _is_text(name: str, value: object) -> bool:
    """Return whether a cell can be written: UTF-8, and of a file's name any bytes."""
    if not isinstance(value, str):
        return True
    try:
        value.encode("utf-8", "surrogateescape" if name == "file" else "strict")
    except UnicodeEncodeError:
        return False
    return True


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


def other(file: Path) -> ConfigError:
    """Return the error of `--resume` for a file whose rows are not those of this run."""
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


def _lines(file: Path, *, torn: bool) -> list[tuple[int, Row]]:
    """Return the lines of JSON with their numbers; the last line of a torn file may be cut off."""
    found: list[tuple[int, Row]] = []
    number = 0
    try:
        # As bytes, whose lines end at \n alone: a prompt may contain other line separators.
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if torn and not line.endswith(b"\n"):
                    break
                if line.strip():
                    # Not strictly: names that are not UTF-8 have become surrogates.
                    row = read_json(line.decode(**_TEXT), strict=False)
                    if not isinstance(row, dict):
                        raise ParseError("expected an object")
                    found.append((number, row))
    except (OSError, ParseError) as error:
        raise AssetError(
            f"--resume: cannot read {file}:{number}: {error}",
            hint="mend or remove the line, or start again with --overwrite",
        ) from error
    return found


def _convert(partial: TextIO, file: Path, chosen: Format, header: Sequence[str]) -> int:
    """Write the rows of a partial file in the chosen format, and return how many there are."""
    count = 0

    # Line by line, since the rows may not fit in memory.
    def lines() -> Iterator[str]:
        nonlocal count
        next(partial)  # the settings
        for line in partial:
            count += 1
            yield line

    if chosen == "parquet":
        _write_parquet(map(json.loads, lines()), file, header)
        return count
    with file.open("w", newline="", **_TEXT) as out:
        if chosen == "csv":
            out.write(_csv(header))
        for line in lines():
            out.write(line if chosen == "jsonl" else _csv(list(json.loads(line).values())))
    return count


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


def _read(target: Path, chosen: Format, names: Sequence[str]) -> list[tuple[int, Row]]:
    """Return the rows of a complete file with their numbers: its lines, or of parquet its rows."""
    if chosen == "jsonl":
        return _lines(target, torn=False)
    if chosen == "parquet":
        parquet: Any = import_module("pyarrow.parquet")
        return list(enumerate(parquet.read_table(target).to_pylist(), start=1))
    with target.open(newline="", **_TEXT) as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns(names):
            raise other(target)
        return [(reader.line_num, _of_csv(row, names)) for row in reader]


def _of_csv(row: Mapping[str, Any], names: Sequence[str]) -> Row:
    """Return a row of texts with its metrics as numbers, and None for an empty prompt."""
    found: Row = dict(row)
    for name in names:
        # What is no number stays, and is told as such.
        with suppress(ValueError, TypeError):
            found[name] = float(found[name])
    return found | {"prompt": found["prompt"] or None}
