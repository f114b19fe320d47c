"""`step.py --parts`: a step with each part of our speed on and off, within a time that is given.

Every answer is written as a line of JSON as soon as it is there. A part that fails is written as
well, and its process is started anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import trl_environment
from sides import HERE, Case, Side, environment, machine

# Of variants.py, in the order of their worth where time is short; compiling takes minutes.
ROUNDS = (
    ("as_planned", "peft_lora", "replayed"),
    ("one_batch", "by_operations", "contiguous", "deterministic"),
    ("compiled",),
)
_GRACE = 20.0
"""Seconds that the last answer may take beyond the time."""
WINDOWS: tuple[int | str, ...] = (10, 1, "random", 50)
"""Those with the most to tell first."""


class Turns:
    """Asks both sides until the time is over.

    Args:
        arguments: Of the command line.
        case: What a step is.
    """

    def __init__(self, arguments: argparse.Namespace, case: Case) -> None:
        self._case, self._lines = case, arguments.lines
        self._end = time.monotonic() + arguments.seconds
        self._peer = trl_environment.python_and_path(arguments) if arguments.trl else None
        self._sides: dict[str, Side] = {}

    def _side(self, name: str) -> Side:
        if name not in self._sides:
            python, path = (sys.executable, None) if name == "ours" else self._peer or ("", None)
            script = HERE / ("variants.py" if name == "ours" else "peer.py")
            variables = environment(self._case.threads, path, self._case.device)
            self._sides[name] = Side(python, script, [self._case.encoded()], variables)
        return self._sides[name]

    def ask(self, side: str, command: str, labels: dict[str, Any], **sent: Any) -> bool:
        """Ask, and write what comes; return whether the side is as it was before."""
        if time.monotonic() > self._end:
            self.write({**labels, "side": side, "skipped": "the time is over"})
            return False
        started = time.monotonic()
        # What is still at work then, such as a compiler, is ended.
        late = threading.Timer(self._end - started + _GRACE, self._side(side).kill)
        late.start()
        try:
            answer = self._side(side).ask(command, **sent)
        except (OSError, RuntimeError, ValueError) as error:
            self.write({**labels, "side": side, "error": f"{type(error).__name__}: {error}"})
            self._sides.pop(side).kill()
            return False
        finally:
            late.cancel()
        if "CUDA error" in answer.get("error", ""):  # everything after it fails too
            self._sides.pop(side).kill()
        took = round(time.monotonic() - started, 1)
        self.write({**labels, "side": side, "command": command, **answer, "asked for": took})
        return side in self._sides

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if self._lines is not None:
            with Path(self._lines).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def close(self) -> None:
        for side in self._sides.values():
            side.close()


def measure(arguments: argparse.Namespace, case: Case) -> None:
    """Measure all variants of all windows, the plain ones of every window first."""
    turns = Turns(arguments, case)
    turns.write({"machine": machine(), "case": json.loads(case.encoded())})
    turns.ask("ours", "versions", {})
    windows = [w for w in WINDOWS if w == "random" or w <= case.steps]
    for variants in ROUNDS:
        for window in windows:
            if not turns.ask("ours", "plan_window", {"window": window}, window=window):
                continue
            for variant in variants:
                labels = {"window": window, "variant": variant}
                # A process that is started anew has no window.
                if not turns.ask("ours", "vary", labels, variant=variant):
                    turns.ask("ours", "plan_window", {"window": window}, window=window)
            if arguments.trl and variants == ROUNDS[0] and isinstance(window, int):
                turns.ask("TRL", "step", {"window": window}, k=window)
    turns.close()
