"""Inputs that have broken a law once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.assets import Assets


@dataclass(frozen=True)
class Example:
    """An input.

    Args:
        name: Of the test.
        make: Writes the input into an empty folder, and returns the command.
        codes: Exit codes that are right.
        says: A part of the message.
    """

    name: str
    make: Callable[[Path, Assets], list[str]]
    codes: tuple[int, ...] = (2, 3)
    says: str = ""


def written(args: list[str], **files: bytes | str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that writes files, `__` for a dot in their names, and returns a command."""

    def make(place: Path, assets: Assets) -> list[str]:
        for name, data in files.items():
            file = place / name.replace("__", ".")
            file.write_bytes(data if isinstance(data, bytes) else data.encode())
        return args

    return make


CORPUS: list[Example] = []
