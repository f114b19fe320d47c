"""What the rewards that hold pretrained networks share: device, precision, recomputation, texts.

`FrozenReward` is the reward itself; `MetaReward` is the same computation without weights, by which
the planner counts what the reward will need before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_cli.hub import loading

_TEXTS_KEPT = 4096


class FrozenReward:
    """Base of a reward that measures with pretrained networks, which are never trained.

    `networks` may run in half precision. What comes out of them is normalised, multiplied and
    judged in float32 outside autocast, since half precision is coarser than the differences that
    matter (bfloat16 has steps of 0.002 at a cosine of 0.28). `heads` are always float32.

    A subclass may have `on_meta(dtype, **options)`, a class method that takes the options of its
    constructor and returns its `MetaReward`, or None where its network is not known before it is
    loaded.
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
        """From now on recompute the repeated blocks of the networks in backward.

        Memory is then that of one block and the inputs of the others; gradients are the same.
        """
        for network in self.networks:
            for block in _blocks(network):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class CosineReward(FrozenReward):
    """Base of the rewards that compare an image with its prompt by features of unit length.

    A subclass has `see(images)` and `read(texts)`. The features of a prompt are computed once.
    """

    def __init__(self) -> None:
        self.text_features = TextCache(self.read)

    def see(self, images: Tensor) -> Tensor:
        """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
        raise NotImplementedError

    def read(self, texts: list[str]) -> Tensor:
        """Return features of unit length, shape (N, D), of N texts."""
        raise NotImplementedError

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Move the networks to a device, in a precision, and return self."""
        self.text_features.clear()
        return super().to(device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its prompt, shape (B,). Differentiable in images."""
        return (self.see(images) * self.text_features(prompts)).sum(dim=-1)


class MetaReward(FrozenReward):
    """A reward on the meta device: its shapes and its work without its weights.

    Args:
        measure: From images (B, 3, H, W) on the meta device to any tensor (B, ...) that is
            differentiable in them.
        networks: What it runs, on the meta device.
        dtype: Precision of the networks.
    """

    def __init__(
        self,
        measure: Callable[[Tensor], Tensor],
        *networks: torch.nn.Module,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._measure, self.networks, self.dtype = measure, networks, dtype
        for network in networks:
            network.eval().requires_grad_(False)
            torch.nn.Module.to(network, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Return a tensor of shape (B,) without values. Differentiable in images."""
        return self._measure(images).reshape(len(images), -1).sum(dim=1)

    @property
    def tensors(self) -> list[Tensor]:
        """Return the weights and buffers, which are in memory whatever is measured."""
        return [t for network in self.networks for t in (*network.parameters(), *network.buffers())]

    @property
    def parameters(self) -> int:
        """Return the number of weights, those that read the prompt among them."""
        return sum(p.numel() for network in self.networks for p in network.parameters())


def without_network(
    reward: Callable[[Tensor, Sequence[str]], Tensor],
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Let a reward that has no weights and reads no prompt be its own `MetaReward`; a decorator."""

    def on_meta(dtype: torch.dtype) -> MetaReward:
        return MetaReward(lambda images: reward(images, [""] * len(images)))

    reward.on_meta = on_meta  # type: ignore[attr-defined]
    return reward


def known_config(kind: Any, place: str, published: Mapping[str, Any], *, option: str) -> Any:
    """Return the configuration of a network of transformers, without loading its weights.

    Args:
        kind: What reads the configuration of a folder: a class of transformers.
        place: A folder or a hub id.
        published: Configurations by hub id.
        option: The option that names the place, for the messages.

    Returns:
        The configuration; None for a hub id that is not among the published ones.

    Raises:
        AssetError: If the folder's configuration is missing or damaged.
    """
    if Path(place).expanduser().is_dir():
        with loading(option, place):
            return kind.from_pretrained(place)
    return published.get(place)


def refuse_other_tensors(state: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse weights whose names are not those that a network has.

    Raises:
        ValueError: With the first name that is missing or unknown.
    """
    known = set(expected)
    wrong = sorted(known ^ set(state))
    if wrong:
        kind = "lacks" if wrong[0] in known else "has an unknown"
        raise ValueError(f"it {kind} {wrong[0]} ({len(wrong)} names differ)")


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
        # The oldest go first; a dictionary keeps the order in which its keys came.
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
