"""A call that several processes make: the others learn how it has ended for the main one.

The main process alone writes and uploads, long after the others are done. They wait for its word in
the store that the processes met in, and not in a collective call: that would go on waiting for a
process that has raised an error and is alive.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, cast

import torch.distributed as dist

from alignprop_cli.device import has_accelerator
from alignprop_cli.errors import AlignPropError, RunError, first_line

# All processes make the same calls in the same order, so the number says which one is meant.
_CALLS = itertools.count()
# Seconds between two looks.
_PAUSE = 0.1
_DONE = "done"


class Ending:
    """The end of one call, made at its beginning in every process."""

    def __init__(self) -> None:
        self._key = f"alignprop/call-{next(_CALLS)}"

    def tell(self, failure: BaseException | None) -> None:
        """Say how the call has ended, in the main process; elsewhere nothing happens.

        Args:
            failure: What it ended with; None if all went well.
        """
        store = _store()
        if store is None or dist.get_rank() != 0:
            return
        message = _DONE if failure is None else f"failed: {_said(failure)}"
        try:
            store.set(self._key, message)
        # Nobody is there any more to be told.
        except RuntimeError:
            return

    def wait(self) -> None:
        """Wait until the main process has ended the call; in that one nothing happens.

        Raises:
            RunError: If it has failed or is gone.
        """
        store = _store()
        if store is None or dist.get_rank() == 0:
            return
        try:
            # However long that takes: an upload may.
            while not store.check([self._key]):
                time.sleep(_PAUSE)
            told = bytes(store.get(self._key)).decode("utf-8", "replace")
        except RuntimeError as error:
            raise RunError(
                "the main process of this call has ended; its own message says why"
            ) from error
        if told != _DONE:
            raise RunError(f"the main process of this call {told}")


def _store() -> Any:
    """Return where the processes have met; None if there is one alone, or they never met."""
    if not (has_accelerator() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    # torch has no public name for it.
    return cast(Any, dist.distributed_c10d)._get_default_store()


def _said(failure: BaseException) -> str:
    if isinstance(failure, AlignPropError):
        return failure.message
    return f"{type(failure).__name__}: {first_line(failure)}"
