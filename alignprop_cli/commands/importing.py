"""Imports of torch and diffusers, without looking for garbage meanwhile."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import inside the block in three quarters of the time.

    These libraries make almost a million objects that stay until the process ends. The collector
    goes through them again and again while they are made, now and then later, and once more at the
    end. Here it is off, and afterwards it leaves them alone. Does nothing where torch has been
    imported before: what was made since then could be garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
