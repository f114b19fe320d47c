"""Prompt sets, and which prompt an image of the run gets."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from alignprop_cli import hub, rng
from alignprop_cli.errors import AssetError, ConfigError, did_you_mean

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
# Where people and things stand about, so that there is something to remove.
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
        prompts: The texts, or `module:function` that returns them.
        grouped: Whether the first word of a prompt is its group, for metrics by group.
        checker: `module:function` that says of images what of their prompts they have right, where
            there is one; see `evaluation.compare.checks`.
    """

    prompts: tuple[str, ...] | str
    grouped: bool = False
    checker: str | None = None


def _dogs(places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{dogs} {place}" for dogs in _COUNTS for place in places)


# Named, not imported: nothing here needs the embedded model, whose language this is.
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

# The name of a set that is fetched begins with hpd; what is neither that nor built in is a file.
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The benchmark of HPDv2, fetched from the hub: `hpd:anime`, ..., and `hpd` for all four."""

SETS = (*BUILT_IN, "hpd", *(f"hpd:{style}" for style in HPD_STYLES))
"""All that are named and not files."""

_HPD = "zhwang/HPDv2"
_HPD_PROMPTS = 800

_COLUMNS = ("prompt", "text", "caption")


def load_prompts(name: str) -> list[str]:
    """Return the prompts of a built-in set or a file, in a fixed order.

    Args:
        name: A built-in set (`BUILT_IN`), one of the hub (`hpd`, `hpd:photo`), or a file: .txt with
            one prompt per line, .jsonl with a text or an object per line, .json with a list of
            such, .csv with a header. Objects and headers name the prompt `prompt`, `text` or
            `caption`. Empty lines are left out.

    Raises:
        ConfigError: If there is no such set, or the file holds no prompt or cannot be understood.
        AssetError: If the file is missing or cannot be read, or the hub cannot be reached.
    """
    if name in BUILT_IN:
        return _built_in(name)
    if name.partition(":")[0] == "hpd":
        return _hpd(name)
    path = Path(name).expanduser()
    # Empty lines and cells are no prompts; an empty prompt would be an unconditional image.
    found = [_text(value, place).strip() for place, value in _rows(path, name)]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise ConfigError(f"prompts: {path} holds no prompt", hint="write one prompt per line")
    return found


def load_groups(name: str) -> dict[str, str]:
    """Return the group of each prompt of a set that has groups, for metrics by group.

    Those are the styles of `hpd`, the numbers of `dogs` and `shapes`, and what objects and tables
    in files call `group`. Prompts without one are left out.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    if name in BUILT_IN:
        grouped = _built_in(name) if BUILT_IN[name].grouped else []
        return {prompt: prompt.partition(" ")[0] for prompt in grouped}
    if name.partition(":")[0] == "hpd":
        return {prompt: style for style in _styles(name) for prompt in _hpd(f"hpd:{style}")}
    rows = [(p, v) for p, v in _rows(Path(name).expanduser(), name) if isinstance(v, dict)]
    named = {_text(value, place).strip(): value.get("group") for place, value in rows}
    return {prompt: str(group).strip() for prompt, group in named.items() if group}


def _rows(path: Path, name: str) -> list[tuple[str, Any]]:
    """Return the entries of a prompt file, each with its place for messages."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ConfigError(
            f"prompts: unknown prompt set '{name}'.{did_you_mean(name, (*BUILT_IN, 'hpd'))}",
            hint="a file must end in .txt, .jsonl, .json or .csv",
        )
    # utf-8-sig: spreadsheets begin with a mark, which would be part of the first prompt.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"prompts: cannot read {path}: {error}") from error
    return readers[path.suffix](text, path)


def _built_in(name: str) -> list[str]:
    # A set that is made by a function is imported when it is asked for.
    prompts = BUILT_IN[name].prompts
    if isinstance(prompts, str):
        module, _, function = prompts.partition(":")
        prompts = getattr(import_module(module), function)()
    return list(prompts)


def count_prompts(names: Sequence[str]) -> int:
    """Return how many different prompts some sets have together; fetches nothing.

    Raises:
        ConfigError, AssetError: As `load_prompts`.
    """
    # Those of the hub have a known number of prompts; styles may be named twice.
    hub_sets = [name for name in names if name.partition(":")[0] == "hpd"]
    styles = {style for name in hub_sets for style in _styles(name)}
    others = {p for name in names if name not in hub_sets for p in load_prompts(name)}
    return len(others) + _HPD_PROMPTS * len(styles)


def check_prompts(name: str) -> None:
    """Refuse what `load_prompts` would refuse, but fetch nothing.

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
        rows = _read_json(path.read_text(encoding="utf-8"), path)
        found += [_text(value, place) for place, value in rows]
    return found


def _read_txt(text: str, path: Path) -> list[tuple[str, Any]]:
    # Not splitlines(), which also breaks at characters that may stand in a prompt, as U+2028.
    return [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1)]


def _read_jsonl(text: str, path: Path) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for place, line in _read_txt(text, path):
        if not line.strip():
            continue
        try:
            found.append((place, json.loads(line)))
        except ValueError as error:
            raise ConfigError(f"prompts: {place}: not JSON: {error}") from error
    return found


def _read_json(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"prompts: {path}: not JSON: {error}") from error
    if not isinstance(values, list):
        raise ConfigError(f"prompts: {path}: expected a list of texts")
    return [(f"{path}[{number}]", value) for number, value in enumerate(values)]


def _text(value: Any, place: str) -> str:
    """Return the prompt of an entry, a text or an object."""
    # The first of the names that the entry has; other keys are nobody's concern.
    if isinstance(value, dict):
        value = next((value[column] for column in _COLUMNS if column in value), None)
    if not isinstance(value, str):
        raise ConfigError(f"prompts: {place}: expected a text or an object with one of {_COLUMNS}")
    return value


def _read_csv(text: str, path: Path) -> list[tuple[str, Any]]:
    # newline="": a quoted field may hold line breaks of any kind.
    rows = csv.DictReader(io.StringIO(text, newline=""))
    column = next((c for c in _COLUMNS if c in (rows.fieldnames or ())), None)
    if column is None:
        raise ConfigError(
            f"prompts: {path}: no column named prompt, text or caption, got {rows.fieldnames}"
        )
    try:
        return [
            (f"{path}:{rows.line_num}", {"prompt": row[column] or "", "group": row.get("group")})
            for row in rows
        ]
    except csv.Error as error:
        raise ConfigError(f"prompts: {path}: not a table: {error}") from error


class PromptStream:
    """The prompt of every image of a run: each prompt once per epoch, reshuffled every epoch.

    A function of (seed, image number) only, so that any part of it can be computed anywhere.

    Args:
        prompts: The set, at least one.
        seed: Of the order.
    """

    def __init__(self, prompts: list[str], seed: int) -> None:
        self.prompts = prompts
        # The images of a step come from one epoch or two.
        self._order = functools.lru_cache(maxsize=4)(functools.partial(_order, len(prompts), seed))

    def prompt(self, image_number: int) -> str:
        """Return the prompt of this image, counted from the start of the run."""
        # Counted over all processes and steps, so that resuming needs no state.
        epoch, position = divmod(image_number, len(self.prompts))
        return self.prompts[self._order(epoch)[position]]


def _order(size: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(size, generator=rng.generator(seed, "prompts", epoch)).tolist()
