"""What a user's own reward does wrong, told as the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alignprop_cli.errors import AlignPropError


@contextmanager
def faults(kind: type[AlignPropError], what: str) -> Iterator[None]:
    """Turn whatever the code within raises into an error of ours.

    It may raise anything at all, or end the process, and none of it is a fault of this program.
    What already is one of our errors, and memory that ran out, pass unchanged.

    Args:
        kind: Of the error raised instead.
        what: The beginning of its message; the type and text of the fault follow.
    """
    try:
        yield
    except (AlignPropError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise kind(
            f"{what}: {type(error).__name__}: {error}", hint="--debug shows where"
        ) from error
