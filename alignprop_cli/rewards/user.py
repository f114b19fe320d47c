"""Errors raised by a user's own reward, reported as the user's and not as bugs of this program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alignprop_cli.errors import AlignPropError


@contextmanager
def faults(kind: type[AlignPropError], what: str) -> Iterator[None]:
    """Turn whatever the user's code inside the block raises into one of our errors.

    Such code may raise anything, or end the process. Our own errors pass unchanged, and so do those
    of running out of memory.

    Args:
        kind: Class of the error that is raised instead.
        what: Beginning of its message; the type and text of the original error follow.
    """
    try:
        yield
    # The planner and the trainer answer running out of memory with a smaller plan.
    except (AlignPropError, MemoryError, torch.OutOfMemoryError):
        raise
    # SystemExit too: a module that is imported may call sys.exit().
    except (Exception, SystemExit) as error:
        raise kind(
            f"{what}: {type(error).__name__}: {error}", hint="--debug shows where"
        ) from error
