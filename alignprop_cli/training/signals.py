"""Stopping between two steps when a signal asks for it, in all processes at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.console import Console


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether any process says so: all must leave the loop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    said = torch.tensor([float(flag)], device=accelerator.device)
    return float(cast(Tensor, accelerator.reduce(said, "sum"))) > 0.0


@contextmanager
def signals(console: Console) -> Iterator[list[int]]:
    """Note the first interruption, so that the step is finished and saved; obey the second."""
    caught: list[int] = []
    old: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        console.warn("finishing this step, then saving; once more to stop at once")
        for each, handler in old.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
