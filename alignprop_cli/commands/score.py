"""`alignprop score`."""

from __future__ import annotations


def score() -> None:
    """Not written yet."""
