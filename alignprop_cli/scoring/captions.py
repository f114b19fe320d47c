"""The prompt of an image file: from an option, a table, a file next to it, itself or its folder."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from alignprop_cli.benchmarks import HPD_STYLES
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text
from alignprop_cli.prompts import load_prompts
from alignprop_cli.scoring.embedded import Unclear, embedded_prompt, from_infotext
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
# Bytes of a text file beside an image, and characters of a prompt in a table: a caption of a page
# has a few thousand.
_MOST_TEXT = 2**20
# No encoding could write one of them.
_SURROGATE = re.compile("[\ud800-\udfff]")

# Images of HPSv2's benchmark are numbered 00000.jpg, 00001.jpg, ...
_HPD_NAME = re.compile(r"\d{5}")

# Prompts may be longer than the csv module's default limit of 131072 characters. The limit is a C
# long, which has 32 bits on Windows.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

Table = dict[str, str | None]
"""Prompts by file name as the table has it, with forward slashes; None where it has several."""


class Caption(NamedTuple):
    """What is known of an image's prompt.

    Args:
        prompt: The prompt; None where there is none.
        source: Where it comes from, one of `SOURCES`.
        why: Why there is none, where something was there that could not be read or taken.
    """

    prompt: str | None
    source: str
    why: str | None = None


def read_table(path: Path, *, lenient: bool = False) -> Table:
    """Read the prompts of image files from a table, .jsonl or .csv.

    Each line or row has `file_name`, and the prompt as `prompt`, `text` or `caption`.

    Args:
        path: The table.
        lenient: Skip lines that lack one of these: a table that was found and not given may be
            about something else. And let a file have several prompts, of which none counts.

    Raises:
        AssetError: If the table cannot be read.
        ConfigError: If it is another kind of file, a line lacks something, or has another prompt
            for a file than an earlier one; names the line.
    """
    table: Table = {}
    for line, row in _rows(path):
        name, prompt = row.get("file_name"), _prompt(row)
        if not isinstance(name, str) or prompt is None:
            if lenient:
                continue
            got = ", ".join(map(str, row))[:200] or "nothing"
            raise ConfigError(
                f"prompts: {path}:{line}: expected file_name and one of "
                f"{', '.join(PROMPT_COLUMNS)} as texts, got {got}"
            )
        if len(prompt) > _MOST_TEXT or _SURROGATE.search(prompt):
            long = len(prompt) > _MOST_TEXT
            what = f"of {len(prompt)} characters" if long else "with half of a surrogate pair"
            raise ConfigError(f"prompts: {path}:{line}: a prompt {what} is not taken")
        # Tables from Windows have backslashes.
        name = name.replace("\\", "/").removeprefix("./")
        clear = table.get(name, prompt) == prompt
        if not clear and not lenient:
            raise ConfigError(f"prompts: {path}:{line}: {name[:200]} has another prompt before")
        table[name] = prompt if clear else None
    return table


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the entries of a table, each with its line number for messages."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"prompts: {path}: expected a .jsonl or .csv file")
    return list(readers[path.suffix.lower()](read_text(path, "prompts"), path))


def _prompt(row: Mapping[str, Any]) -> str | None:
    found = (row.get(column) for column in PROMPT_COLUMNS)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines(): strings in JSON may contain line separators other than \n.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # Columns that are not read may hold NaN.
            row: Any = read_json(line, strict=False)
        except ParseError as error:
            raise ConfigError(f"prompts: {path}:{number}: {error}") from error
        if not isinstance(row, dict):
            got = line.strip()[:100]
            raise ConfigError(f"prompts: {path}:{number}: expected an object, got {got!r}")
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
    _tables: dict[Path, Table | AssetError | ConfigError] = field(
        default_factory=dict[Path, "Table | AssetError | ConfigError"], repr=False
    )
    _geneval: dict[Path, str | None] = field(default_factory=dict[Path, "str | None"], repr=False)
    _styles: dict[str, list[str]] = field(default_factory=dict[str, list[str]], repr=False)

    def find(self, found: Found, texts: Mapping[str, str], *, fetch: bool = True) -> Caption:
        """Return the prompt of an image, or why it has none.

        What is near an image and cannot be read gives none, and nothing further is asked: its
        prompt might be another one.

        Args:
            found: The image file.
            texts: The texts inside the image file; see `files.Decoded`.
            fetch: Whether prompts of HPDv2 may be downloaded from the hub.

        Raises:
            AssetError, ConfigError: As `read_table` for the table that was given; as `load_prompts`
                for images of HPDv2's benchmark.
        """
        # 1. What the user gave for this run.
        if (given := self.given(found)) is not None:
            return given
        try:
            near = self._near(found)
        except (AssetError, ConfigError) as error:
            return Caption(None, "none", error.message)
        except Unclear as error:
            return Caption(None, "none", str(error))
        if near is not None:
            return near
        # 3. What is inside the image, and last what its folder implies.
        try:
            prompt, source = embedded_prompt(texts)
        except Unclear as error:
            return Caption(None, "none", str(error))
        if prompt is None:
            return Caption(*self._by_place(found.path, fetch=fetch))
        if _SURROGATE.search(prompt):
            return Caption(None, "none", "its prompt has half of a surrogate pair")
        return Caption(prompt, source)

    def given(self, found: Found) -> Caption | None:
        """Return the prompt that was given for an image; None where none was.

        Raises:
            AssetError, ConfigError: As `read_table` for the table that was given.
        """
        if self.prompt is not None:
            return Caption(self.prompt, "flag")
        if self.table is None:
            return None
        prompt = self._look_up(self.table, found.path, (self.table.parent, found.root))
        return None if prompt is None else Caption(prompt, "file")

    def _near(self, found: Found) -> Caption | None:
        """Return what the nearest table that has the image says, or a text file of its own."""
        # 2. What is near the image.
        for folder in _upwards(found.path.parent, found.root):
            for name in _METADATA:
                if (folder / name).is_file() and self._of_geneval(folder / name) is None:
                    prompt = self._look_up(folder / name, found.path, (folder,))
                    if prompt is not None:
                        return Caption(prompt, "metadata")
        for suffix in _SIDECARS:
            sidecar = found.path.with_suffix(suffix)
            if sidecar.is_file():
                # Programs such as A1111 put the same text there as into the image.
                text = read_text(sidecar, "prompt", most=_MOST_TEXT)
                if prompt := from_infotext(text):
                    return Caption(prompt, "sidecar")
                if text.strip():
                    return Caption(None, "none", f"{sidecar.name} has settings and no prompt")
        return None

    def _look_up(self, file: Path, image: Path, roots: Iterable[Path]) -> str | None:
        """Return the prompt of an image in a table whose file names may be relative to `roots`."""
        if file not in self._tables:
            try:
                self._tables[file] = read_table(file, lenient=file != self.table)
            except (AssetError, ConfigError) as error:
                self._tables[file] = error
        table, place = self._tables[file], Path(named(image))
        if isinstance(table, Exception):
            raise table
        names = [place.as_posix()]
        for root in map(named, roots):
            if place.is_relative_to(root):
                names.append(place.relative_to(root).as_posix())
        called = next((name for name in names if name in table), None)
        if called is not None and table[called] is None:
            raise Unclear(f"{file.name} has several prompts for it")
        return None if called is None else table[called]

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
