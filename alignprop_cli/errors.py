"""The errors a user can cause or meet, each with the exit code it ends the program with.

Exit codes: 0 done, 1 unexpected (a bug), 2 usage or configuration, 3 something missing,
4 the run failed, 130 and 143 interrupted by a signal after saving.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class AlignPropError(Exception):
    """Base of every error that is told to the user in one message, without a traceback.

    Args:
        message: Where it is, what is wrong, and the value that was found.
        hint: What to do about it, one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the dotted key, what is wrong, and who set it."""

    key: str
    message: str
    origin: str | None = None

    def __str__(self) -> str:
        where = f" (from {self.origin})" if self.origin else ""
        return f"{self.key}: {self.message}{where}"


class ConfigError(AlignPropError):
    """The configuration or the command line is wrong; carries every problem found."""

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
        message: What was saved and where.
        signal_number: The signal; the exit code is 128 plus it.
    """

    def __init__(self, message: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""
