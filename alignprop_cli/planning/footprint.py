"""What each part of a step needs, counted on the real code with one image.

Everything but the gradients of the LoRA grows with the batch. On the meta device this takes seconds
and neither weights nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import MetaModel, Network, Sampler
from alignprop_cli.planning import meter
from alignprop_cli.planning.estimate import Affine, Footprint, Level, Work
from alignprop_cli.sampling import guided


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
        reward: What the rewards need, by whether their blocks are recomputed.
        uncounted: Rewards that are missing there.
    """
    network, decoder = model.parts.network, model.parts.decoder
    shape = network.latent_shape(sampler.height, sampler.width)
    latents = 4 * math.prod(shape)  # bytes, in float32
    denoise = _guided_call(model, sampler, shape)
    embeds = [e for e in (model.conditioning.text, model.conditioning.negative) if e is not None]
    there = [*network.module.parameters(), *(t for e in embeds for t in e.tensors.values())]
    trained = sum(parameter.numel() for parameter in lora.trainable(network.module))

    # 1. Calls without gradient run on weights that have the LoRA added to them.
    merged = lora.Merged(network.module)

    def rollout_call(given: Tensor) -> Tensor:
        with torch.no_grad(), merged:
            return denoise(given)

    counted = partial(count, shape=shape, there=there, device_type=device_type)
    rollout = counted(rollout_call, has_grad=False)

    # 2. Calls with gradient, whose input carries it or not. The LoRA's gradients are made in
    # backward and are as large for any batch.
    def calls(*, has_grad: bool) -> dict[Level, Work]:
        call = partial(counted, denoise, has_grad=has_grad, fixed_backward=4 * trained)
        return _by_level(network, call, rollout, latents)

    # 3. From clean latents to images.
    def decode(recompute: bool) -> Work:
        run = partial(decoder.decode, recompute=recompute)
        return count(run, shape, there=decoder.parameters(), device_type=device_type)

    return Footprint(
        weights={**weights, "merged LoRA": merged.bytes} if merged.bytes else weights,
        trained=trained,
        latents=latents,
        rollout=rollout,
        first=calls(has_grad=False),
        call=calls(has_grad=True),
        decoder={recompute: decode(recompute) for recompute in (False, True)},
        reward=reward,
        uncounted=uncounted,
    )


def _guided_call(
    model: MetaModel, sampler: Sampler, shape: tuple[int, int, int]
) -> Callable[[Tensor], Tensor]:
    """Return a network call at a noise level where guidance applies, if there is one."""
    network = model.parts.network
    steps = network.schedule(sampler.num_inference_steps, shape).steps
    step = next((step for step in steps if sampler.guidance.applies(step.sigma)), steps[0])
    denoise = guided(network.predict, model.conditioning, sampler.guidance)
    return lambda latents: denoise(latents, step)


def _by_level(
    network: Network, call: Callable[[], Work], rollout: Work, latents: int
) -> dict[Level, Work]:
    """Return what a network call with gradient needs, by what backward recomputes of it."""
    plain = call()
    network.recompute_blocks(True)
    blocks = call()
    network.recompute_blocks(False)

    # The whole call is put together: it stores its input alone, and in backward it is a call that
    # stores everything.
    stored = Affine(0.0, latents)
    whole = Work(
        saved=stored,
        forward=rollout.forward,
        backward=_sum([stored, plain.backward]),
        forward_flops=plain.forward_flops,
        backward_flops=plain.forward_flops + plain.backward_flops,
    )
    return {"none": plain, "block": blocks, "call": whole}


def count(
    run: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    *,
    there: Iterable[Tensor],
    device_type: str,
    has_grad: bool = True,
    fixed_backward: float = 0.0,
) -> Work:
    """Count a part of a step on the meta device, with one image.

    Args:
        run: From a float32 tensor (1, *shape) to another tensor.
        shape: Of the latents or of the image.
        there: Tensors that are there anyway: weights, embeddings.
        device_type: Whose attention kernel is counted.
        has_grad: Whether the input carries gradient.
        fixed_backward: Bytes of backward that do not grow with the batch.
    """
    given = torch.zeros((1, *shape), device="meta", requires_grad=has_grad)
    cost = meter.count(lambda: run(given), exclude=[*there, given], device_type=device_type)
    return Work(
        saved=Affine(0.0, cost.saved),
        forward=Affine(0.0, cost.forward),
        backward=Affine(fixed_backward, cost.backward - fixed_backward),
        forward_flops=cost.forward_flops,
        backward_flops=cost.backward_flops,
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
