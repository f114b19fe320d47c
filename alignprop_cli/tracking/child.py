"""The process of one tracker: read what the run tells, hand it over, and end after the run.

Started by `follow.py` with: the folder, the tracker's name, the run's process id, and the seconds
that may pass after its end.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli.errors import first_line
from alignprop_cli.tracking.secrets import masked
from alignprop_cli.tracking.spool import END, FEED, LEFT, Job, State, identity, running, state_file

if TYPE_CHECKING:
    from alignprop_cli.tracking.backends import Backend

# Seconds between two looks at the feed.
_PERIOD = 0.2
# Events that fail in a row, after which a tracker counts as dead.
_MOST_FAILURES = 3


class Spool:
    """The folder as the process sees it.

    Args:
        folder: The folder.
        run: The run's process id.
    """

    def __init__(self, folder: Path, run: int) -> None:
        self.folder, self._run = folder, run

    def status(self) -> str | None:
        """Return how the run ended; None while it lives."""
        try:
            return (self.folder / END).read_text(encoding="utf-8")
        except FileNotFoundError:
            # A killed run says nothing. Its children then have another parent.
            return None if os.getppid() == self._run else "failed"

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events as they come, until the run has ended and all are read."""
        with (self.folder / FEED).open(encoding="utf-8") as feed:
            half = ""
            while True:
                # Before reading: what comes before the end is read after it.
                ended = self.status() is not None
                while line := half + feed.readline():
                    half = "" if line.endswith("\n") else line
                    if half:
                        break
                    yield json.loads(line)
                if ended:
                    return
                time.sleep(_PERIOD)

    def leave(self, name: str) -> None:
        """Remove the folder if this is the last to leave it and the run waits no more."""
        running(self.folder, name).unlink(missing_ok=True)
        abandoned = (self.folder / LEFT).exists() or os.getppid() != self._run
        if abandoned and not any(self.folder.glob(running(self.folder, "*").name)):
            shutil.rmtree(self.folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Follow a run; return 0 where everything was handed over."""
    folder, (name, run, afterwards) = Path(arguments[0]), arguments[1:]
    # Started first, so that this process ends in any case.
    spool, job = Spool(folder, int(run)), Job.read(folder)
    threading.Thread(target=_watch, args=(spool, name, float(afterwards)), daemon=True).start()
    file = state_file(folder, job, name)
    before = State.read(file)
    # What the last start has sent; what has been undone since by going back is sent again.
    state = State(nonce=before.nonce, step=min(before.step, job.resumed))
    state.done = _tried(state, lambda: _follow(spool, job, name, state, file))
    with suppress(OSError):
        state.write(file)
    spool.leave(name)
    return 0 if state.done else 1


def _follow(spool: Spool, job: Job, name: str, state: State, file: Path) -> None:
    """Hand over one event after another."""
    # Loaded at once, since that takes seconds; begun at the first event, when the folder is there.
    from accelerate import PartialState

    from alignprop_cli.tracking.backends import BACKENDS

    PartialState()  # accelerate's trackers ask it whether they are on the main process
    importlib.import_module(name)
    backend: Backend | None = None
    sent, failures = state.step, 0
    for event in spool.events():
        # Whatever this raises ends the process: a tracker that cannot begin is of no use.
        if backend is None:
            backend = BACKENDS[name](job, identity(job, state.nonce))
            state.url = None if backend.url is None else masked(backend.url)
        if event["kind"] != "scalars" or event["again"] or event["step"] > sent:
            taken = _tried(state, lambda b=backend, e=event: _hand_over(b, e))
            state.lost, failures = state.lost + (not taken), 0 if taken else failures + 1
        # One lost event is an accident, several in a row are a server that is gone.
        if failures == _MOST_FAILURES:
            raise RuntimeError(state.error)
        state.taken, state.step = state.taken + 1, max(state.step, event.get("step", 0))
        state.write(file)
    # Without any event there was no run, and none is made for it.
    if backend is not None:
        backend.end(spool.status() or "failed")


def _hand_over(backend: Backend, event: dict[str, Any]) -> None:
    if event["kind"] == "scalars":
        backend.scalars(event["step"], event["values"])
    elif event["kind"] == "images":
        backend.images(event["step"], event["label"], event["images"])
    else:
        backend.artifact(event["name"], event["files"])


def _tried(state: State, work: Callable[[], object]) -> bool:
    """Return whether something worked; why it did not is in the state, for the run's side."""
    try:
        work()
    # Code of others, which may fail in any way.
    except Exception as error:  # noqa: BLE001
        state.error = masked(f"{type(error).__name__}: {first_line(error)}")[:300]
        return False
    return True


def _watch(spool: Spool, name: str, afterwards: float) -> None:
    """End this process some time after the run, whatever the tracker is doing then."""
    while spool.status() is None:
        time.sleep(1.0)
    time.sleep(afterwards)
    spool.leave(name)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
