"""Errors raised by a user's own reward, reported as the user's and not as bugs of this program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from alignprop_cli.errors import AlignPropError, is_out_of_memory

# Characters of an error's message that are shown.
_LONGEST = 1000


@contextmanager
def faults(kind: type[AlignPropError], what: str) -> Iterator[None]:
    """Turn whatever the user's code inside the block raises into one of our errors.

    Such code may raise anything. Our own errors pass unchanged, and so do those of running out of
    memory and the signals that end this program. What the code prints goes to standard error, since
    standard output is for the result. That it ends the process, with `os._exit` or a crash of its
    own, cannot be caught.

    Args:
        kind: Class of the error that is raised instead.
        what: Beginning of its message; the type and text of the original error follow.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (AlignPropError, KeyboardInterrupt):
        raise
    # Everything: a module that is imported may call sys.exit(), a reward raise GeneratorExit.
    except BaseException as error:
        # The planner and the trainer answer running out of memory with a smaller plan.
        if is_out_of_memory(error):
            raise
        raise kind(
            f"{what}: {type(error).__name__}: {_text(error)}", hint="--debug shows where"
        ) from error


def _text(error: BaseException) -> str:
    """Return what an error says, cut: some say all that their library knows."""
    text = str(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
