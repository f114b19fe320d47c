"""The errors that a user can cause or meet, each with the exit code of the program.

Exit codes: 0 done, 1 unexpected (a bug), 2 usage or configuration, 3 something missing,
4 the run failed, 130 and 143 interrupted by a signal after saving.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class AlignPropError(Exception):
    """Base class of all errors that are shown to the user as one message, without a traceback.

    Args:
        message: Where the mistake is, what is wrong, and the value that was found.
        hint: What to do about it, in one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    Args:
        key: The dotted key.
        message: What is wrong.
        origin: The source that set it; None if it is unknown.
    """

    key: str
    message: str
    origin: str | None = None

    def __str__(self) -> str:
        where = f" (from {self.origin})" if self.origin else ""
        return f"{self.key}: {self.message}{where}"


class ConfigError(AlignPropError):
    """The configuration or the command line is wrong; the message lists every problem."""

    exit_code = 2

    def __init__(
        self, message: str, problems: Iterable[Problem] = (), hint: str | None = None
    ) -> None:
        self.problems = tuple(problems)
        lines = [message, *(f"  {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines), hint)


class AssetError(AlignPropError):
    """Something needed is missing: weights, a file, an optional package, the network, access."""

    exit_code = 3


class RunError(AlignPropError):
    """The run failed: non-finite numbers, out of memory, a damaged checkpoint, a full disk."""

    exit_code = 4


class InterruptedRun(AlignPropError):
    """The run was ended by a signal, after it had saved.

    Args:
        message: What was saved.
        signal_number: Number of the signal.
        hint: How to resume.
    """

    def __init__(self, message: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        # The convention of shells: 130 for SIGINT, 143 for SIGTERM.
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name if the message is empty."""
    # Libraries often append a traceback or a list of everything they know.
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or the list of known names."""
    # Looser than difflib's default of 0.6, since most names are short.
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""
