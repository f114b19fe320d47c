"""All randomness, keyed: a draw is a function of (seed, purpose, counters) and of nothing else.

So an image does not depend on how a batch is split, on the number of processes, on earlier draws,
or on whether the run was interrupted in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal[
    "noise", "eta", "window", "prompts", "lora", "eval_noise", "eval_eta", "bootstrap", "soup"
]


def key(seed: int, purpose: Purpose, *counters: int) -> int:
    """Return a 63-bit number that is a hash of its arguments (BLAKE2b)."""
    # The separator keeps counters (1, 23) and (12, 3) apart. Shifted to 63 bits, so that the key is
    # not negative where a library stores it as a signed 64-bit number.
    text = "/".join([str(seed), purpose, *map(str, counters)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """Return a fresh CPU generator for this purpose and these counters."""
    return torch.Generator().manual_seed(key(seed, purpose, *counters))


def image_noise(
    seed: int,
    purpose: Purpose,
    images: Sequence[tuple[int, ...]],
    shape: Sequence[int],
    *counters: int,
) -> Tensor:
    """Draw standard normal noise, every image from its own generator.

    Args:
        seed: The run's seed.
        purpose: What the noise is for.
        images: The counters of each image, for instance (step, global image number).
        shape: Shape of one image's noise, without the batch.
        *counters: Further counters common to all images, for instance the index of the step.

    Returns:
        Shape (B, *shape), float32, on the CPU.
    """
    # On the CPU, whose generator gives the same numbers whatever the device that uses them.
    draws = [
        torch.randn(tuple(shape), generator=generator(seed, purpose, *image, *counters))
        for image in images
    ]
    return torch.stack(draws)
