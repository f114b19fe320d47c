"""What a value in a model's configuration files must be, as rules with words for messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]
"""(whether a value keeps it, what is expected in words)"""


def whole(low: int, high: int) -> Rule:
    """Return the rule: a whole number in [low, high]."""

    def holds(value: Any) -> bool:
        # In Python True is an int.
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return holds, f"a whole number from {low} to {high}"


def number(low: float, high: float) -> Rule:
    """Return the rule: a number in (low, high)."""

    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low < value < high

    return holds, f"a number between {low:g} and {high:g}"


def one_of(*values: object) -> Rule:
    """Return the rule: one of these values, of the same type."""

    def holds(value: Any) -> bool:
        return any(value == one and type(value) is type(one) for one in values)

    return holds, " or ".join(map(str, values))


def list_of(rule: Rule) -> Rule:
    """Return the rule: a list that is not empty, whose values keep another rule."""

    def holds(value: Any) -> bool:
        return isinstance(value, list | tuple) and bool(value) and all(map(rule[0], value))

    return holds, f"a list, each {rule[1]}"


def either(*rules: Rule) -> Rule:
    """Return the rule: at least one of these is kept."""
    return lambda value: any(rule[0](value) for rule in rules), ", or ".join(r[1] for r in rules)


NOTHING: Rule = (lambda value: value is None, "null")
SIZE = whole(1, 65_536)
"""A width or a number of channels."""
