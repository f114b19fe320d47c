"""Sample images for fixed prompts and seeds, and measure them.

The noise of an image is a function of (seed, prompt index, image index), and of nothing else: not
of the batch size, the number of processes, or earlier samples. So with the same seed the images of
two models differ only by what the models have learned.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from alignprop_cli import rng
from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import guided
from alignprop_cli.images import to_uint8
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import families
from alignprop_cli.models.base import Model, Sampler
from alignprop_cli.models.compiled import uncompiled
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.sampling import rollout
from alignprop_cli.schedule import Step

Floats = NDArray[np.float64]
Features = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> their features (B, D), of unit length."""

Allocate = Callable[[tuple[int, int, int, int]], NDArray[np.uint8]]
"""Shape (N, H, W, 3) -> where as many images are kept."""


def in_memory(shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Return memory for images."""
    return np.empty(shape, dtype=np.uint8)


def in_a_file(folder: Path) -> Allocate:
    """Return what keeps images in a file of a folder that has no name, and ends with the process.

    The system has as much of it in memory as is free, so that a big set needs a disk and no RAM.
    """

    def allocate(shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), math.prod(shape))
            # It is mapped, so it stays when its handle is closed.
            return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)

    return allocate


def _reserve(handle: int, size: int) -> None:
    """Take the space of a file now: where a disk is full a write to a map kills the process."""
    # macOS has no such call.
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        # Of a file system that cannot.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


@dataclass(frozen=True)
class Sample:
    """What identifies an image, besides the seed.

    Args:
        prompt: Its prompt.
        prompt_index: Index of the prompt in its set.
        image_index: Number among the images of this prompt.
    """

    prompt: str
    prompt_index: int
    image_index: int = 0


@dataclass(frozen=True)
class Samples:
    """Images of one model, with what was measured on them.

    Args:
        samples: N samples.
        images: Shape (N, H, W, 3), uint8.
        rewards: Rewards and extra metrics by name, shape (N,).
        features: Shape (N, D), of unit length; None if they were not asked for.
    """

    samples: tuple[Sample, ...]
    images: NDArray[np.uint8]
    rewards: dict[str, Floats]
    features: Floats | None = None

    def caption(self, index: int) -> str:
        """Return the rewards of one image in words."""
        return "  ".join(f"{name} {values[index]:.3f}" for name, values in self.rewards.items())

    def measured(self, rows: Sequence[int]) -> Samples:
        """Return some of them without their images, which may be more than the memory holds."""
        # Images without a row of pixels.
        return replace(self, images=self.images[:, :0])[rows]

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Samples:
        return Samples(
            tuple(self.samples[row] for row in rows),
            self.images[rows],
            {name: values[rows] for name, values in self.rewards.items()},
            None if self.features is None else self.features[rows],
        )


def choose_samples(prompts: Sequence[str], count: int, per_prompt: int = 1) -> list[Sample]:
    """Choose `count` samples of a prompt set, always the same ones.

    With fewer prompts than samples, prompts repeat with new noise. With more prompts than samples,
    a fixed random choice of them is taken.

    Args:
        prompts: The set.
        count: Number of samples, rounded up to whole prompts.
        per_prompt: Number of samples of each prompt, each with its own noise.
    """
    # 1. Several of each prompt: choose prompts as below, and repeat each with new noise.
    if per_prompt > 1:
        return [
            Sample(chosen.prompt, chosen.prompt_index, chosen.image_index * per_prompt + number)
            for chosen in choose_samples(prompts, -(-count // per_prompt))
            for number in range(per_prompt)
        ]
    # 2. All prompts, in rounds.
    if count >= len(prompts):
        return [
            Sample(prompts[i % len(prompts)], i % len(prompts), i // len(prompts))
            for i in range(count)
        ]
    # 3. Some of them, at random: sets are often sorted, and every n-th would be of one kind. Seeded
    #    by the number alone, so that every model and every run gets the same ones.
    order: list[int] = np.random.default_rng(count).permutation(len(prompts)).tolist()
    return [Sample(prompts[i], i) for i in sorted(order[:count])]


def draw_shared(
    model: Model,
    samples: Sequence[Sample],
    mixture: Mixture,
    config: Config,
    console: Console,
    label: str = "",
    *,
    features: Features | None = None,
    batch_size: int | None = None,
    base_until: float = 0.0,
    allocate: Allocate = in_memory,
) -> Samples:
    """Sample and measure as the `sample` and `eval` sections say, with a progress bar.

    Each process samples a share, and all of them return all images.

    Args:
        model: As in `draw_samples`.
        samples: What to sample, at least one.
        mixture: What to measure.
        config: The complete configuration.
        console: Shows the bar.
        label: Text of the bar.
        features: As in `draw_samples`.
        batch_size: As in `draw_samples`; None is that of the `eval` section.
        base_until: As in `draw_samples`.
        allocate: As in `draw_samples`; of several processes' images all have a copy in memory.

    Raises:
        ConfigError, RunError: As `draw_samples`.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if processes > 1 else 0
    # 1. This process's share. With more processes than samples some repeat the first sample: an
    #    empty batch would need a case of its own everywhere below.
    mine = list(range(rank, len(samples), processes)) or [0]
    # 2. Uncompiled: torch would compile the network again for these batch sizes.
    with console.bar(len(mine), label) as bar, uncompiled(model.network.module):
        sampled = draw_samples(
            model,
            [samples[i] for i in mine if samples],
            mixture,
            families.sampler(config.sample, model.family, model.network),
            seed=config.eval.seed,
            batch_size=batch_size or config.eval.batch_size,
            features=features,
            base_until=base_until,
            on_batch=bar.advance,
            allocate=allocate,
        )
    if processes == 1:
        return sampled
    # 3. All shares to all processes: each needs the mean rewards. In the order of the samples, and
    #    of a repeated one only the first copy.
    shares: list[Any] = [None] * processes
    distributed.all_gather_object(shares, (mine, sampled))
    numbers = np.concatenate([numbers for numbers, _ in shares])
    return _joined([share for _, share in shares])[np.unique(numbers, return_index=True)[1]]


@torch.no_grad()
def draw_samples(
    model: Model,
    samples: Sequence[Sample],
    mixture: Mixture,
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    features: Features | None = None,
    base_until: float = 0.0,
    on_batch: Callable[[int], object] = lambda done: None,
    allocate: Allocate = in_memory,
) -> Samples:
    """Sample images and measure them. Training's random numbers are not touched.

    Args:
        model: With or without a LoRA, opened with the prompts of `samples` and, where guidance is
            on, the negative prompt.
        samples: What to sample, at least one.
        mixture: What to measure.
        sampler: Steps, guidance, eta, size.
        seed: Seed of the noise.
        batch_size: Images sampled together; changes no image beyond rounding.
        features: Computes the features to keep with the images; None keeps none.
        base_until: Share of the T calls that run without the LoRA, from the noise on: the first
            floor(share T + 1/2). What they do the tuned model cannot undo, so that the images keep
            the base model's variety (as in ImageReFL, 2025).
        on_batch: Called after each batch with its number of samples.
        allocate: Makes the place for all images, once the size of the first ones is known.

    Returns:
        The images in the order of `samples`. Not differentiable.

    Raises:
        ConfigError: If there is nothing to sample, or the size does not fit the model.
        RunError: If images or rewards are not finite.
    """
    if not samples:
        raise ConfigError("nothing to sample: no prompts were given")
    parts: list[Samples] = []
    kept: NDArray[np.uint8] | None = None
    # Merged or cast once for all batches: the LoRA does not change in between.
    with lora.prepared(model.network.module) as merged:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            latents = _latents(model, batch, sampler, seed, merged, base_until)
            images, part = _measured(model, mixture, batch, latents, features)
            if kept is None:
                kept = allocate((len(samples), *images.shape[1:]))
            kept[start : start + len(batch)] = images
            parts.append(part)
            on_batch(len(batch))
    assert kept is not None
    return replace(_joined(parts), images=kept)


def _measured(
    model: Model,
    mixture: Mixture,
    batch: Sequence[Sample],
    latents: Tensor,
    features: Features | None,
) -> tuple[NDArray[np.uint8], Samples]:
    """Return the images of a batch, and what is measured of them, without the images."""
    # Rewards and features are computed before the images are rounded to bytes.
    images = model.decoder.decode(latents)  # (B, 3, H, W), in [0, 1]
    scores = mixture.score(images, [sample.prompt for sample in batch], latents)
    made = to_uint8(images).numpy()
    found = None if features is None else _numbers(features(images))
    rewards = {name: _numbers(values) for name, values in scores.items()}
    return made, Samples(tuple(batch), made[:0], rewards, found)


def _latents(
    model: Model,
    batch: Sequence[Sample],
    sampler: Sampler,
    seed: int,
    merged: lora.Merged,
    base_until: float,
) -> Tensor:
    """Return the clean latents of a batch, shape (B, C, h, w)."""
    network = model.network
    shape = network.latent_shape(sampler.height, sampler.width)
    schedule = sampler.schedule(network, shape)
    keys = [(sample.prompt_index, sample.image_index) for sample in batch]

    def draw_noise(i: int) -> Tensor:
        return rng.image_noise(seed, "eval_eta", keys, shape, i).to(model.device)

    # Only if some call is guided: otherwise the negative prompt may not have been encoded.
    guides = any(sampler.guidance.applies(step.sigma) for step in schedule.steps)
    conditioning = model.conditioning(
        [sample.prompt for sample in batch], sampler.negative_prompt if guides else None
    )
    plain = guided(network.predict, conditioning, sampler.guidance)
    latents = rng.image_noise(seed, "eval_noise", keys, shape).to(model.device)
    # With the LoRA merged into the weights: the same values in fewer operations.
    tuned = merged.around(plain)
    untuned = schedule.steps[: math.floor(base_until * len(schedule) + 0.5)]

    def denoise(latents: Tensor, step: Step) -> Tensor:
        if step not in untuned:
            return tuned(latents, step)
        with lora.disabled(network.module):
            return plain(latents, step)

    return rollout(denoise, latents, schedule, eta=sampler.eta, draw_noise=draw_noise)


def _numbers(values: Tensor) -> Floats:
    return cast(Floats, values.cpu().double().numpy())


def _joined(parts: Sequence[Samples]) -> Samples:
    """Return all parts as one, in their order."""
    features = [part.features for part in parts if part.features is not None]
    return Samples(
        tuple(sample for part in parts for sample in part.samples),
        np.concatenate([part.images for part in parts]),
        {name: np.concatenate([part.rewards[name] for part in parts]) for name in parts[0].rewards},
        np.concatenate(features) if features else None,
    )
