"""What each part of a step needs, counted by running the real code on one image.

It runs on the meta device: seconds, without weights and without a GPU. Everything but the LoRA's
gradients is proportional to the batch, so one image is enough. Not with DoRA, whose layers compute
the norms of their weights in every call, nor with quantised layers, which unpack them, however many
images there are: calls are counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from alignprop_cli.guidance import Conditioning, Embeds, guided
from alignprop_cli.lora import dora
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import quantized
from alignprop_cli.models.base import Decoder, MetaModel, Network, Sampler
from alignprop_cli.planning import meter, repeats
from alignprop_cli.planning.estimate import Footprint, Level
from alignprop_cli.planning.work import NO_WORK, Affine, Work

# The batches of those two counts. Not 1, as what is a view of one image can be a copy of several. A
# peak is the largest of several moments: between the two it is at most what their line says. No
# batch that the plan takes by itself is larger.
_TWO_COUNTS = (2, 32)


def with_calls(
    found: Footprint,
    model: MetaModel,
    sampler: Sampler,
    device_type: str,
    *,
    detach_uncond: bool = False,
) -> Footprint:
    """Return a footprint with the network's calls counted, and the weights merged for them.

    Args:
        found: The footprint.
        model: With a LoRA in its network, on the meta device.
        sampler: Guidance and size of the images.
        device_type: Device whose attention kernel is counted.
        detach_uncond: As in `guidance.guided`, of calls with gradient.
    """
    model, batches = with_batches(model)
    network, module = model.parts.network, model.parts.network.module
    shape = network.latent_shape(sampler.height, sampler.width)
    there, latents = there_anyway(model), 4 * math.prod(shape)  # bytes, in float32
    trained = sum(p.numel() for p in lora.trainable(module))
    rows = repeats.find_rows(module)
    counted = partial(
        count, shape=shape, there=there, device_type=device_type, batches=batches, rows=rows
    )

    # 1. Calls without gradient, with the LoRA merged or cast as in training.
    with lora.prepared(module) as merged:
        plain = torch.no_grad()(merged.around(guided_call(model, sampler, shape)))
        rollout = counted(plain, has_grad=False)

    # 2. Calls with gradient, with and without gradient in their input, by what is recomputed. The
    #    LoRA's float32 gradients are the one thing whose size does not depend on the batch.
    denoise = guided_call(model, sampler, shape, detach_uncond=detach_uncond)

    by_level = partial(_by_level, network, rollout, latents)
    graph = partial(counted, denoise, fixed_backward=4 * trained)

    weights = dict(found.weights)
    if merged.bytes:
        weights["merged LoRA"] = merged.bytes
    return replace(
        found,
        weights=weights,
        trained=trained,
        latents=latents,
        rollout=rollout,
        first=by_level(partial(graph, has_grad=False)),
        call=by_level(partial(graph, has_grad=True)),
        embeddings=embedding_bytes(model, sampler),
    )


def with_decoder(
    found: Footprint,
    model: MetaModel,
    sampler: Sampler,
    device_type: str,
    *,
    tiny: Decoder | None,
    decodes: bool,
) -> Footprint:
    """Return a footprint with the decoder counted.

    Args:
        found: The footprint.
        model: On the meta device.
        sampler: Size of the images.
        device_type: Device whose attention kernel is counted.
        tiny: What decodes the images that are rewarded; None is the model's own decoder.
        decodes: Whether a step decodes images at all.
    """
    own, shape = model.parts.decoder, model.parts.network.latent_shape
    latents = shape(sampler.height, sampler.width)

    def decoder(again: bool) -> Work:
        return _decode(tiny or own, latents, device_type, again) if decodes else NO_WORK

    return replace(
        found,
        decoder={again: decoder(again) for again in (False, True)},
        sampling_decoder=_decode(own, latents, device_type, False, has_grad=False),
    )


def there_anyway(model: MetaModel) -> list[Tensor]:
    """Return what exists during every call: what the network holds, and the embeddings."""
    return [*held(model.parts.network.module), *_embeddings(model)]


def embedding_bytes(model: MetaModel, sampler: Sampler) -> int:
    """Return the bytes of one image's embeddings, of both branches where there is guidance."""
    text = model.conditioning.text
    used = _embeddings(model) if sampler.guidance.enabled else text.tensors.values()
    return sum(tensor[:1].numel() * tensor.element_size() for tensor in used)


def _embeddings(model: MetaModel) -> list[Tensor]:
    both = (model.conditioning.text, model.conditioning.negative)
    return [t for embeds in both if embeds is not None for t in embeds.tensors.values()]


def with_batches(model: MetaModel) -> tuple[MetaModel, tuple[int] | tuple[int, int]]:
    """Return the batches in which calls are counted, after the model with as many embeddings."""
    network = model.parts.network.module
    twice = dora.is_present(network) or quantized.is_present(network)
    batches = _TWO_COUNTS if twice else (1,)

    def repeated(embeds: Embeds) -> Embeds:
        return Embeds({n: torch.cat([t] * max(batches)) for n, t in embeds.tensors.items()})

    text, negative = model.conditioning.text, model.conditioning.negative
    many = Conditioning(repeated(text), None if negative is None else repeated(negative))
    return replace(model, conditioning=many), batches


