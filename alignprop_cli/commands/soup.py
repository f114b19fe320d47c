"""`alignprop soup`."""

from __future__ import annotations


def soup() -> None:
    """Not written yet."""
