"""Sample images for fixed prompts and seeds, and measure them.

The noise of an image is a function of (seed, prompt index, image index): not of the batch size, of
the number of processes, or of anything sampled before it. So two models that are sampled with the
same seed differ image by image only in what they have learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from alignprop_cli import images as image_tools
from alignprop_cli import rng
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model, Sampler
from alignprop_cli.models.compiled import uncompiled
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.sampling import guided, rollout
from alignprop_cli.schedule import NoiseSchedule

Floats = NDArray[np.float64]
Features = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> their features (B, D), of unit length."""


@dataclass(frozen=True)
class Sample:
    """Which image: its prompt, that one's index in the set, and the number among its images."""

    prompt: str
    prompt_index: int
    image_index: int = 0


@dataclass(frozen=True)
class Samples:
    """Images of one model.

    Args:
        samples: What was sampled, N of them.
        images: Bytes, shape (N, H, W, 3).
        rewards: By name of the mixture's metrics, shape (N,).
        features: Of unit length, shape (N, D), where they were asked for.
    """

    samples: tuple[Sample, ...]
    images: NDArray[np.uint8]
    rewards: dict[str, Floats]
    features: Floats | None = None

    def caption(self, index: int) -> str:
        """Return the rewards of one image in words."""
        return "  ".join(f"{name} {values[index]:.3f}" for name, values in self.rewards.items())

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Samples:
        return Samples(
            tuple(self.samples[row] for row in rows),
            self.images[rows],
            {name: values[rows] for name, values in self.rewards.items()},
            None if self.features is None else self.features[rows],
        )


def choose_samples(prompts: Sequence[str], count: int, per_prompt: int = 1) -> list[Sample]:
    """Choose `count` samples of a prompt set, always the same ones.

    Where there are fewer prompts than samples, prompts repeat with new noise. Where there are
    more, some are picked at random: sets are often sorted, and every n-th would be of one kind.

    Args:
        prompts: The set.
        count: Number of samples, rounded up to whole prompts.
        per_prompt: Samples of each prompt, each with its own noise.
    """
    if per_prompt > 1:
        return [
            Sample(chosen.prompt, chosen.prompt_index, chosen.image_index * per_prompt + number)
            for chosen in choose_samples(prompts, -(-count // per_prompt))
            for number in range(per_prompt)
        ]
    if count >= len(prompts):
        return [
            Sample(prompts[i % len(prompts)], i % len(prompts), i // len(prompts))
            for i in range(count)
        ]
    order: list[int] = np.random.default_rng(count).permutation(len(prompts)).tolist()
    return [Sample(prompts[i], i) for i in sorted(order[:count])]


def draw_samples(
    model: Model,
    samples: Sequence[Sample],
    mixture: Mixture,
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    features: Features | None = None,
    on_batch: Callable[[int], object] = lambda done: None,
) -> Samples:
    """Sample images and measure them. Training's random numbers are not touched.

    Several processes take a share each, and all get all images.

    Args:
        model: With or without a LoRA, opened with the prompts of `samples` and, where guidance is
            on, the negative prompt.
        samples: What to sample, at least one.
        mixture: What to measure.
        sampler: Steps, guidance, eta, size.
        seed: Of the noise.
        batch_size: Images of one batch.
        features: Gives the features that are kept with the images; None keeps none.
        on_batch: Told after each batch how many more samples are done.

    Returns:
        In the order of `samples`. Not differentiable.

    Raises:
        ConfigError: If there is nothing to sample, or the size does not fit the model.
        RunError: If images or rewards are not finite.
    """
    if not samples:
        raise ConfigError("nothing to sample: no prompts were given")
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if processes > 1 else 0
    # With more processes than samples some take the first one too, rather than none.
    mine = list(range(rank, len(samples), processes)) or [0]
    own = [samples[i] for i in mine]
    parts: list[Samples] = []
    done = 0
    # A compiled network would be compiled anew for these batch sizes.
    with torch.no_grad(), uncompiled(model.network.module):
        for part in _batches(model, own, mixture, sampler, seed, batch_size, features):
            parts.append(part)
            # The other processes are about as far.
            before, done = done, min(done + processes * len(part.samples), len(samples))
            on_batch(done - before)
    drawn = _joined(parts)
    if processes == 1:
        return drawn
    shares: list[Any] = [None] * processes
    distributed.all_gather_object(shares, (mine, drawn))
    numbers = np.concatenate([numbers for numbers, _ in shares])
    # unique() gives where each sample's first copy is.
    return _joined([share for _, share in shares])[np.unique(numbers, return_index=True)[1]]


def _batches(
    model: Model,
    samples: Sequence[Sample],
    mixture: Mixture,
    sampler: Sampler,
    seed: int,
    batch_size: int,
    features: Features | None,
) -> Iterator[Samples]:
    """Yield the samples batch by batch."""
    network = model.network
    shape = network.latent_shape(sampler.height, sampler.width)
    schedule = network.schedule(sampler.num_inference_steps, shape)
    negative_prompt = sampler.negative_prompt if _guides(sampler, schedule) else None
    merged = lora.Merged(network.module)
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = [sample.prompt for sample in batch]
        keys = [(sample.prompt_index, sample.image_index) for sample in batch]

        def draw_noise(i: int, keys: Sequence[tuple[int, int]] = keys) -> Tensor:
            return rng.image_noise(seed, "eval_eta", keys, shape, i).to(model.device)

        # 1. The chain, with the LoRA added to the weights: the same numbers in fewer operations.
        latents = rng.image_noise(seed, "eval_noise", keys, shape).to(model.device)
        conditioning = model.conditioning(prompts, negative_prompt)
        denoise = guided(network.predict, conditioning, sampler.guidance)
        with merged:
            latents = rollout(denoise, latents, schedule, eta=sampler.eta, draw_noise=draw_noise)

        # 2. Rewards and features of the images as the decoder leaves them, before rounding.
        decoded = model.decoder.decode(latents)
        scores = mixture.score(decoded, prompts)
        yield Samples(
            tuple(batch),
            image_tools.to_uint8(decoded).numpy(),
            {name: _numbers(values) for name, values in scores.items()},
            None if features is None else _numbers(features(decoded)),
        )


def _guides(sampler: Sampler, schedule: NoiseSchedule) -> bool:
    """Return whether any call needs the unconditional branch."""
    return any(sampler.guidance.applies(step.sigma) for step in schedule.steps)


def _numbers(values: Tensor) -> Floats:
    return cast(Floats, values.double().cpu().numpy())


def _joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of all parts, one part after the other."""
    features = [part.features for part in parts if part.features is not None]
    return Samples(
        tuple(sample for part in parts for sample in part.samples),
        np.concatenate([part.images for part in parts]),
        {name: np.concatenate([part.rewards[name] for part in parts]) for name in parts[0].rewards},
        np.concatenate(features) if features else None,
    )
