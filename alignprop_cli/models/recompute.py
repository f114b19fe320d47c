"""Recompute the blocks of a decoder in backward, finer than diffusers' switch for it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def decoder_blocks(autoencoder: Any, recompute: bool) -> Iterator[None]:
    """Run the decoder inside the block with or without activation checkpointing of its blocks.

    Values and gradients are the same. Backward may come after the block.

    Args:
        autoencoder: One of diffusers' autoencoders, with a `decoder`.
        recompute: Whether the blocks are recomputed in backward.
    """
    # diffusers' own switch recomputes whole levels, or all of an AutoencoderTiny, and so most of it
    # is alive again at once.
    find = _tiny_blocks if isinstance(autoencoder, AutoencoderTiny) else _blocks
    # In tiles whole levels it is: what all tiles keep together is more than one of them at once.
    if getattr(autoencoder, "use_tiling", False):
        find = _levels
    wrapped = find(autoencoder.decoder) if recompute else []
    for block in wrapped:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block in wrapped:
            del block.forward  # the attribute, which hid the method of the class


def _blocks(decoder: nn.Module) -> list[nn.Module]:
    """Return the blocks of a decoder: of its levels, those that consist of blocks are opened."""
    found: list[nn.Module] = []
    for level in _members(decoder):
        inner = [level] if isinstance(level, nn.Sequential) else [level, *level.children()]
        lists = [part for part in inner if isinstance(part, nn.ModuleList | nn.Sequential)]
        members = [member for part in lists for member in part.children()]
        # Only where nothing of the level is left outside: it is a list of blocks then.
        whole = sum(p.numel() for p in level.parameters())
        opened = sum(p.numel() for member in members for p in member.parameters()) == whole
        found += members if members and opened else [level]
    # A block that upsamples by interpolation alone stores nothing worth a second run.
    return [block for block in found if any(True for _ in block.parameters())]


def _levels(decoder: nn.Module) -> list[nn.Module]:
    """Return the levels of a decoder."""
    return [level for level in _members(decoder) if any(True for _ in level.parameters())]


def _tiny_blocks(decoder: Any) -> list[nn.Module]:
    """Return the residual blocks of a tiny decoder, which is one row of layers."""
    # A convolution by itself stores its input either way.
    return [layer for layer in decoder.layers if any(True for _ in layer.children())]


def _members(module: nn.Module) -> list[nn.Module]:
    """Return the members of a module's outermost lists."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            # Not the list itself: it may hold None, for an attention that is left out.
            found += child.children()
        else:
            found += _members(child)
    return found


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a block's forward that keeps its inputs alone and is run again in backward."""

    def run(*arguments: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        # Causal convolutions keep frames in lists, which every run changes. The second run gets
        # them as the first one found them, and leaves the real ones alone.
        given: dict[Any, Any] = {**dict(enumerate(arguments)), **options}
        lists = {key: one for key, one in given.items() if isinstance(one, list)}
        begun = {key: list(one) for key, one in lists.items()}

        def again(*arguments: Any, **options: Any) -> Tensor:
            now = lists or {key: list(one) for key, one in begun.items()}
            replaced = {key: now.get(key, one) for key, one in options.items()}
            return forward(*(now.get(i, one) for i, one in enumerate(arguments)), **replaced)

        tensors = [None if i in lists else one for i, one in enumerate(arguments)]
        others = {key: None if key in lists else one for key, one in options.items()}
        others |= {"use_reentrant": False, "preserve_rng_state": False}
        result = checkpoint(again, *tensors, **others)
        # Held until backward, so only what the block has changed is kept, which is what it reads.
        for key, one in lists.items():
            begun[key] = [
                old if old is not new or not isinstance(old, Tensor) else None
                for old, new in zip(begun[key], one, strict=True)
            ]
        lists.clear()
        return result

    return run
