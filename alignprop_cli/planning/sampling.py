"""Whether the memory holds what sampling needs: calls, decoder and rewards without gradient.

Counted on the meta device as a training step is, in a second and before anything is loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alignprop_cli.config.schema import Config
from alignprop_cli.device import available, resolve_dtype
from alignprop_cli.errors import RunError
from alignprop_cli.models import families
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import footprint, repeats
from alignprop_cli.planning.estimate import GIB, Budget, Footprint, expected_correction
from alignprop_cli.planning.work import Affine
from alignprop_cli.rewards import registry
from alignprop_cli.storage import check_space

# Share of the free RAM that the images of an evaluation may fill where there is a disk.
_MOST_OF_RAM = 0.25


@dataclass(frozen=True)
class SamplingNeed:
    """The memory that sampling needs, at the least.

    Args:
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        weights: Bytes of the networks.
        parts: Bytes while a batch is sampled and scored; they are not needed at the same time.
        on_disk: Whether the images of all models are too many to be kept in RAM.
    """

    height: int
    width: int
    weights: int
    parts: Mapping[str, Affine]
    on_disk: bool = False

    @property
    def kept(self) -> int:
        """Return the bytes of one image that stay until all are sampled: 8 bits a colour."""
        return 3 * self.height * self.width

    def peak(self, batch: int) -> float:
        """Return the bytes for a batch of images."""
        return self.weights + max(part(batch) for part in self.parts.values())

    def fitting(self, free: float) -> int:
        """Return the largest batch for which this many bytes are enough; 0 where none is."""
        return max(0, min(_most(part, free - self.weights) for part in self.parts.values()))


def check_memory(
    config: Config, device: torch.device, *, models: int, disk: Path | None = None
) -> SamplingNeed:
    """Return what an evaluation needs; refuse one that cannot fit the memory.

    Args:
        config: The complete configuration.
        device: Where images are sampled.
        models: Number of models that sample them.
        disk: Folder where images may be kept that are more than a quarter of the RAM; None keeps
            all of them in RAM.

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
    # 1. All images, which are kept until the report is written.
    count = models * config.eval.images
    kept = count * need.kept
    written = 0
    if disk is not None and kept > _MOST_OF_RAM * ram:
        need, kept, written = replace(need, on_disk=True), 0, kept
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
        if disk is not None and need.on_disk:
            # Their pixels, and the files that are made of them.
            check_space(disk, 2 * written, f"an evaluation of {count} images of {size}")
        return need
    part = max(need.parts, key=lambda name: need.parts[name](batch))
    fits = need.fitting(free)
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
    calls = _more(footprint.rollout.forward, footprint.embeddings)
    parts = calls, decoder.forward, footprint.reward[True].forward
    held += sum(footprint.weights.values()) + footprint.trained_each * footprint.trained
    correction = expected_correction(budget.device_type)
    room = (budget.usable - correction(held)) / correction.factor
    return max(1, min(wanted, *(_most(part, room) for part in parts)))


def _more(part: Affine, each: int) -> Affine:
    """Return what a part needs if each image needs more bytes."""
    return replace(part, each=part.each + each)


def _most(part: Affine, room: float) -> int:
    """Return the largest batch of which a part needs at most this many bytes."""
    return math.floor((room - part.fixed) / max(part.each, 1.0))


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
    model, batches = footprint.with_batches(model)
    call = footprint.count(
        footprint.guided_call(model, sampler, shape),
        shape,
        there=footprint.there_anyway(model),
        device_type=device.type,
        has_grad=False,
        batches=batches,
        rows=repeats.find_rows(network.module),
    )
    decode = footprint.count(
        decoder.decode,
        shape,
        there=decoder.parameters(),
        device_type=device.type,
        has_grad=False,
    )
    calls = _more(call.forward, footprint.embedding_bytes(model, sampler))
    parts = {"network": calls, "decoder": decode.forward}
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
            parts[f"reward {name}"] = scored.forward
            weights += found.parameters * dtype.itemsize
    return SamplingNeed(height, width, weights, parts)
