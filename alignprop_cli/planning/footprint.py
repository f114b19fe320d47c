"""What each part of a step needs, counted on the real code with one image.

Everything but the gradients of the LoRA grows with the batch. On the meta device this takes seconds
and neither weights nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import MetaModel, Sampler
from alignprop_cli.planning import meter
from alignprop_cli.planning.estimate import Affine, Footprint, Level, Work
from alignprop_cli.sampling import guided

Score = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to rewards (B,)."""


def measure(
    model: MetaModel,
    sampler: Sampler,
    *,
    device_type: str,
    weights: Mapping[str, int],
    reward: Mapping[bool, Work],
    uncounted: tuple[str, ...] = (),
) -> Footprint:
    """Count a model with its LoRA.

    Args:
        model: With a LoRA in its network, on the meta device.
        sampler: Guidance and size of the images.
        device_type: Whose attention kernel is counted.
        weights: Bytes of frozen weights, by part.
        reward: As `count_reward` gives it, by whether its blocks are recomputed.
        uncounted: Rewards that are missing there.
    """
    network, decoder = model.parts.network, model.parts.decoder
    shape = network.latent_shape(sampler.height, sampler.width)
    trained = sum(parameter.numel() for parameter in lora.trainable(network.module))
    merged = lora.Merged(network.module)

    # One call at a noise level where both branches of the guidance run, if there is one.
    steps = network.schedule(sampler.num_inference_steps, shape).steps
    step = next((step for step in steps if sampler.guidance.applies(step.sigma)), steps[0])
    denoise = guided(network.predict, model.conditioning, sampler.guidance)
    branches = (model.conditioning.text, model.conditioning.negative)
    embeds = [t for branch in branches if branch is not None for t in branch.tensors.values()]
    there = [*network.module.parameters(), *embeds]

    def latents(*, has_grad: bool) -> Tensor:
        return torch.zeros((1, *shape), device="meta", requires_grad=has_grad)

    def call(*, has_grad: bool, blocks: bool = False) -> Work:
        given = latents(has_grad=has_grad)
        network.recompute_blocks(blocks)
        cost = meter.count(
            lambda: denoise(given, step), exclude=[*there, given], device_type=device_type
        )
        network.recompute_blocks(False)
        # The LoRA's gradients are made in backward and are as large for any batch.
        return _per_image(cost, fixed_backward=4 * trained)

    def rollout_call() -> Work:
        given = latents(has_grad=False)

        def run() -> Tensor:
            with torch.no_grad(), merged:
                return denoise(given, step)

        return _per_image(meter.count(run, exclude=[*there, given], device_type=device_type))

    def decode(again: bool) -> Work:
        given = latents(has_grad=True)
        cost = meter.count(
            lambda: decoder.decode(given, recompute=again),
            exclude=[*decoder.parameters(), given],
            device_type=device_type,
        )
        return _per_image(cost)

    rollout = rollout_call()
    size = 4 * math.prod(shape)  # float32

    def by_level(*, has_grad: bool) -> dict[Level, Work]:
        plain = call(has_grad=has_grad)
        blocks = call(has_grad=has_grad, blocks=True)
        return {"none": plain, "block": blocks, "call": _recomputed_call(plain, rollout, size)}

    return Footprint(
        weights={**weights, "merged LoRA": merged.bytes} if merged.bytes else weights,
        trained=trained,
        latents=size,
        rollout=rollout,
        first=by_level(has_grad=False),
        call=by_level(has_grad=True),
        decoder={again: decode(again) for again in (False, True)},
        reward=reward,
        uncounted=uncounted,
    )


def _recomputed_call(plain: Work, rollout: Work, latents: int) -> Work:
    """Return a network call that backward recomputes as a whole.

    It is not run but put together: it stores its input alone, and in backward it is a call that
    stores everything.
    """
    stored = Affine(0.0, latents)
    return Work(
        saved=stored,
        forward=rollout.forward,
        backward=_sum([stored, plain.backward]),
        forward_flops=plain.forward_flops,
        backward_flops=plain.forward_flops + plain.backward_flops,
    )


def count_reward(
    score: Score,
    image_size: tuple[int, int],
    *,
    device_type: str,
    there: Sequence[Tensor] = (),
) -> Work:
    """Count what a reward needs from an image to its loss, on the meta device.

    Args:
        score: The reward.
        image_size: (H, W).
        device_type: Whose attention kernel is counted.
        there: Its weights.
    """
    image = torch.zeros((1, 3, *image_size), device="meta", requires_grad=True)
    return _per_image(
        meter.count(lambda: score(image), exclude=[*there, image], device_type=device_type)
    )


def add(*parts: Work) -> Work:
    """Return what several parts need that live at the same time."""
    return Work(
        saved=_sum([part.saved for part in parts]),
        forward=_sum([part.forward for part in parts]),
        backward=_sum([part.backward for part in parts]),
        forward_flops=sum(part.forward_flops for part in parts),
        backward_flops=sum(part.backward_flops for part in parts),
    )


def _sum(sizes: Sequence[Affine]) -> Affine:
    return Affine(sum(s.fixed for s in sizes), sum(s.each for s in sizes))


def _per_image(cost: meter.Cost, *, fixed_backward: float = 0.0) -> Work:
    """Return the cost of one image as one that grows with their number."""
    return Work(
        saved=Affine(0.0, cost.saved),
        forward=Affine(0.0, cost.forward),
        backward=Affine(fixed_backward, cost.backward - fixed_backward),
        forward_flops=cost.forward_flops,
        backward_flops=cost.backward_flops,
    )
