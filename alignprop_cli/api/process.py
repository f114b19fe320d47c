"""A command inside somebody else's process: it prints nothing, and leaves everything as it was."""

from __future__ import annotations

import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from alignprop_cli.console import Bar, Console
from alignprop_cli.device import forget_accelerator, from_main, give_back_memory, has_accelerator
from alignprop_cli.errors import explained
from alignprop_cli.rewards import registry

# What a call sets, such as torch's threads and deterministic kernels, is set for the whole process.
_ONE_AT_A_TIME = threading.RLock()

# Libraries whose progress bars are switched off where they would show.
_WITH_BARS = ("diffusers.utils.logging", "transformers.utils.logging")


@dataclass(frozen=True)
class Progress:
    """How far a call is, for a `progress` callback.

    Args:
        stage: What is done: `training`, `base model`, `tuned model`, `scoring` ...
        done: Steps or images so far.
        total: Of so many.
        note: The smoothed rewards in training; empty elsewhere.
    """

    stage: str
    done: int
    total: int
    note: str


class KeptConsole(Console):
    """Keeps the result and the warnings of a command; prints only if `verbose`.

    Args:
        verbose: Whether to print as the command does.
        progress: Called whenever a bar would move.

    Attributes:
        values: The object that the command would print as JSON; empty before its end.
        warnings: Messages.
    """

    def __init__(self, *, verbose: bool, progress: Callable[[Progress], object] | None) -> None:
        # As JSON: `score` then keeps all rows, and writes none of them to standard output.
        super().__init__(as_json=True, quiet=not verbose)
        self._verbose, self._progress = verbose, progress
        self.values: Mapping[str, Any] = {}
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)
        if self._verbose:
            super().warn(text)
        else:
            # For the report of a run, which shows them whether they are printed or not.
            self.warned.append(text)

    def text(self, text: str) -> None:
        """Print a text, if verbose."""
        if self._verbose:
            super().text(text)

    def result(self, schema: str, values: Mapping[str, Any], human: Sequence[Any] = ()) -> None:
        """Keep the result; if verbose, print what people get."""
        self.values = values
        if self._verbose:
            # For people: as the command without --json.
            self.as_json = False
            super().result(schema, values, human)
            self.as_json = True

    def share(self) -> None:
        """Take the result of the main process: of several it alone has one."""
        self.values = from_main(self.values)

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Bar]:
        """Report to the callback; if verbose, show a bar as the command does."""
        # With JSON there is no bar.
        self.as_json = not self._verbose
        with super().bar(total, label) as bar:
            self.as_json = True
            yield bar if self._progress is None else _Reporting(bar, total, label, self._progress)


class _Reporting(Bar):
    """A bar that also calls a function."""

    def __init__(
        self, bar: Bar, total: int, label: str, progress: Callable[[Progress], object]
    ) -> None:
        super().__init__(None, total, label)
        self._bar, self._report = bar, progress
        self._now = Progress(label, 0, total, "")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Advance by `count`, and say so."""
        self._bar.advance(count, note)
        before = self._now
        said = before.note if note is None else note
        self._now = Progress(before.stage, before.done + count, before.total, said)
        self._report(self._now)


@contextmanager
def guest(rewards: Mapping[str, object]) -> Iterator[None]:
    """Let the block run a command, one at a time, and put back what it changes of the process.

    Args:
        rewards: Python objects that are rewards, by name.

    Raises:
        AlignPropError: For what the operating system or a library reports, where it is known.
    """
    # The lock first: what is put back must be what was there when no other call ran.
    with _ONE_AT_A_TIME, _kept(), registry.given(rewards):
        try:
            yield
        except Exception as error:
            if (known := explained(error)) is not None:
                raise known from error
            raise


@contextmanager
def _kept() -> Iterator[None]:
    """Put back what the block changes of the process."""
    # 1. What is there: of Python ...
    environment, recursion = dict(os.environ), sys.getrecursionlimit()
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    bars = {name: module.is_progress_bar_enabled() for name, module in _libraries_with_bars()}
    # ... and of torch.
    threads, made_before = torch.get_num_threads(), has_accelerator()
    back = _torch_settings()
    try:
        # The caller may compute in another precision, or without gradients.
        torch.set_default_dtype(torch.float32)
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            # Libraries warn of what users of a command can do nothing about.
            warnings.simplefilter("ignore")
            yield
    finally:
        # 2. Put it back.
        for setting in back:
            setting()
        # Only where it differs: setting it also ends torch's own choice.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        # Else the caller's own would be told what to be by ours.
        if not made_before:
            forget_accelerator()
        give_back_memory()
        # Libraries initialise weights at random before they load them.
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])  # noqa: NPY002
        torch.set_rng_state(seeds[2])
        # Bars of a library that was imported on the way are on by default.
        for name, module in _libraries_with_bars():
            wanted = bars.get(name, True)
            (module.enable_progress_bar if wanted else module.disable_progress_bar)()
        # Libraries raise it when they are imported.
        sys.setrecursionlimit(recursion)
        # accelerate tells its settings to other libraries there.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _libraries_with_bars() -> list[tuple[str, Any]]:
    """Return what is imported of them: a command that needs none must not import them for this."""
    return [(name, sys.modules[name]) for name in _WITH_BARS if name in sys.modules]


def _torch_settings() -> list[Callable[[], object]]:
    """Return functions that put torch's global settings back to what they are now."""
    deterministic: Any = torch.utils.deterministic
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    precisions = _precisions()
    repeats = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    # Read now, and set by the functions below.
    fills, dtype = deterministic.fill_uninitialized_memory, torch.get_default_dtype()
    benchmark = cudnn.benchmark
    attention = cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    return [
        lambda: torch.use_deterministic_algorithms(repeats, warn_only=warns),
        lambda: setattr(deterministic, "fill_uninitialized_memory", fills),
        *precisions,
        _memory_share(),
        lambda: setattr(cudnn, "benchmark", benchmark),
        lambda: cuda.enable_cudnn_sdp(attention[0]),
        lambda: cuda.enable_mem_efficient_sdp(attention[1]),
        lambda: torch.set_default_dtype(dtype),
    ]


def _memory_share() -> Callable[[], object]:
    """Return a function that lets torch use as much of the GPU as it may now."""
    cuda: Any = torch.cuda
    # Before torch has begun to use it, and with a torch that cannot be asked, it is all of it.
    known = cuda.is_initialized() and hasattr(cuda, "get_per_process_memory_fraction")
    share = cuda.get_per_process_memory_fraction() if known else 1.0

    def put_back() -> None:
        if cuda.is_initialized():
            cuda.set_per_process_memory_fraction(share)

    return put_back


def _precisions() -> list[Callable[[], object]]:
    """Return functions that put the precision of float32 on a GPU back to what it is now."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    back: list[Callable[[], object]] = []
    # 1. As it was set before torch 2.9. Who sets the newer ones cannot read these: torch raises.
    with suppress(RuntimeError):
        back.append(
            partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        )
    with suppress(RuntimeError):
        back.append(partial(setattr, cudnn, "allow_tf32", cudnn.allow_tf32))
    # 2. As it is since, for each kind of operation; the older ones have set these too.
    for place in (cuda.matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)):
        if hasattr(place, "fp32_precision"):
            now: str = getattr(place, "fp32_precision")  # noqa: B009
            back.append(partial(setattr, place, "fp32_precision", now))
    return back
