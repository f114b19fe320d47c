"""Sample images for fixed prompts and seeds, and measure them.

The noise of an image is a function of (seed, prompt index, image index): not of the batch size, of
the number of processes, or of anything sampled before it. So two models that are sampled with the
same seed differ image by image only in what they have learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from alignprop_cli import images as image_tools
from alignprop_cli import rng
from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import families
from alignprop_cli.models.base import Model, Sampler
from alignprop_cli.models.compiled import uncompiled
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.sampling import rollout

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
    # Several of each prompt: choose the prompts as below, and repeat each with new noise.
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
    # A function of the number alone: every model and every run gets the same ones.
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
) -> Samples:
    """Sample and measure as the `sample` and `eval` sections say, with a progress bar.

    Several processes take a share each, and all get all images.

    Args:
        model: As for `draw_samples`.
        samples: What to sample, at least one.
        mixture: What to measure.
        config: The complete configuration.
        console: Shows the bar.
        label: Of the bar.
        features: As for `draw_samples`.

    Raises:
        ConfigError, RunError: As `draw_samples`.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if processes > 1 else 0
    # With more processes than samples some take the first one too, rather than none.
    mine = list(range(rank, len(samples), processes)) or [0]
    # A compiled network would be compiled anew for these batch sizes.
    with console.bar(len(mine), label) as bar, uncompiled(model.network.module):
        sampled = draw_samples(
            model,
            [samples[i] for i in mine if samples],
            mixture,
            families.sampler(config.sample, model.family),
            seed=config.eval.seed,
            batch_size=config.eval.batch_size,
            features=features,
            on_batch=bar.advance,
        )
    if processes == 1:
        return sampled
    # Everyone gets everything: the reward's mean over all is needed in each process.
    shares: list[Any] = [None] * processes
    distributed.all_gather_object(shares, (mine, sampled))
    numbers = np.concatenate([numbers for numbers, _ in shares])
    # In order, and the first copy of what two processes took.
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
    on_batch: Callable[[int], object] = lambda done: None,
) -> Samples:
    """Sample images and measure them. Training's random numbers are not touched.

    Args:
        model: With or without a LoRA, opened with the prompts of `samples` and, where guidance is
            on, the negative prompt.
        samples: What to sample, at least one.
        mixture: What to measure.
        sampler: Steps, guidance, eta, size.
        seed: Of the noise.
        batch_size: Images of one batch.
        features: Gives the features that are kept with the images; None keeps none.
        on_batch: Told after each batch how many samples it had.

    Returns:
        In the order of `samples`. Not differentiable.

    Raises:
        ConfigError: If there is nothing to sample, or the size does not fit the model.
        RunError: If images or rewards are not finite.
    """
    if not samples:
        raise ConfigError("nothing to sample: no prompts were given")
    # Merged once for all batches, since the LoRA does not change in between.
    merged = lora.Merged(model.network.module)
    parts: list[Samples] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        # Rewards and features are those of the images as the decoder leaves them, before rounding.
        images = _images(model, batch, sampler, seed, merged)
        scores = mixture.score(images, [sample.prompt for sample in batch])
        parts.append(
            Samples(
                tuple(batch),
                image_tools.to_uint8(images).numpy(),
                {name: _numbers(values) for name, values in scores.items()},
                None if features is None else _numbers(features(images)),
            )
        )
        on_batch(len(batch))
    return _joined(parts)


def _images(
    model: Model, batch: Sequence[Sample], sampler: Sampler, seed: int, merged: lora.Merged
) -> Tensor:
    """Return the images of a batch, shape (B, 3, H, W), in [0, 1]."""
    network = model.network
    shape = network.latent_shape(sampler.height, sampler.width)
    schedule = network.schedule(sampler.num_inference_steps, shape)
    keys = [(sample.prompt_index, sample.image_index) for sample in batch]

    def draw_noise(i: int) -> Tensor:
        return rng.image_noise(seed, "eval_eta", keys, shape, i).to(model.device)

    # Without guidance no call asks for the negative prompt, which may not have been encoded then.
    guides = any(sampler.guidance.applies(step.sigma) for step in schedule.steps)
    conditioning = model.conditioning(
        [sample.prompt for sample in batch], sampler.negative_prompt if guides else None
    )
    denoise = guided(network.predict, conditioning, sampler.guidance)
    latents = rng.image_noise(seed, "eval_noise", keys, shape).to(model.device)
    # With the LoRA added to the weights: the same numbers in fewer operations.
    with merged:
        latents = rollout(denoise, latents, schedule, eta=sampler.eta, draw_noise=draw_noise)
    return model.decoder.decode(latents)


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
