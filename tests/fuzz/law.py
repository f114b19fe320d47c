"""What holds for every command, whatever it is given."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tests.warm import Ended

CODES = frozenset({0, 2, 3, 4, 130, 141, 143})
"""Done, usage or configuration, something missing, a failed run, and ends by signals."""

MOST_SECONDS = 20.0
"""Of a processor."""

PATIENCE = 90.0
"""Seconds until a command counts as one that never ends: other work may be going on."""

MOST_MIB = 4096.0

# What moves the cursor, changes the direction of text, or is no character: not what is unassigned.
_CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}

# These print rows for other programs: names of files as they are, and text in JSON.
_FOR_PROGRAMS = ("--json", "--format=csv", "--format=jsonl")


def broken(args: Sequence[str], ended: Ended, before: set[str], place: Path) -> str | None:
    """Return what a command has broken; None where all holds.

    Args:
        args: Its arguments.
        ended: How it ended.
        before: `hidden(place)` before it.
        place: Its working folder.
    """
    if ended.late:
        return f"did not end in {PATIENCE:.0f} s"
    if ended.code not in CODES:
        return f"exit code {ended.code}"
    for name, text in (("output", ended.out), ("error", ended.err)):
        if "Traceback" in text:
            return f"a traceback on standard {name}"
        if name == "output" and any(arg.startswith(_FOR_PROGRAMS) for arg in args):
            continue
        raw = next((c for c in text if c != "\n" and unicodedata.category(c) in _CONTROLS), None)
        if raw is not None:
            return f"{raw!r} on standard {name}"
    if ended.code and not ended.err.strip():
        return f"exit code {ended.code} without a message"
    if len(ended.err) > 20_000:
        return f"{len(ended.err)} characters of messages"
    if "this is a bug" in ended.err:
        return "says that it is a bug"
    if ended.seconds > MOST_SECONDS:
        return f"took {ended.seconds:.0f} s"
    if ended.peak > MOST_MIB:
        return f"took {ended.peak:.0f} MiB"
    if left := hidden(place) - before:
        return f"left {sorted(left)[0]} behind"
    return None


def hidden(place: Path) -> set[str]:
    """Return what lies in and below a folder under names that begin with a dot."""
    return {path.relative_to(place).as_posix() for path in place.rglob(".*")}
