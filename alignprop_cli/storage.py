"""Files that are written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then give it the name `path` by renaming it.

    After an interruption or on a full disk there is the old folder or the new one, and perhaps a
    temporary folder next to it, whose name starts with a dot.
    """
    # In the same parent: renaming works within one file system only.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(temporary)
        # mkdtemp and safetensors make what only the owner can read.
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        # A folder that is not empty cannot be replaced in one call, so the old one moves aside
        # first.
        old = temporary.with_name(f"{temporary.name}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    # The process id, since several processes may write the same file.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
