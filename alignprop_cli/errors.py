"""The errors that a user can cause or meet, each with the exit code of the program.

Exit codes: 0 done, 1 unexpected (a bug), 2 usage or configuration, 3 something missing,
4 the run failed, 128 + N ended by signal N: 130 by Ctrl+C, 143 by SIGTERM, 141 by a closed pipe.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from dataclasses import dataclass

# Characters of a key that a message repeats.
_LONGEST_KEY = 200


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
        # A key that a user has mistyped may be a whole text.
        key = self.key if len(self.key) <= _LONGEST_KEY else f"{self.key[:_LONGEST_KEY]}…"
        return f"{key}: {self.message}{where}"


class ConfigError(AlignPropError):
    """The configuration or the command line is wrong; the message lists every problem."""

    exit_code = 2

    def __init__(
        self, message: str, problems: Iterable[Problem] = (), hint: str | None = None
    ) -> None:
        self.problems = tuple(problems)
        lines = [message, *(f"  {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines), hint)


class NothingToDo(ConfigError):
    """The run that is to be resumed has done all its steps, or was stopped by the guard."""


class AssetError(AlignPropError):
    """Something needed is missing: weights, a file, an optional package, the network, access."""

    exit_code = 3


class RunError(AlignPropError):
    """The run failed: non-finite numbers, out of memory, a damaged checkpoint, a full disk."""

    exit_code = 4


class NonFinite(RunError):
    """Images or rewards are NaN or infinite."""


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


class Terminated(KeyboardInterrupt):
    """A signal that ends the program as Ctrl+C does.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# safetensors reports the operating system's errors in its own class, as a text.
_OS_ERROR = re.compile(r"os error (\d+)")
# PyTorch has no class for running out of the CPU's memory, and none for a lost process of gloo's.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc")
_LOST_PROCESS = re.compile(r"gloo|Connection closed by peer|Connection reset by peer|NCCL|nccl")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the machine."""
    # By name: naming torch's own class would import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def explained(error: Exception) -> AlignPropError | None:
    """Return the error to show for what an operating system or a library reports.

    Returns:
        None for anything else, which is a bug of this program.
    """
    # 1. Files and disks.
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error.errno, error.strerror or str(error), error.filename)
    if type(error).__name__ == "SafetensorError" and (found := _OS_ERROR.search(str(error))):
        return _of_the_system(int(found[1]), first_line(error), None)
    # 2. Memory.
    if is_out_of_memory(error):
        return RunError(
            f"out of memory: {first_line(error)}",
            hint="set train.micro_batch=1, gradient.checkpoint_network=call and "
            "gradient.checkpoint_decoder=true, or a smaller sample.height and width",
        )
    # 3. Another process of the same run.
    if type(error).__name__ == "DistBackendError" or (
        isinstance(error, RuntimeError) and _LOST_PROCESS.search(str(error))
    ):
        return RunError("another process of this run has ended; its own message says why")
    return None


def _of_the_system(number: int, text: str, file: object) -> AlignPropError:
    """Return the error for one of the operating system's."""
    where = f" {file}" if file else ""
    if number == errno.ENOSPC:
        writing = f" while writing{where}" if where else ""
        return RunError(f"the disk is full{writing}", hint="what was written before is whole")
    if number in (errno.EDQUOT, errno.EFBIG):
        return RunError(
            f"a limit on the size of files or of all files: cannot write{where}: {text}"
        )
    return RunError(f"cannot read or write{where}: {text}")


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
