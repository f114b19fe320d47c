"""The run's side of its trackers: start a process for each, write what happens, never wait.

A tracker may hang, crash or fill the memory. In a process of its own it can do none of that to the
run, whose only work is to append lines to a file. At the end the run waits a few seconds for all.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignprop_cli.config.tracking import TrackingConfig
from alignprop_cli.errors import AssetError
from alignprop_cli.tracking.spool import END, FEED, LEFT, Job, State, running, state_file

LIMIT = 5.0
"""Seconds that all trackers together may keep a run waiting at its end."""

# How long a process goes on by itself after the end of its run.
AFTERWARDS = 600
# Seconds between two looks at the states.
_PERIOD = 1.0
# Bytes of the feed, and images that wait: beyond that a tracker that hangs is told no more.
_LARGEST_FEED, _MOST_IMAGES = 2**26, 256
# What a process of several is told by its launcher; the tracker's process is none of them.
_OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def check(settings: TrackingConfig) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        AssetError: With what to install.
    """
    for name in settings.log_with:
        if importlib.util.find_spec(name) is None:
            raise AssetError(
                f"tracking.log_with: {name} is not installed",
                hint=f"pip install 'alignprop[{name}]'",
            )


class Followers:
    """The trackers of one run. All methods return at once, but for `end`.

    Args:
        names: Of the trackers; with none every method does nothing.
        warn: Called with a message, once for each tracker that fails.
        note: Called with the address of a run.
        limit: Seconds that `end` waits.
    """

    def __init__(
        self,
        names: Sequence[str],
        warn: Callable[[str], object],
        note: Callable[[str], object] = lambda text: None,
        limit: float = LIMIT,
    ) -> None:
        self._names, self._warn, self._note, self._limit = tuple(names), warn, note, limit
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._events = self._dropped = 0
        self._images: list[tuple[int, list[Path]]] = []
        self._told: set[str] = set()
        self._spool = Path()  # no folder yet
        self._looked = 0.0

    def start(self, job: Job) -> None:
        """Start the processes, which load the trackers while the run goes on."""
        if not self._names:
            return
        self._job = job
        try:
            self._spool = Path(tempfile.mkdtemp(prefix="alignprop-tracking-"))
            job.write(self._spool)
            (self._spool / FEED).touch()
            if job.states is not None:
                Path(job.states).mkdir(exist_ok=True)
            for name in self._names:
                file = state_file(self._spool, job, name)
                # Of the last start only what identifies the run, and what it has been told.
                before = State.read(file)
                State(before.nonce, before.step).write(file)
                running(self._spool, name).touch()
                self._running[name] = _process(self._spool, name)
        except OSError as error:
            self._give_up(error)

    def scalars(self, step: int, values: Mapping[str, Any], *, again: bool = False) -> None:
        """Tell the numbers of a step; of nested values the names are joined by a slash.

        Args:
            step: The step.
            values: What is no finite number is left out.
            again: Whether a tracker takes them that has been told of this step before.
        """
        if self._running:
            event = {"kind": "scalars", "step": step, "values": dict(_flat(values))}
            self._tell({**event, "again": again})

    def images(
        self, step: int, label: str, shown: Sequence[tuple[NDArray[np.uint8], str, str]]
    ) -> None:
        """Show images (H, W, 3), uint8, each with its prompt and a text about it."""
        if not self._running:
            return
        self._forget_images()
        if sum(len(files) for _, files in self._images) > _MOST_IMAGES:
            self._dropped += 1
            return
        try:
            files = [self._spool / f"{self._events:06d}-{i:02d}.png" for i in range(len(shown))]
            for file, (image, _, _) in zip(files, shown, strict=True):
                # Fast rather than small: they are read once and deleted.
                Image.fromarray(image).save(file, compress_level=1)
        except OSError as error:
            return self._give_up(error)
        self._images.append((self._events, files))
        self._show(step, label, files, [(prompt, text) for _, prompt, text in shown])

    def image_files(
        self, step: int, label: str, files: Sequence[Path], texts: Sequence[tuple[str, str]]
    ) -> None:
        """Show images that are files already, each with its prompt and a text about it."""
        if self._running:
            self._show(step, label, [file.resolve() for file in files], texts)

    def artifact(self, name: str, files: Sequence[Path]) -> None:
        """Hand files over, such as the adapter."""
        if self._running:
            self._tell(
                {"kind": "artifact", "name": name, "files": [str(f.resolve()) for f in files]}
            )

    def end(self, status: str) -> None:
        """Wait for the trackers, not longer than the limit, and say what is missing.

        Args:
            status: `finished`, `failed` or `interrupted`.
        """
        if not self._running:
            return self._leave()
        # 1. Tell them, and wait for all together.
        deadline = time.monotonic() + self._limit
        try:
            (self._spool / END).write_text(status, encoding="utf-8")
        except OSError as error:
            return self._give_up(error)
        while any(p.poll() is None for p in self._running.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        # 2. Say what is missing.
        self._looked = 0.0
        self._look(at_end=True)
        if self._dropped:
            self._warn(f"tracking: {self._dropped} events were not told: a tracker was too slow")
        self._leave()

    def _leave(self) -> None:
        """Remove the folder, or leave that to the last process that still reads it."""
        # Each side makes its own sign first and looks for the others' then, so one sees all.
        if self._spool == Path():
            return
        with suppress(OSError):
            (self._spool / LEFT).touch()
        ended = [name for name in self._names if name not in self._running]
        for name in (*ended, *(n for n, p in self._running.items() if p.poll() is not None)):
            running(self._spool, name).unlink(missing_ok=True)
        if not any(running(self._spool, name).exists() for name in self._names):
            shutil.rmtree(self._spool, ignore_errors=True)
        self._running = {}

    def _show(
        self, step: int, label: str, files: Sequence[Path], texts: Sequence[tuple[str, str]]
    ) -> None:
        # By name alone: the process opens them when it gets to them.
        shown = [
            {"file": str(file), "prompt": prompt, "text": text}
            for file, (prompt, text) in zip(files, texts, strict=True)
        ]
        self._tell({"kind": "images", "step": step, "label": label, "images": shown})

    def _tell(self, event: Mapping[str, Any]) -> None:
        """Append an event, unless nobody has read for a long time."""
        self._look()
        if not self._running:
            return
        try:
            feed = self._spool / FEED
            if feed.stat().st_size > _LARGEST_FEED:
                self._dropped += 1
                return
            with feed.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            self._events += 1
        except OSError as error:
            self._give_up(error)

    def _look(self, *, at_end: bool = False) -> None:
        """See which trackers have ended, and say so once."""
        if time.monotonic() < self._looked + _PERIOD:
            return
        self._looked = time.monotonic()
        for name, process in list(self._running.items()):
            state = State.read(state_file(self._spool, self._job, name))
            # Once it is known: a tracker begins its run seconds after it was started.
            if state.url is not None and name not in self._told:
                self._told.add(name)
                self._note(f"{name}: {state.url}")
            if process.poll() is None:
                if at_end:
                    self._warn(_is_late(name, state, self._events))
                continue
            # It was killed, has crashed, or its tracker refused to begin.
            if not state.done:
                why = state.error or f"its process ended with code {process.returncode}"
                self._warn(f"{name}: {_missing(state, self._events)}: {why}")
                del self._running[name]
            elif state.lost and at_end:
                why = state.error or "no reason is known"
                self._warn(f"{name}: {state.lost} of {self._events} events were lost: {why}")

    def _forget_images(self) -> None:
        """Remove the images that every tracker has read."""
        states = [State.read(state_file(self._spool, self._job, name)) for name in self._running]
        read = min((state.taken for state in states), default=0)
        for _, files in [one for one in self._images if one[0] < read]:
            for file in files:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
        self._images = [one for one in self._images if one[0] >= read]

    def _give_up(self, error: OSError) -> None:
        """Go on without trackers: the disk is full, for instance."""
        self._warn(f"tracking: nothing more is told to {', '.join(self._names)}: {error}")
        for process in self._running.values():
            process.kill()
            process.wait()
        self._leave()


def _process(spool: Path, name: str) -> subprocess.Popen[bytes]:
    """Start the process of a tracker."""
    environment = {k: v for k, v in os.environ.items() if k not in _OF_LAUNCHERS}
    # It needs no GPU, and must not take any memory of one.
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    # A clone need not be installed, so the process is told where this code is.
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        # -P: the working folder may hold a wandb.py of somebody else's.
        [
            sys.executable,
            "-P",
            "-m",
            "alignprop_cli.tracking.child",
            str(spool),
            name,
            str(os.getpid()),
            str(AFTERWARDS),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        # What trackers print is for nobody, and might tell a key.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl+C is meant for the run, which tells it the end.
        start_new_session=True,
    )


def _missing(state: State, events: int) -> str:
    return f"has ended after {state.taken} of {events} events; the run does not depend on it"


def _is_late(name: str, state: State, events: int) -> str:
    """Return what is said of a tracker that still runs at the end."""
    why = f" ({state.error})" if state.error else ""
    return (
        f"{name}: has taken {state.taken} of {events} events so far{why}; it goes on by itself for "
        f"at most {AFTERWARDS // 60} minutes, and what it has not sent then is lost"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the finite numbers of nested values, by their joined names."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        # True and false are curves as well; texts are not.
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            found.append((f"{prefix}{name}", float(value)))
    return found
