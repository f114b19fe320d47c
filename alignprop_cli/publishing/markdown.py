"""Pieces of markdown from texts that may be somebody else's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignprop_cli.console import printable

# Characters of a foreign text.
_LONGEST = 200


def code(text: str, *, most: int = _LONGEST) -> str:
    """Return a text as inline code of markdown: nothing in it is markup, a link or HTML."""
    # On one line: a line break would end the code.
    shown = printable(" ".join(text.split()))
    shown = shown if len(shown) <= most else f"{shown[:most]}..."
    if not shown:
        return "(empty)"
    # A fence that is longer than any in the text; a blank where the text itself has one at an end.
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    edge = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{edge}{shown}{edge}{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown."""
    # Markdown takes a bar in code for a border too, unless it is escaped.
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
