"""What rewards with pretrained networks share: device, precision, recomputation, cached texts.

`FrozenReward` is the reward itself. `MetaReward` is the same computation without weights, from
which the planner estimates the reward's memory before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_cli.hub import loading
from alignprop_cli.paths import user_path

# Prompts whose features are kept: 16 MiB with 1024 features in float32.
_TEXTS_KEPT = 4096


class FrozenReward:
    """Base of a reward that measures with pretrained networks, which are never trained.

    `networks` may run in half precision. Their outputs are normalised, multiplied and passed to the
    `heads` in float32 outside autocast, because half precision is coarser than the differences that
    matter: bfloat16 has steps of 0.002 at a cosine of 0.28.

    A subclass may have `on_meta(dtype, **options)`, a class method that takes the options of its
    constructor and returns its `MetaReward`, or None where the sizes of its network are unknown
    until it is loaded.
    """

    networks: tuple[torch.nn.Module, ...] = ()
    heads: tuple[torch.nn.Module, ...] = ()
    device = torch.device("cpu")
    dtype = torch.float32

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Move everything to a device, convert the networks to a precision, and return self."""
        self.device, self.dtype = device, dtype
        for network in self.networks:
            # Scales of logits are kept as logarithms: rounded, 100 would become 98.9.
            scalars = [(each, each.data) for each in network.parameters() if each.ndim == 0]
            network.to(device, dtype)
            for parameter, value in scalars:
                parameter.data = value.to(device, exact(dtype))
        for head in self.heads:
            head.to(device, exact(dtype))
        return self

    def cuts(self, prompt: str) -> bool:
        """Return whether the networks do not read a prompt to its end."""
        return False

    def recompute(self) -> None:
        """From now on recompute the repeated blocks of the networks in the backward pass.

        Only the input of every block and the activations of one are then in memory. Gradients stay
        the same.
        """
        for network in self.networks:
            for block in _blocks(network):
                # The reentrant kind supports neither torch.autograd.grad nor keyword arguments.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class CosineReward(FrozenReward):
    """Base of the rewards that compare the features of an image with those of its prompt.

    A subclass implements `see(images)` and `read(texts)`. Each prompt is encoded once and cached.
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
        """Move the networks to a device, convert them to a precision, and return self."""
        # The cached features are on the old device and have the old precision.
        self.text_features.clear()
        return super().to(device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its prompt, shape (B,). Differentiable in images."""
        return (self.see(images) * self.text_features(prompts)).sum(dim=-1)


class MetaReward(FrozenReward):
    """A reward on the meta device: its operations and their shapes, without weights or values.

    Args:
        measure: From images (B, 3, H, W) on the meta device to any tensor (B, ...) that is
            differentiable in them.
        networks: The networks that it runs, on the meta device.
        dtype: Precision of the networks.
    """

    def __init__(
        self,
        measure: Callable[[Tensor], Tensor],
        *networks: torch.nn.Module,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._measure, self.networks, self.dtype = measure, networks, dtype
        # Like the real reward: no dropout, and no gradients of weights, which would add memory.
        for network in networks:
            network.eval().requires_grad_(False)
            network.to(dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Return a tensor of shape (B,) without values. Differentiable in images."""
        return self._measure(images).reshape(len(images), -1).sum(dim=1)

    @property
    def tensors(self) -> list[Tensor]:
        """Return the weights and buffers, which take memory for the whole run."""
        return [t for network in self.networks for t in (*network.parameters(), *network.buffers())]

    @property
    def parameters(self) -> int:
        """Return the number of weights, including those of the text encoder."""
        return sum(p.numel() for network in self.networks for p in network.parameters())


def without_network(
    reward: Callable[[Tensor, Sequence[str]], Tensor],
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Decorate a reward without weights that reads no prompt: it is its own `MetaReward`."""

    # Plain tensor operations run on the meta device as they are.
    def on_meta(dtype: torch.dtype) -> MetaReward:
        return MetaReward(lambda images: reward(images, [""] * len(images)))

    reward.on_meta = on_meta  # type: ignore[attr-defined]
    return reward


def known_config(kind: Any, place: str, published: Mapping[str, Any], *, option: str) -> Any:
    """Return the configuration of a transformers model, without loading its weights.

    Args:
        kind: Class of transformers that reads the configuration of a folder.
        place: A folder or a hub id.
        published: Configurations by hub id.
        option: The option that names the place, for messages.

    Returns:
        The configuration; None for a hub id that is not among the published ones.

    Raises:
        AssetError: If the folder's configuration is missing or damaged.
    """
    if (path := user_path(place, option)).is_dir():
        with loading(option, place):
            return kind.from_pretrained(str(path))
    return published.get(place)


def refuse_other_tensors(state: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a state dict whose tensor names differ from those of a network.

    Raises:
        ValueError: With the first name that is missing or unknown.
    """
    known = set(expected)
    wrong = sorted(known ^ set(state))  # missing ones and unknown ones
    if wrong:
        kind = "lacks" if wrong[0] in known else "has an unknown"
        raise ValueError(f"it {kind} {wrong[0]} ({len(wrong)} names differ)")


def refuse_other_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a state dict whose tensors differ from those of a network in name or shape.

    Raises:
        ValueError: With the first tensor that is missing, unknown or of another shape.
    """
    refuse_other_tensors(state, expected)
    for name, tensor in state.items():
        have, want = tuple(tensor.shape), tuple(expected[name].shape)
        if have != want:
            raise ValueError(f"its {name} is {have}, expected {want}")


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of features and heads: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(features: Tensor) -> Tensor:
    """Return features of unit length, shape (B, D), float32 at least. Differentiable."""
    return torch.nn.functional.normalize(features.to(exact(features.dtype)), dim=-1)


class TextCache:
    """A cache of text features.

    Args:
        encode: Returns the features, shape (N, D), of N texts.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the features of each text, shape (N, D). Not differentiable."""
        # Texts are encoded one by one: in a batch, the last digits of the features would depend on
        # which other texts are in it, and so on which of them were cached before.
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = self._encode([text])[0]
        found = torch.stack([self._known[text] for text in texts])  # (N, D)
        # Drop the oldest, which a dictionary lists first.
        while len(self._known) > _TEXTS_KEPT:
            self._known.pop(next(iter(self._known)))
        return found

    def clear(self) -> None:
        """Forget all features."""
        self._known.clear()


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that a network repeats: the members of its outermost module lists."""
    # Not those of lists inside: a checkpoint within a checkpoint would be recomputed twice.
    found: list[torch.nn.Module] = []
    for child in network.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) > 1:
            found += list(child)
        else:
            found += _blocks(child)
    return found
