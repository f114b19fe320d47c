"""Prompt sets, and the prompt of every image of a run."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import torch

from alignprop_cli import benchmarks, rng
from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text, user_path
from alignprop_cli.storage import sha256

# The 45 common animals on which DDPO and AlignProp train, and the 6 on which AlignProp evaluates.
# fmt: off
ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer",
    "cow", "goat", "lion", "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle",
    "ant", "butterfly", "fish", "shark", "whale", "dolphin", "squirrel", "mouse", "rat",
    "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig", "turkey", "fly",
    "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)
# fmt: on
ANIMALS_EVAL = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")

_COUNTS = ("one dog", "two dogs", "three dogs", "four dogs", "five dogs")
_DOG_PLACES = ("in a park", "on a beach", "on a street", "in the snow", "on a sofa", "in a garden")
_DOG_PLACES_EVAL = ("in a forest", "on a bridge", "in a kitchen")
# Places where people and things are likely, so that the reward `remove` has something to remove.
# fmt: off
PLACES = (
    "a street", "a beach in summer", "a railway station", "a market", "a park bench", "a kitchen",
    "a classroom", "a library", "a football field", "a bus stop", "an office", "a restaurant",
    "a stage", "a swimming pool", "a playground", "a hospital corridor", "a museum", "a farm",
)
# fmt: on
PLACES_EVAL = ("an airport", "a shop", "a ski slope", "a workshop", "a city square", "a cinema")


@dataclass(frozen=True)
class PromptSet:
    """A built-in prompt set.

    Args:
        prompts: The texts, or `module:function` of a function that returns them.
        grouped: Whether the first word of a prompt is its group, for metrics by group.
        checker: `module:function` of a function that tells which parts of their prompts images have
            right, if there is one; see `evaluation.compare.checks`.
    """

    prompts: tuple[str, ...] | str
    grouped: bool = False
    checker: str | None = None


def _dogs(places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{dogs} {place}" for dogs in _COUNTS for place in places)


# Named, not imported, so that nothing of the embedded model is loaded unless it is used.
_SHAPES = "alignprop_cli.tiny.language"
_SHAPES_CHECKER = "alignprop_cli.tiny.checker:check_parts"
BUILT_IN: Mapping[str, PromptSet] = {
    "animals": PromptSet(ANIMALS),
    "animals-eval": PromptSet(ANIMALS_EVAL),
    "dogs": PromptSet(_dogs(_DOG_PLACES), grouped=True),
    "dogs-eval": PromptSet(_dogs(_DOG_PLACES_EVAL), grouped=True),
    "places": PromptSet(PLACES),
    "places-eval": PromptSet(PLACES_EVAL),
    "shapes": PromptSet(f"{_SHAPES}:train_prompts", True, _SHAPES_CHECKER),
    "shapes-heldout": PromptSet(f"{_SHAPES}:heldout_prompts", True, _SHAPES_CHECKER),
}

SETS = (*BUILT_IN, *benchmarks.NAMES)
"""The names of all sets that are not files."""

_Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE

MOST_CHARACTERS = 10_000
"""Most characters of a prompt that is trained on or drawn, and most that a tokenizer is given."""

# What a prompt may be called in objects and tables, and its group, in small or large letters. The
# first that is present counts. GenEval has `tag`, GenEval 2 `atom_count`, PartiPrompts Category.
_COLUMNS = ("prompt", "text", "caption")
_GROUPS = ("group", "tag", "category", "atom_count")


@dataclass(frozen=True)
class Entry:
    """One prompt of a set, and what the set says about it.

    Args:
        prompt: Its text.
        values: The object of its line or the row of its table; empty for a text.
        style: The part of a published set that it is in, such as a style of `hpd`; else empty.
        number: Its number in its file or part, counted from 0 and with empty lines.
    """

    prompt: str
    values: Mapping[str, Any]
    style: str = ""
    number: int = 0

    @property
    def group(self) -> str:
        """Return its group, for metrics by group; empty if it has none."""
        if self.style:
            return self.style
        # Lists and objects are no names, and null is none.
        told = {k: v for k, v in self.values.items() if isinstance(v, str | int | float)}
        name, value = _by_name(told, _GROUPS) or ("", "")
        # Zeros in front, so that they sort as numbers.
        if name == "atom_count" and isinstance(value, int):
            return f"{value:02d} atoms"
        return str(value).strip()


def load_prompts(name: str) -> list[str]:
    """Return the prompts of a built-in set, a published one or a file, in a fixed order.

    Args:
        name: A built-in set (`BUILT_IN`), a published one (`benchmarks.NAMES`), or a file: .txt
            with one prompt per line, .jsonl with a text or an object per line, .json with a list
            of texts or objects, .csv or .tsv with a header. In objects and tables the prompt is
            called `prompt`, `text` or `caption`. Empty lines are left out.

    Raises:
        ConfigError: If the set does not exist, or the file holds no prompt or cannot be parsed.
        AssetError: If the file is missing or cannot be read, or the network cannot be reached.
    """
    return [entry.prompt for entry in load_entries(name)]


def load_entries(name: str) -> list[Entry]:
    """Return the prompts of a set with what it says about them, in the order of `load_prompts`.

    Groups are the styles of `hpd`, the numbers of `dogs` and `shapes`, and the values of `group`,
    `tag`, `category` or `atom_count` in objects and tables.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    if name in BUILT_IN:
        texts, grouped = _built_in(name), BUILT_IN[name].grouped
        groups = [{"group": text.partition(" ")[0]} if grouped else {} for text in texts]
        return [Entry(text, groups[i], number=i) for i, text in enumerate(texts)]
    parts = _files(name)
    # Empty lines and cells are skipped: an empty prompt would ask for an unconditional image.
    found = [
        Entry(text, value if isinstance(value, dict) else {}, style, number)
        for path, _, style in parts
        for number, (place, value) in enumerate(_rows(path, name))
        if (text := _text(value, place))
    ]
    if not found:
        raise ConfigError(f"prompts: {parts[0][0]} holds no prompt", hint="write one prompt a line")
    return found


