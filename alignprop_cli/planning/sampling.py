"""Whether the memory holds what sampling needs: calls, decoder and rewards without gradient.

Counted on the meta device as a training step is, in a second and before anything is loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alignprop_cli.config.schema import Config
from alignprop_cli.device import available, resolve_dtype
from alignprop_cli.errors import RunError
from alignprop_cli.models import families
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import footprint
from alignprop_cli.planning.estimate import GIB, Budget, Footprint, expected_correction
from alignprop_cli.rewards import registry


@dataclass(frozen=True)
class SamplingNeed:
    """The memory that sampling needs, at the least.

    Args:
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        weights: Bytes of the networks.
        each: Bytes of one image of a batch while it is sampled and scored, by part; the parts are
            not needed at the same time.
    """

    height: int
    width: int
    weights: int
    each: Mapping[str, float]

    @property
    def kept(self) -> int:
        """Return the bytes of one image that stay until all are sampled: 8 bits a colour."""
        return 3 * self.height * self.width

    def peak(self, batch: int) -> float:
        """Return the bytes for a batch of images."""
        return self.weights + batch * max(self.each.values())


def check_memory(config: Config, device: torch.device, *, models: int) -> None:
    """Refuse an evaluation that cannot fit the memory.

    Args:
        config: The complete configuration.
        device: Where images are sampled.
        models: Number of models that sample them.

    Raises:
        AssetError, ConfigError: As `meta_model` and `registry.on_meta`.
        RunError: With what is needed, what there is, and what would fit.
    """
    need = measure(config, device)
    free, source = available(device)
    ram, ram_source = available(torch.device("cpu"))
    if device.type == "cpu":
        # The processes of one machine share its RAM.
        free = ram = ram // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = f"{need.width} x {need.height} pixels"
    # 1. All images, which are kept in RAM until the report is written.
    count = models * config.eval.images
    kept = count * need.kept
    if kept > ram:
        raise RunError(
            f"{count} images of {size} need {kept / GIB:.2f} GiB, there are {ram / GIB:.2f} GiB "
            f"({ram_source})",
            hint=f"at most --images {max(1, int(ram // (models * need.kept)))} would fit, or a "
            "smaller sample.height and width",
        )
    # 2. A batch of them on the device. No reserve: what may just fit is tried.
    free -= kept if device.type == "cpu" else 0
    batch = min(config.eval.batch_size, config.eval.images)
    if need.peak(batch) <= free:
        return
    part = max(need.each, key=lambda name: need.each[name])
    fits = math.floor((free - need.weights) / need.each[part])
    raise RunError(
        f"sampling {batch} images of {size} together needs at least {need.peak(batch) / GIB:.2f} "
        f"GiB, most of it for the {part}; there are {free / GIB:.2f} GiB ({source})",
        hint=f"--batch-size {fits} would fit"
        if fits >= 1
        else "set a smaller sample.height and width, or model.vae_tile_size: 256",
    )


def fitting_batch(footprint: Footprint, budget: Budget, wanted: int, *, held: float = 0.0) -> int:
    """Return how many images can be sampled together beside what training holds.

    Args:
        footprint: What the parts of a training step need.
        budget: The memory of one process.
        wanted: Images to sample together.
        held: Bytes that the training holds besides weights, LoRA and optimiser.

    Returns:
        At most `wanted`; 1 where not even one fits by the estimate.
    """
    # A part whose blocks are recomputed stores next to nothing in forward, as without gradient.
    decoder = footprint.sampling_decoder or footprint.decoder[True]
    parts = footprint.rollout, decoder, footprint.reward[True]
    each = max(part.forward.each for part in parts)
    held += sum(footprint.weights.values()) + footprint.trained_each * footprint.trained
    correction = expected_correction(budget.device_type)
    room = (budget.usable - correction(held)) / max(correction(each), 1.0)
    return max(1, min(wanted, math.floor(room)))


@torch.no_grad()
def measure(config: Config, device: torch.device) -> SamplingNeed:
    """Count what sampling needs, on the meta device.

    Args:
        config: The complete configuration.
        device: Where it will run.

    Raises:
        AssetError, ConfigError: As `check_memory`.
    """
    family, _ = families.find(config.model)
    model = meta_model(config.model, resolve_dtype(config.model.dtype, device))
    sampler = families.sampler(config.sample, family, model.parts.network)
    network, decoder = model.parts.network, model.parts.decoder
    shape = network.latent_shape(sampler.height, sampler.width)
    height, width = model.image_size(shape)
    # 1. The largest network call of the chain, and the decoder.
    call = footprint.count(
        footprint.guided_call(model, sampler, shape),
        shape,
        there=footprint.there_anyway(model),
        device_type=device.type,
        has_grad=False,
    )
    decode = footprint.count(
        decoder.decode,
        shape,
        there=decoder.parameters(),
        device_type=device.type,
        has_grad=False,
    )
    each = {"network": call.forward.each, "decoder": decode.forward.each}
    tensors = [*footprint.held(network.module), *footprint.held(decoder.module)]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # 2. The rewards, one after the other. Those whose need is unknown are left out.
    for name, reward in config.reward.items():
        dtype: torch.dtype = getattr(torch, reward.dtype)
        found = registry.on_meta(name, reward.options, dtype)
        if found is not None:
            seen = shape if registry.takes_latents(name) else (3, height, width)
            scored = footprint.count(
                found, seen, there=found.tensors, device_type=device.type, has_grad=False
            )
            each[f"reward {name}"] = scored.forward.each
            weights += found.parameters * dtype.itemsize
    return SamplingNeed(height, width, weights, each)
