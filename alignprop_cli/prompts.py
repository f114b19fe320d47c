"""Prompt sets, and the prompt of every image of a run."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from alignprop_cli import hub, rng
from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text, user_path

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

# Names of sets on the hub begin with hpd. Any other name that is not built in is a file.
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""Styles of the HPDv2 benchmark on the hub: `hpd:anime` etc., and `hpd` for all four."""

SETS = (*BUILT_IN, "hpd", *(f"hpd:{style}" for style in HPD_STYLES))
"""The names of all sets that are not files."""

_HPD = "zhwang/HPDv2"
# In each style; known here, so that prompts can be counted without a download.
_HPD_PROMPTS = 800

MOST_CHARACTERS = 10_000
"""Most characters of a prompt that is trained on or drawn, and most that a tokenizer is given."""

# What a prompt may be called in objects and tables. The first that is present counts.
_COLUMNS = ("prompt", "text", "caption")


def load_prompts(name: str) -> list[str]:
    """Return the prompts of a built-in set or a file, in a fixed order.

    Args:
        name: A built-in set (`BUILT_IN`), one of the hub (`hpd`, `hpd:photo`), or a file: .txt with
            one prompt per line, .jsonl with a text or an object per line, .json with a list of
            texts or objects, .csv with a header. In objects and tables the prompt is called
            `prompt`, `text` or `caption`. Empty lines are left out.

    Raises:
        ConfigError: If the set does not exist, or the file holds no prompt or cannot be parsed.
        AssetError: If the file is missing or cannot be read, or the hub cannot be reached.
    """
    if name in BUILT_IN:
        return _built_in(name)
    if name.partition(":")[0] == "hpd":
        return _hpd(name)
    path = user_path(name, "prompts")
    # Empty lines and cells are skipped: an empty prompt would ask for an unconditional image.
    found = [_text(value, place) for place, value in _rows(path, name)]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise ConfigError(f"prompts: {path} holds no prompt", hint="write one prompt per line")
    return found


def load_groups(name: str) -> dict[str, str]:
    """Return the group of each prompt of a set that has groups, for metrics by group.

    Groups are the styles of `hpd`, the numbers of `dogs` and `shapes`, and the values of `group` in
    the objects and tables of a file. Prompts without a group are left out.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    if name in BUILT_IN:
        grouped = _built_in(name) if BUILT_IN[name].grouped else []
        return {prompt: prompt.partition(" ")[0] for prompt in grouped}
    if name.partition(":")[0] == "hpd":
        return {prompt: style for style in _styles(name) for prompt in _hpd(f"hpd:{style}")}
    rows = [(p, v) for p, v in _rows(user_path(name, "prompts"), name) if isinstance(v, dict)]
    named = {_text(value, place): value.get("group") for place, value in rows}
    return {prompt: str(group).strip() for prompt, group in named.items() if group}


def _rows(path: Path, name: str) -> list[tuple[str, Any]]:
    """Return the entries of a prompt file, each with its place for messages."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ConfigError(
            f"prompts: unknown prompt set '{name}'.{did_you_mean(name, (*BUILT_IN, 'hpd'))}",
            hint="a file must end in .txt, .jsonl, .json or .csv",
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
    # A set of styles, since one may be named twice, by itself and by `hpd`.
    hub_sets = [name for name in names if name.partition(":")[0] == "hpd"]
    styles = {style for name in hub_sets for style in _styles(name)}
    others = {p for name in names if name not in hub_sets for p in load_prompts(name)}
    return len(others) + _HPD_PROMPTS * len(styles)


def check_prompts(name: str) -> None:
    """Refuse what `load_prompts` would refuse, but download nothing.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    if name.partition(":")[0] == "hpd":
        _styles(name)
    else:
        load_prompts(name)


def _styles(name: str) -> tuple[str, ...]:
    """Return the styles of HPDv2 that a set names."""
    style = name.partition(":")[2]
    if style and style not in HPD_STYLES:
        raise ConfigError(
            f"prompts: unknown style '{style}' of hpd.{did_you_mean(style, HPD_STYLES)}",
            hint=f"styles: {', '.join(HPD_STYLES)}",
        )
    return (style,) if style else HPD_STYLES


def _hpd(name: str) -> list[str]:
    """Return the prompts of one style of HPDv2, or of all, as hpsv2's `benchmark_prompts` does."""
    found: list[str] = []
    for each in _styles(name):
        file = f"benchmark/{each}.json"
        with hub.loading("prompts", f"{file} of the dataset {_HPD}"):
            path = Path(hf_hub_download(_HPD, file, repo_type="dataset"))
        rows = _read_json(read_text(path, "prompts"), path)
        found += [_text(value, place) for place, value in rows]
    return found


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
    # Other keys of an object are ignored.
    if isinstance(value, dict):
        value = next((value[column] for column in _COLUMNS if column in value), None)
    if not isinstance(value, str):
        raise ConfigError(f"prompts: {place}: expected a text or an object with one of {_COLUMNS}")
    text = value.strip()
    # It is written into every image and every report, and no model reads nearly as much.
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"prompts: {place}: a prompt of {len(text)} characters, at most {MOST_CHARACTERS} "
            f"are taken: '{text[:40]}...'"
        )
    return text


def _read_csv(text: str, path: Path) -> list[tuple[str, Any]]:
    # newline="": quoted fields may contain line breaks of any kind, which must stay as they are.
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        column = next((c for c in _COLUMNS if c in (rows.fieldnames or ())), None)
        if column is None:
            got = ", ".join(rows.fieldnames or ())
            raise ConfigError(
                f"prompts: {path}: no column named prompt, text or caption, got '{got[:200]}'"
            )
        return [
            (f"{path}:{rows.line_num}", {"prompt": row[column] or "", "group": row.get("group")})
            for row in rows
        ]
    except csv.Error as error:
        raise ConfigError(f"prompts: {path}: not a table: {error}") from error


def for_tokenizer(text: str) -> str:
    """Return as much of a text as a tokenizer is given.

    Tokenizers read all of a text and then drop what is too many, which takes minutes for one of
    50 MB. The 77 tokens of the longest text towers never reach beyond the first `MOST_CHARACTERS`:
    a token of words has a few letters. Blanks, of which a tokenizer takes any number for one, are
    not counted.
    """
    return text if len(text) <= MOST_CHARACTERS else " ".join(text.split())[:MOST_CHARACTERS]


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
        f"ends '...{longest[-60:]}'"
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
