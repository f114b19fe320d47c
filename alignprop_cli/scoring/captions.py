"""The prompt of an image file: from an option, a table, a file next to it, itself or its folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.prompts import HPD_STYLES, load_prompts
from alignprop_cli.scoring.embedded import embedded_prompt
from alignprop_cli.scoring.files import Found, named

PROMPT_COLUMNS = ("prompt", "text", "caption")
SOURCES = (
    "flag",
    "file",
    "metadata",
    "sidecar",
    "image",
    "a1111",
    "comfyui",
    "geneval",
    "hpd",
    "none",
)
"""Where a prompt can come from, in the order of the search."""

# The names of Hugging Face's ImageFolder, and those of the usual training scripts.
_METADATA = ("metadata.jsonl", "metadata.csv")
_SIDECARS = (".txt", ".caption")

# Images of HPSv2's benchmark are numbered 00000.jpg, 00001.jpg, ...
_HPD_NAME = re.compile(r"\d{5}")

# Prompts may be longer than the csv module's default limit of 131072 characters. The limit is a C
# long, which has 32 bits on Windows.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

Table = dict[str, str]
"""Prompts by file name as the table has it, with forward slashes."""


def read_table(path: Path, *, lenient: bool = False) -> Table:
    """Read the prompts of image files from a table, .jsonl or .csv.

    Each line or row has `file_name`, and the prompt as `prompt`, `text` or `caption`.

    Args:
        path: The table.
        lenient: Skip lines that lack one of these: a table that was found and not given may be
            about something else.

    Raises:
        AssetError: If the table cannot be read.
        ConfigError: If it is another kind of file, or a line lacks something; names the line.
    """
    table: Table = {}
    for line, row in _rows(path):
        name, prompt = row.get("file_name"), _prompt(row)
        if not isinstance(name, str) or prompt is None:
            if lenient:
                continue
            raise ConfigError(
                f"prompts: {path}:{line}: expected file_name and one of "
                f"{', '.join(PROMPT_COLUMNS)} as texts, got {', '.join(map(str, row)) or 'nothing'}"
            )
        # Tables from Windows have backslashes.
        table[name.replace("\\", "/").removeprefix("./")] = prompt
    return table


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the entries of a table, each with its line number for messages."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"prompts: {path}: expected a .jsonl or .csv file")
    # utf-8-sig: spreadsheets write a byte order mark, which would be part of the first column name.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"prompts: cannot read {path}: {error}") from error
    return list(readers[path.suffix.lower()](text, path))


def _prompt(row: Mapping[str, Any]) -> str | None:
    found = (row.get(column) for column in PROMPT_COLUMNS)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines(): strings in JSON may contain line separators other than \n.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"prompts: {path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"prompts: {path}:{number}: expected an object, got {line.strip()!r}")
        yield number, cast(Mapping[str, Any], row)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ConfigError(f"prompts: {path}:{rows.line_num}: {error}") from error


@dataclass
class PromptFinder:
    """Finds the prompt of an image, in the first of `SOURCES` that has one.

    Args:
        prompt: One prompt for all images.
        table: A table with the prompt of each image; see `read_table`.

    Raises:
        AssetError, ConfigError: As `read_table`.
    """

    prompt: str | None = None
    table: Path | None = None
    # What has been read, since the images of a folder share their tables and benchmarks.
    _tables: dict[Path, Table] = field(default_factory=dict[Path, Table], repr=False)
    _geneval: dict[Path, str | None] = field(default_factory=dict[Path, "str | None"], repr=False)
    _styles: dict[str, list[str]] = field(default_factory=dict[str, list[str]], repr=False)

    def find(
        self, found: Found, texts: Mapping[str, str], *, fetch: bool = True
    ) -> tuple[str | None, str]:
        """Return the prompt, None where there is none, and its source, one of `SOURCES`.

        Args:
            found: The image file.
            texts: The texts inside the image file; see `files.Decoded`.
            fetch: Whether prompts of HPDv2 may be downloaded from the hub.

        Raises:
            AssetError, ConfigError: As `read_table` for a table near the image; as `load_prompts`
                for images of HPDv2's benchmark.
        """
        prompt, source = self._find(found, texts, fetch=fetch)
        # JSON can contain half of a surrogate pair, which no encoding could write.
        return prompt and prompt.encode("utf-8", "replace").decode("utf-8"), source

    def _find(
        self, found: Found, texts: Mapping[str, str], *, fetch: bool
    ) -> tuple[str | None, str]:
        # 1. What the user gave for this run.
        if self.prompt is not None:
            return self.prompt, "flag"
        if self.table is not None:
            prompt = self._look_up(self.table, found.path, (self.table.parent, found.root))
            if prompt is not None:
                return prompt, "file"
        # 2. What is near the image: the nearest table that has it, then a text file of its own.
        for folder in _upwards(found.path.parent, found.root):
            for name in _METADATA:
                if (folder / name).is_file() and self._of_geneval(folder / name) is None:
                    prompt = self._look_up(folder / name, found.path, (folder,))
                    if prompt is not None:
                        return prompt, "metadata"
        for suffix in _SIDECARS:
            sidecar = found.path.with_suffix(suffix)
            if sidecar.is_file() and os.access(sidecar, os.R_OK):
                text = sidecar.read_text(encoding="utf-8-sig", errors="replace").strip()
                if text:
                    return text, "sidecar"
        # 3. What is inside the image, and last what its folder implies.
        prompt, source = embedded_prompt(texts)
        return (prompt, source) if prompt is not None else self._by_place(found.path, fetch=fetch)

    def _look_up(self, file: Path, image: Path, roots: Iterable[Path]) -> str | None:
        """Return the prompt of an image in a table whose file names may be relative to `roots`."""
        if file not in self._tables:
            self._tables[file] = read_table(file, lenient=file != self.table)
        table, place = self._tables[file], Path(named(image))
        names = [place.as_posix()]
        for root in map(named, roots):
            if place.is_relative_to(root):
                names.append(place.relative_to(root).as_posix())
        return next((table[name] for name in names if name in table), None)

    def _by_place(self, path: Path, *, fetch: bool) -> tuple[str | None, str]:
        """Return the prompt that the folders of a benchmark imply."""
        # GenEval: NNNNN/metadata.jsonl has the prompt of the images in NNNNN/samples/. The image of
        # a grid, next to it, has no prompt of its own.
        if path.parent.name == "samples":
            prompt = self._of_geneval(path.parent.parent / "metadata.jsonl")
            if prompt is not None:
                return prompt, "geneval"
        # HPSv2: style/NNNNN.jpg, with the number of the prompt in the style.
        style = path.parent.name
        if fetch and style in HPD_STYLES and _HPD_NAME.fullmatch(path.stem):
            if style not in self._styles:
                self._styles[style] = load_prompts(f"hpd:{style}")
            if int(path.stem) < len(self._styles[style]):
                return self._styles[style][int(path.stem)], "hpd"
        return None, "none"

    def _of_geneval(self, file: Path) -> str | None:
        if file not in self._geneval:
            self._geneval[file] = _geneval(file)
        return self._geneval[file]


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    """Yield a folder and those above it, up to the root."""
    while True:
        yield folder
        if folder == root or not folder.is_relative_to(root):
            return
        folder = folder.parent


def _geneval(file: Path) -> str | None:
    """Return the prompt of GenEval's metadata: one object, with a tag and no file name."""
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    try:
        rows = _rows(file)
    except (AssetError, ConfigError):
        return None  # `read_table` reports the error
    if len(rows) != 1 or "tag" not in rows[0][1] or "file_name" in rows[0][1]:
        return None
    return _prompt(rows[0][1])
