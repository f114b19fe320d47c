"""The bytes of what is trained: the LoRA's weights, gradients, and what an optimiser keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable

from alignprop_cli.config.train import OptimizerName

# bitsandbytes keeps smaller tensors in float32, and of larger ones a float32 scale for each block.
SMALLEST_8BIT, _BLOCK = 4096, 256
_FLOAT = 4  # bytes


def state_bytes(optimizer: OptimizerName, numels: Iterable[int]) -> int:
    """Return the bytes that an optimiser keeps from its first update on.

    Args:
        optimizer: Which one.
        numels: Number of values of each parameter, which are float32.
    """
    if optimizer == "adamw8bit":
        return sum(
            2 * (n + _FLOAT * math.ceil(n / _BLOCK)) if n >= SMALLEST_8BIT else 2 * _FLOAT * n
            for n in numels
        )
    # Two moments; Prodigy also keeps the first value and a mean of the gradient.
    return (4 if optimizer == "prodigy" else 2) * _FLOAT * sum(numels)


def bytes_each(optimizer: OptimizerName, numels: Iterable[int], *, averaged: bool) -> float:
    """Return the bytes of one value: weight, gradient, optimiser and, with `averaged`, average."""
    numels = list(numels)
    return (2 + averaged) * _FLOAT + state_bytes(optimizer, numels) / sum(numels)
