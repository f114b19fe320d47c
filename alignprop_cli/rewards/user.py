"""Faults of a user's own reward, told as the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alignprop_cli.errors import AlignPropError


@contextmanager
def faults(kind: type[AlignPropError], what: str) -> Iterator[None]:
    """Turn whatever the user's code inside the block raises into one of our errors.

    Such code may raise anything, or end the process, and none of it is a bug of this program. Our
    own errors and memory that has run out pass unchanged.

    Args:
        kind: Of the error that is raised instead.
        what: Beginning of its message; the type and text of the fault follow.
    """
    try:
        yield
    except (AlignPropError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise kind(
            f"{what}: {type(error).__name__}: {error}", hint="--debug shows where"
        ) from error
