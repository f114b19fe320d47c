"""Other streams for a command of a test: called in its process before it begins."""

from __future__ import annotations

import os
import sys
from typing import Any


def encode(name: str) -> None:
    """Encode what is printed in this way, as PYTHONIOENCODING does."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        stream.reconfigure(encoding=name)


def connect(number: int, path: str) -> None:
    """Let a stream, by its number, lead to a file that is there."""
    handle = os.open(path, os.O_WRONLY)
    os.dup2(handle, number)
    os.close(handle)
