"""Prompt sets, and which prompt an image of the run gets."""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path
from typing import Any

import torch

from alignprop_cli import rng
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

BUILT_IN = ("animals", "animals-eval", "shapes", "shapes-heldout")

_COLUMNS = ("prompt", "text", "caption")


def load_prompts(name: str) -> list[str]:
    """Return the prompts of a built-in set or a file, in a fixed order.

    Args:
        name: A built-in set (`BUILT_IN`), or a file: .txt with one prompt per line, .jsonl with a
            text or an object per line, .csv with a header. Objects and headers name the prompt
            `prompt`, `text` or `caption`. Empty lines are left out.

    Raises:
        ConfigError: If there is no such set, or the file holds no prompt or cannot be understood.
        AssetError: If the file is missing or cannot be read.
    """
    if name in BUILT_IN:
        return _built_in(name)
    path = Path(name).expanduser()
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ConfigError(
            f"prompts: unknown prompt set '{name}'.{did_you_mean(name, BUILT_IN)}",
            hint="a file must end in .txt, .jsonl or .csv",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"prompts: cannot read {path}: {error}") from error
    found = [prompt.strip() for prompt in readers[path.suffix](text, path)]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise ConfigError(f"prompts: {path} holds no prompt", hint="write one prompt per line")
    return found


def _built_in(name: str) -> list[str]:
    if name == "animals":
        return list(ANIMALS)
    if name == "animals-eval":
        return list(ANIMALS_EVAL)
    from alignprop_cli.tiny import data

    return data.train_prompts() if name == "shapes" else data.heldout_prompts()


def _read_txt(text: str, path: Path) -> list[str]:
    # Not splitlines(), which also breaks at characters that may stand in a prompt, as U+2028.
    return text.split("\n")


def _read_jsonl(text: str, path: Path) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"prompts: {path}:{number}: not JSON: {error}") from error
        if isinstance(value, dict):
            value = next((value[column] for column in _COLUMNS if column in value), None)
        if not isinstance(value, str):
            raise ConfigError(
                f"prompts: {path}:{number}: expected a text or an object with one of {_COLUMNS}"
            )
        found.append(value)
    return found


def _read_csv(text: str, path: Path) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    column = next((c for c in _COLUMNS if c in (rows.fieldnames or ())), None)
    if column is None:
        raise ConfigError(
            f"prompts: {path}: no column named prompt, text or caption, got {rows.fieldnames}"
        )
    try:
        return [row[column] or "" for row in rows]
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
        self._order = functools.lru_cache(maxsize=4)(functools.partial(_order, len(prompts), seed))

    def prompt(self, image_number: int) -> str:
        """Return the prompt of this image, counted from the start of the run."""
        epoch, position = divmod(image_number, len(self.prompts))
        return self.prompts[self._order(epoch)[position]]


def _order(size: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(size, generator=rng.generator(seed, "prompts", epoch)).tolist()
