"""What the rewards that hold pretrained networks share: device, precision, recomputing, texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_TEXTS_KEPT = 4096


class FrozenReward:
    """Base of a reward that measures with pretrained networks, which are never trained.

    `networks` may run in half precision; what comes out of them is normalised, multiplied and
    judged in float32 outside autocast, since half precision is coarser than the differences that
    matter (bfloat16 has steps of 0.002 at a cosine of 0.28). `heads` are always float32.
    """

    networks: tuple[torch.nn.Module, ...] = ()
    heads: tuple[torch.nn.Module, ...] = ()
    device = torch.device("cpu")
    dtype = torch.float32

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Move everything to a device, the networks in a precision, and return self."""
        self.device, self.dtype = device, dtype
        for network in self.networks:
            network.to(device, dtype)
        for head in self.heads:
            head.to(device, exact(dtype))
        return self

    def recompute(self) -> None:
        """From now on compute the repeated blocks of the networks again in backward.

        Memory is then that of one block and the inputs of the others; gradients are the same.
        """
        for network in self.networks:
            for block in _blocks(network):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the precision that features and heads have: float64 where asked for, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(features: Tensor) -> Tensor:
    """Return features of unit length, shape (B, D), float32 at least. Differentiable."""
    return torch.nn.functional.normalize(features.to(exact(features.dtype)), dim=-1)


class TextCache:
    """The features of texts, each computed once.

    Each is computed by itself: the last digits depend on the batch and on the place in it, and must
    not depend on what was asked before.

    Args:
        encode: Returns features, shape (N, D), of N texts.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the features of each text, shape (N, D). Not differentiable."""
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = self._encode([text])[0]
        found = torch.stack([self._known[text] for text in texts])
        while len(self._known) > _TEXTS_KEPT:
            self._known.pop(next(iter(self._known)))
        return found

    def clear(self) -> None:
        """Forget everything, as when the network moves."""
        self._known.clear()


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that a network repeats: the members of its outermost lists."""
    found: list[torch.nn.Module] = []
    for child in network.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) > 1:
            found += list(child)
        else:
            found += _blocks(child)
    return found
