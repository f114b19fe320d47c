"""Compile the repeated blocks of the network, if a measurement shows that it pays off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from alignprop_cli.errors import first_line
from alignprop_cli.models.compiled import compile_blocks, take_back
from alignprop_cli.training.trial import Trial

# Compiling takes about a minute, and its gain is unknown before: too much for a short run.
_WORTH_TRYING_SECONDS = 1200.0
# Two timings of the same code differ by up to this factor.
_LEAST_GAIN = 1.03
# Dynamo's limit of compiled versions of one function; its default of 8 is too few, see below.
_FORMS = 256


def compile_network(
    trial: Trial,
    steps: int,
    wanted: bool | Literal["auto"],
    note: Callable[[str], object],
    *,
    backend: str = "inductor",
) -> None:
    """Compile the repeated blocks of the network if that makes the rest of the run shorter.

    A micro-batch is timed before and after. The compilation is undone if it is not faster, fails,
    or runs out of memory. Values and gradients are the same up to rounding.

    Args:
        trial: A trainer before its first step; nothing else of it changes.
        steps: Steps that are left to do.
        wanted: True compiles in any case; `auto` tries it on a GPU, if the run takes more than 20
            minutes with one call in the window.
        note: Called with the outcome, for people.
        backend: Backend of torch.compile.
    """
    network: Any = trial.trainer.model.network.module
    if wanted is False or (wanted == "auto" and _is_pointless(trial, steps)) or steps <= 0:
        return
    try:
        _timed(trial)  # warm-up
        plain = _timed(trial)
    except torch.OutOfMemoryError:
        note("the network's blocks are not compiled: memory ran out before that")
        return
    if wanted == "auto" and plain * trial.plan.accumulation * steps < _WORTH_TRYING_SECONDS:
        return
    started = time.perf_counter()
    # A version for each level of the network, with and without gradient, for each batch size.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(_FORMS, dynamo.recompile_limit)
    try:
        compile_blocks(network, dynamic=False, backend=backend)
        trial.apply_plan(trial.plan)  # what was recorded of the roll-out is not compiled
        # The longest path first: compiled blocks may store more, and memory must not run out later.
        trial.run_micro_batch()
        _timed(trial)
        took = time.perf_counter() - started
        gain = plain / _timed(trial)
    except (RuntimeError, ValueError, OSError) as error:
        take_back(network)
        note(
            f"the network's blocks cannot be compiled here and run as they are: {first_line(error)}"
        )
        return
    kept = wanted is True or gain >= _LEAST_GAIN
    if not kept:
        take_back(network)
    note(
        f"compiled the network's blocks in {took:.0f} s: a micro-batch is {gain:.2f} x as fast"
        + ("" if kept else ", not worth keeping")
    )


def _is_pointless(trial: Trial, steps: int) -> bool:
    # Not on the CPU: there runs repeat bit for bit, and a timing must not decide how they round. It
    # gained 1 to 3 % (34 million weights, torch 2.15) and 15 % (the embedded model, torch 2.14).
    if trial.trainer.model.device.type != "cuda":
        return True
    # The probe's prediction tells without a timing that a run is short, by a wide margin.
    expected = trial.plan.seconds
    return expected is not None and 2.0 * expected * steps < _WORTH_TRYING_SECONDS


def _timed(trial: Trial) -> float:
    """Return the seconds of one micro-batch of the plan with one call in the window."""
    started = time.perf_counter()
    trial.run_micro_batch(calls=1)
    if trial.trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
