"""What each part of a step needs, counted on the real code with one image.

Everything but the gradients of the LoRA grows with the micro-batch. On the meta device this takes
seconds and neither weights nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Conditioning, DiffusionModel
from alignprop_cli.planning import meter as memory
from alignprop_cli.planning.estimate import Footprint, Linear, Work

Score = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to losses (B,)."""


def measure(
    model: DiffusionModel,
    conditioning: Conditioning,
    *,
    guidance_scale: float,
    latent_shape: Sequence[int],
    device_type: str,
    weights: dict[str, int],
    reward: dict[bool, Work],
    uncounted: tuple[str, ...] = (),
) -> Footprint:
    """Count a model with its LoRA.

    The whole call recomputed is not run but put together: it stores its input, and in backward is
    a call that stores everything.

    Args:
        model: With a LoRA in its network, on the meta device.
        conditioning: Embeddings of one prompt.
        guidance_scale: 1 runs one branch alone.
        latent_shape: (C, h, w).
        device_type: Whose attention kernel is counted.
        weights: Bytes of frozen weights, by part.
        reward: As `count_reward` gives it, by whether its blocks are computed again.
        uncounted: Rewards that are missing there.
    """
    trained = sum(parameter.numel() for parameter in lora.trainable(model.network))
    denoise = model.denoiser(conditioning, guidance_scale)
    merged = lora.Merged(model.network)
    there = [*model.network.parameters(), conditioning.prompt_embeds]

    def call(*, has_grad: bool, blocks: bool = False, window: bool = True) -> Work:
        latents = _latents(model, latent_shape, has_grad=has_grad)

        def run() -> Tensor:
            if window:
                return denoise(latents, 1.0)
            with torch.no_grad(), merged:
                return denoise(latents, 1.0)

        model.recompute_blocks(blocks)
        cost = memory.count(run, exclude=[*there, latents], device_type=device_type)
        model.recompute_blocks(False)
        # The LoRA's gradients are made in backward and are as large for any micro-batch.
        return _per_image(cost, fixed_backward=4 * trained)

    def decode(again: bool) -> Work:
        latents = _latents(model, latent_shape, has_grad=True)
        cost = memory.count(
            lambda: model.decode(latents, use_checkpoint=again),
            exclude=[*model.decoder_parameters(), latents],
            device_type=device_type,
        )
        return _per_image(cost)

    rollout = call(has_grad=False, window=False)
    first, later = call(has_grad=False), call(has_grad=True)
    blocks = call(has_grad=True, blocks=True)
    # float32 latents, which the chain makes anew in every step.
    stored = Linear(0.0, 4.0 * math.prod(latent_shape))

    def whole(plain: Work) -> Work:
        return Work(
            saved=stored,
            forward=rollout.forward,
            backward=_sum([stored, plain.backward]),
            forward_flops=plain.forward_flops,
            backward_flops=_sum([plain.forward_flops, plain.backward_flops]),
        )

    return Footprint(
        weights={**weights, "merged LoRA": merged.bytes} if merged.bytes else weights,
        trained=trained,
        rollout=rollout,
        first={"none": first, "block": blocks, "call": whole(first)},
        call={"none": later, "block": blocks, "call": whole(later)},
        decoder={again: decode(again) for again in (False, True)},
        reward=reward,
        uncounted=uncounted,
    )


def count_reward(
    score: Score,
    image_shape: Sequence[int],
    *,
    device_type: str,
    there: Sequence[Tensor] = (),
) -> Work:
    """Count what a reward needs from an image to its loss, on the meta device.

    Args:
        score: The reward.
        image_shape: (3, H, W).
        device_type: Whose attention kernel is counted.
        there: Its weights.
    """
    image = torch.zeros((1, *image_shape), device="meta", requires_grad=True)
    return _per_image(
        memory.count(lambda: score(image), exclude=[*there, image], device_type=device_type)
    )


NOTHING = Work(*(Linear(0.0, 0.0) for _ in range(5)))
"""A part that needs nothing, or that could not be counted."""


def add(*parts: Work) -> Work:
    """Return what several parts need that live at the same time."""
    return Work(*(_sum([getattr(part, name) for part in parts]) for name in _FIGURES))


_FIGURES = ("saved", "forward", "backward", "forward_flops", "backward_flops")


def _sum(figures: Sequence[Linear]) -> Linear:
    return Linear(sum(f.fixed for f in figures), sum(f.each for f in figures))


def _per_image(cost: memory.Cost, *, fixed_backward: float = 0.0) -> Work:
    """Return the cost of one image as one that grows with their number."""

    def line(name: str) -> Linear:
        fixed = fixed_backward if name == "backward" else 0.0
        return Linear(fixed, getattr(cost, name) - fixed)

    return Work(*(line(name) for name in _FIGURES))


def _latents(model: DiffusionModel, shape: Sequence[int], *, has_grad: bool) -> Tensor:
    return torch.zeros((1, *shape), device=model.device, requires_grad=has_grad)