def hashes(name: str) -> dict[str, str]:
    """Return the SHA-256 of each file of a set, by its address or path; none of a built-in one.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    return {} if name in BUILT_IN else {called: sha256(path) for path, called, _ in _files(name)}


def _files(name: str) -> list[tuple[Path, str, str]]:
    """Return the files of a set that is not built in, what each is called, and its style."""
    if benchmarks.is_published(name):
        sources = benchmarks.sources(name)
        return [(benchmarks.fetch(source), source.address, source.style) for source in sources]
    return [(user_path(name, "prompts"), name, "")]


def _rows(path: Path, name: str) -> list[tuple[str, Any]]:
    """Return the entries of a prompt file, each with its place for messages."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json}
    readers |= {".csv": _read_table, ".tsv": functools.partial(_read_table, delimiter="\t")}
    if path.suffix not in readers:
        known = (*BUILT_IN, *benchmarks.PUBLISHED)
        raise ConfigError(
            f"prompts: unknown prompt set '{name}'.{did_you_mean(name, known)}",
            hint="a file must end in .txt, .jsonl, .json, .csv or .tsv",
        )
    return readers[path.suffix](read_text(path, "prompts"), path)


def _built_in(name: str) -> list[str]:
    """Return the prompts of a built-in set, from the function that makes them if there is one."""
    prompts = BUILT_IN[name].prompts
    if isinstance(prompts, str):
        module, _, function = prompts.partition(":")
        prompts = getattr(import_module(module), function)()
    return list(prompts)


def count_prompts(names: Sequence[str]) -> int:
    """Return how many different prompts some sets have together, without downloading any.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    # A set of files, since one may be named twice: by its style, and by `hpd`.
    published = [name for name in names if name not in BUILT_IN and benchmarks.is_published(name)]
    sources = {source for name in published for source in benchmarks.sources(name)}
    others = {p for name in names if name not in published for p in load_prompts(name)}
    return len(others) + sum(source.prompts for source in sources)


def check_prompts(name: str) -> None:
    """Refuse what `load_prompts` would refuse, but download nothing.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    if name not in BUILT_IN and benchmarks.is_published(name):
        benchmarks.sources(name)
    else:
        load_prompts(name)


def _read_txt(text: str, path: Path) -> list[tuple[str, Any]]:
    # Not splitlines(), which also breaks at characters that a prompt may contain, such as U+2028.
    return [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1)]


def _read_jsonl(text: str, path: Path) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for place, line in _read_txt(text, path):
        if not line.strip():
            continue
        try:
            found.append((place, read_json(line)))
        except ParseError as error:
            raise ConfigError(f"prompts: {place}: {error}") from error
    return found


