"""The exponential moving average (EMA) of the LoRA's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """An exponential moving average of parameters over their updates t = 1, 2, ...

    ema_t = d_t ema_{t-1} + (1 - d_t) parameters_t, with d_1 = 0 and then d_t = min(decay, t / (t +
    9)): so the weights before training do not count, and a short run averages over its last tenth.

    Args:
        parameters: By name, float32.
        decay: The largest d_t, in [0, 1).

    Attributes:
        values: The average by name, on the parameters' device.
        updates: How many updates it has seen.

    Source: diffusers' EMAModel, whose d_t this is; published decay: 0.995 (LeapAlign,
        arXiv:2604.15311).
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = dict(parameters), decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the present parameters."""
        self.updates += 1
        t = self.updates
        # The first update counts alone: before it B is zero, which is no weight to average with.
        share = 1.0 - min(self._decay, t / (t + 9.0)) if t > 1 else 1.0
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the parameters while the block runs; then they are as before."""
        before = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._put(self.values)
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        # In place: a recorded call reads the parameters where they are.
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
