"""Compile the blocks that the network repeats, where it is measured to pay for itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from alignprop_cli.probe import rehearse
from alignprop_cli.trainer import Trainer

# Compiling takes about a minute, and what it wins is not known before: too much for a short run.
_WORTH_TRYING_SECONDS = 1200.0
# Below this it is within what two timings differ by.
_LEAST_GAIN = 1.03


def compile_network(
    trainer: Trainer,
    wanted: bool | Literal["auto"],
    note: Callable[[str], object],
    *,
    backend: str = "inductor",
) -> None:
    """Compile the repeated blocks of the network if that makes the rest of the run shorter.

    A micro-batch is timed before and after; what is not faster is taken back, and so is what cannot
    be compiled. Values and gradients are the same up to rounding.

    Args:
        trainer: Before its first step; nothing else of it changes.
        wanted: True compiles and keeps it, whatever it wins; `auto` tries on a GPU, in a run of
            more than 20 minutes: on the CPU it won 1 to 3 % after 19 to 41 s.
        note: Told what became of it.
        backend: Of torch.compile.
    """
    network: Any = trainer.model.network
    if wanted is False or (wanted == "auto" and trainer.model.device.type != "cuda"):
        return
    _timed(trainer)  # warms up
    plain = _timed(trainer)
    steps = trainer.config.train.steps - trainer.step_number
    if wanted == "auto" and plain * trainer.plan.accumulation * steps < _WORTH_TRYING_SECONDS:
        return
    started = time.perf_counter()
    try:
        network.compile_repeated_blocks(dynamic=False, backend=backend)
        _timed(trainer)
    except (RuntimeError, ValueError, OSError) as error:
        _take_back(network)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        note(f"the network's blocks cannot be compiled here and run as they are: {reason[0]}")
        return
    took = time.perf_counter() - started
    gain = plain / _timed(trainer)
    kept = wanted is True or gain >= _LEAST_GAIN
    if not kept:
        _take_back(network)
    note(
        f"compiled the network's blocks in {took:.0f} s: a micro-batch is {gain:.2f} x as fast"
        + ("" if kept else ", not worth keeping")
    )


def _take_back(network: torch.nn.Module) -> None:
    """Let all modules run uncompiled again."""
    for module in network.modules():
        module._compiled_call_impl = None


def _timed(trainer: Trainer) -> float:
    """Return the seconds of one micro-batch of the plan, with one call in the window."""
    started = time.perf_counter()
    rehearse(trainer, trainer.plan.micro_batch, calls=1)
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
