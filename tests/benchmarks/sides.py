"""What both sides of a comparison run in: a process of its own that answers in lines of JSON.

Imports nothing but torch and numpy, so that it also works where alignprop is not installed.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("a photo of a cat", "a red dog")


def reward(images: torch.Tensor, prompts: object) -> torch.Tensor:
    """Return minus the mean squared distance from grey, shape (B,): next to no work."""
    return -((images - 0.5) ** 2).mean(dim=(1, 2, 3))


def lora_values(names: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, torch.Tensor]:
    """Return the same LoRA for both sides: a function of the names and shapes alone."""
    generator = torch.Generator().manual_seed(1234)
    values: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        drawn = torch.randn(names[name], generator=generator)
        values[name] = drawn / rank if ".lora_A." in name else 0.02 * drawn
    return values


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests from standard input until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request["command"]](**request["arguments"])
        print("answer " + json.dumps(answer), flush=True)


def timed(step: Callable[[], object]) -> dict[str, float]:
    """Return the wall-clock and processor seconds of one step."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


class Side:
    """The other end of `serve`.

    Args:
        python: Interpreter of the side's environment.
        script: That ends in `serve`.
        arguments: Of the script.
        environment: Variables of the process.
    """

    def __init__(
        self, python: str, script: Path, arguments: list[str], environment: dict[str, str]
    ) -> None:
        self._process = subprocess.Popen(
            [python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a request and wait for its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
        stdin.flush()
        for line in stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("the other side ended; see what it printed above")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)