def _read_json(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        values: Any = read_json(text)
    except ParseError as error:
        raise ConfigError(f"prompts: {path}: {error}") from error
    if not isinstance(values, list):
        raise ConfigError(f"prompts: {path}: expected a list of texts")
    return [(f"{path}[{number}]", value) for number, value in enumerate(values)]


def _text(value: Any, place: str) -> str:
    """Return the prompt of an entry, a text or an object, without blanks around it."""
    if isinstance(value, dict):
        named = _by_name(cast(Mapping[str, Any], value), _COLUMNS)
        value = None if named is None else named[1]
    if not isinstance(value, str):
        raise ConfigError(f"prompts: {place}: expected a text or an object with one of {_COLUMNS}")
    text = value.strip()
    # It is written into every image and every report, and no model reads nearly as much.
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"prompts: {place}: a prompt of {len(text)} characters, at most {MOST_CHARACTERS} "
            f"are taken: {text[:40]!r}..."
        )
    return text


def _by_name(values: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any] | None:
    """Return the first of some names that an object has, in small letters, and its value."""
    lower = {key.lower(): value for key, value in reversed(list(values.items()))}
    return next(((name, lower[name]) for name in names if name in lower), None)


def _read_table(text: str, path: Path, delimiter: str = ",") -> list[tuple[str, Any]]:
    # newline="": quoted fields may contain line breaks of any kind, which must stay as they are.
    def rows(quoting: _Quoting) -> csv.DictReader[str]:
        # strict: otherwise quotation marks are dropped where they are no CSV, and one that is not
        # closed makes one prompt of all lines after it.
        file = io.StringIO(text, newline="")
        return csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)

    found = rows(csv.QUOTE_MINIMAL)
    try:
        return _cells(found, path)
    except csv.Error as error:
        # There are two kinds of TSV: that of spreadsheets, and one in which a quotation mark is a
        # character like any other, such as PartiPrompts on its authors' own page.
        if delimiter != "\t":
            raise ConfigError(
                f"prompts: {path}: not a table: {error} (before line {found.line_num + 1})",
                hint='a text that begins with a quotation mark is written """HI"" on a wall"',
            ) from error
    try:
        return _cells(rows(csv.QUOTE_NONE), path)
    except csv.Error as error:
        raise ConfigError(f"prompts: {path}: not a table: {error}") from error


def _cells(rows: csv.DictReader[str], path: Path) -> list[tuple[str, Any]]:
    """Return the rows of a table, each with its place for messages."""
    header = dict.fromkeys(rows.fieldnames or (), "")
    if _by_name(header, _COLUMNS) is None:
        raise ConfigError(
            f"prompts: {path}: no column named prompt, text or caption, got "
            f"{', '.join(header)[:200]!r}"
        )
    # Cells that a short row lacks are empty, and what a long one has too many has no name.
    return [
        (f"{path}:{rows.line_num}", {k: v or "" for k, v in row.items() if k in header})
        for row in rows
    ]


def for_tokenizer(text: str) -> str:
    """Return as much of a text as a tokenizer is given.

    Tokenizers read all of a text and then drop what is too many, which takes minutes for one of
    50 MB. The 77 tokens of the longest text towers never reach beyond the first `MOST_CHARACTERS`:
    a token of words has a few letters. Blanks, of which a tokenizer takes any number for one, are
    not counted.
    """
    return text if len(text) <= MOST_CHARACTERS else " ".join(text.split())[:MOST_CHARACTERS]


def is_cut(text: str) -> bool:
    """Return whether a tokenizer is not given all words of a text; see `for_tokenizer`."""
    return len(text) > MOST_CHARACTERS and len(" ".join(text.split())) > MOST_CHARACTERS


def cut_note(reader: str, cut: Collection[str], total: int) -> str:
    """Return the message that some prompts are longer than what a text tower reads.

    Args:
        reader: What reads them, a model or a reward.
        cut: Those prompts, at least one.
        total: How many different prompts there are.
    """
    longest = max(cut, key=len)
    return (
        f"{reader} does not read {len(cut)} of {total} prompts to their end, such as the one that "
        f"ends {longest[-60:]!r}"
    )


class PromptStream:
    """The prompt of every image of a run: each prompt once per epoch, reshuffled every epoch.

    It depends only on the seed and the number of the image, so every process computes its own part
    and resuming needs no state.

    Args:
        prompts: The prompts, at least one.
        seed: Seed of the order.
    """

    def __init__(self, prompts: list[str], seed: int) -> None:
        self.prompts = prompts
        # The images of a step are from one epoch or two, so few orders are needed at a time.
        self._order = functools.lru_cache(maxsize=4)(functools.partial(_order, len(prompts), seed))

    def prompt(self, image_number: int) -> str:
        """Return the prompt of an image, numbered over all processes from the start of the run."""
        epoch, position = divmod(image_number, len(self.prompts))
        return self.prompts[self._order(epoch)[position]]


def _order(size: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the prompts in an epoch."""
    return torch.randperm(size, generator=rng.generator(seed, "prompts", epoch)).tolist()
