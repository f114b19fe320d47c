"""What every command that writes a folder or file checks before it starts working."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from alignprop_cli.errors import ConfigError

_HINT = "choose another place with --output, or give --overwrite"


def check_output(folder: Path, *, overwrite: bool, ours: Iterable[str]) -> None:
    """Refuse to replace a folder, unless asked to and nothing in it is foreign.

    Args:
        folder: Where the result goes.
        overwrite: Whether the user agreed to replace what is there.
        ours: Names of what the command itself writes into such a folder.

    Raises:
        ConfigError: If it is a file, not empty without `overwrite`, or holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file, expected a folder", hint=_HINT)
    inside = sorted(path.name for path in folder.iterdir())
    if inside and not overwrite:
        raise ConfigError(f"--output: {folder} exists and is not empty", hint=_HINT)
    foreign = [name for name in inside if name not in set(ours)]
    if foreign:
        # Replacing means removing: never a folder that this command cannot have written.
        raise ConfigError(
            f"--output: {folder} holds {foreign[0]}, which --overwrite would remove",
            hint="choose another folder with --output, or remove it yourself",
        )


def check_output_file(file: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file, unless asked to.

    Raises:
        ConfigError: If it is a folder, or exists without `overwrite`.
    """
    if file.is_dir():
        raise ConfigError(f"--output: {file} is a folder, expected a file", hint=_HINT)
    if file.exists() and not overwrite:
        raise ConfigError(f"--output: {file} exists", hint=_HINT)


def make_parent(file: Path) -> None:
    """Make the folder that a file goes into.

    Raises:
        ConfigError: If it cannot be made or written to.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {file.parent} cannot be made: {error}", hint=_HINT) from error
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"--output: {file.parent} cannot be written to", hint=_HINT)