def held(module: torch.nn.Module) -> list[Tensor]:
    """Return all that a module holds: buffers too, as those are what quantised weights are in."""
    # Complex numbers of positions are neither: a module that is cast would lose half of them.
    plain = (t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor))
    return [*module.parameters(), *module.buffers(), *plain]


def _decode(
    decoder: Decoder,
    shape: tuple[int, int, int],
    device_type: str,
    recompute: bool,
    *,
    has_grad: bool = True,
) -> Work:
    """Count the decoder, with or without activation checkpointing of its blocks."""
    return count(
        lambda latents: decoder.decode(latents, recompute=recompute),
        shape,
        there=decoder.parameters(),
        device_type=device_type,
        has_grad=has_grad,
    )


def guided_call(
    model: MetaModel,
    sampler: Sampler,
    shape: tuple[int, int, int],
    *,
    detach_uncond: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Return a network call with both branches, if guidance applies at any noise level."""
    # The costliest kind of call there is in the chain; all calls are planned like it.
    network = model.parts.network
    steps = sampler.schedule(network, shape).steps
    step = next((step for step in steps if sampler.guidance.applies(step.sigma)), steps[0])
    denoise = guided(
        network.predict, model.conditioning, sampler.guidance, detach_uncond=detach_uncond
    )
    return lambda latents: denoise(latents, step)


def _by_level(
    network: Network, rollout: Work, latents: int, counted: Callable[[], Work]
) -> dict[Level, Work]:
    """Count a network call with gradient, by what is recomputed of it."""
    each: dict[bool, Work] = {}
    for blocks in (True, False):  # last: nothing stays recomputed
        network.recompute_blocks(blocks)
        with lora.prepared(network.module):
            each[blocks] = counted()
    whole = _recomputed_call(each[False], rollout, latents)
    return {"none": each[False], "block": each[True], "call": whole}


def _recomputed_call(plain: Work, rollout: Work, latents: int) -> Work:
    """Return what a network call needs that is recomputed as a whole, from its two halves."""
    # Forward it is a call without gradient and stores its input alone. Backward it is run again as
    # a call that stores everything, and differentiated.
    stored = Affine(0.0, latents)
    return Work(
        saved=stored,
        forward=rollout.forward,
        backward=_sum([stored, plain.backward]),
        forward_flops=plain.forward_flops,
        backward_flops=plain.forward_flops + plain.backward_flops,
        forward_launches=rollout.forward_launches,
        backward_launches=plain.forward_launches + plain.backward_launches,
    )


def count(
    run: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    *,
    there: Iterable[Tensor],
    device_type: str,
    has_grad: bool = True,
    fixed_backward: float = 0.0,
    batches: tuple[int] | tuple[int, int] = (1,),
    rows: repeats.Rows | None = None,
) -> Work:
    """Count a part of a step on the meta device.

    Args:
        run: The part: a float32 tensor (B, *shape) to another tensor.
        shape: Shape of the latents or of the image, without the batch.
        there: Tensors that exist anyway and are not counted: weights, embeddings.
        device_type: Device whose attention kernel is counted.
        has_grad: Whether the input carries gradient.
        fixed_backward: Bytes of backward that do not grow with the batch, where one count is made.
        batches: B of each count. Two of them show which bytes do not grow with the batch.
        rows: Equal blocks, of which a few are run; None runs all.
    """
    there = list(there)

    def counted(images: int) -> meter.Cost:
        given = torch.zeros((images, *shape), device="meta", requires_grad=has_grad)
        with nullcontext() if rows is None else repeats.shortened(rows):
            return meter.count(
                lambda: run(given),
                exclude=[*there, given],
                device_type=device_type,
                times=None if rows is None else rows.times,
            )

    few, costs = batches[0], [counted(images) for images in batches]
    first, last = costs[0], costs[-1]

    def line(read: Callable[[meter.Cost], int], fixed: float = 0.0) -> Affine:
        if len(costs) == 1:
            return Affine(fixed, (read(first) - fixed) / few)
        each = (read(last) - read(first)) / (batches[-1] - few)
        return Affine(read(first) - few * each, each)

    return Work(
        saved=line(lambda cost: cost.saved),
        forward=line(lambda cost: cost.forward),
        backward=line(lambda cost: cost.backward, fixed_backward),
        forward_flops=first.forward_flops / few,
        backward_flops=first.backward_flops / few,
        forward_launches=first.forward_launches,
        backward_launches=first.backward_launches,
    )


def add(*parts: Work) -> Work:
    """Return what several parts need together, all alive at the same time."""
    return Work(
        saved=_sum([part.saved for part in parts]),
        forward=_sum([part.forward for part in parts]),
        backward=_sum([part.backward for part in parts]),
        forward_flops=sum(part.forward_flops for part in parts),
        backward_flops=sum(part.backward_flops for part in parts),
        forward_launches=sum(part.forward_launches for part in parts),
        backward_launches=sum(part.backward_launches for part in parts),
    )


def _sum(sizes: Sequence[Affine]) -> Affine:
    return Affine(sum(s.fixed for s in sizes), sum(s.each for s in sizes))
