"""Fixed prompts, fixed seeds: draw pictures, measure them, and compare two models pair by pair.

The noise of a picture is a function of (seed, prompt index, image index): not of the batch size,
of the number of processes, or of anything drawn before it. So two models drawn with the same seed
differ picture by picture only in what they have learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from alignprop_cli import images as image_tools
from alignprop_cli import rng
from alignprop_cli.config.schema import SampleConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.prompts import BUILT_IN
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.sampling import sample

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """Which picture: the prompt, its index in the set, and the how-manieth picture of it."""

    prompt: str
    prompt_index: int
    image_index: int = 0


@dataclass(frozen=True)
class Drawn:
    """Pictures of one model.

    Args:
        pictures: What was drawn, N of them.
        images: Bytes, shape (N, H, W, 3).
        rewards: By name, shape (N,).
        features: Of unit length, shape (N, D), where they were asked for.
    """

    pictures: tuple[Picture, ...]
    images: NDArray[np.uint8]
    rewards: dict[str, Floats]
    features: Floats | None = None

    def caption(self, index: int) -> str:
        """Return the rewards of one picture in words."""
        return "  ".join(f"{name} {values[index]:.3f}" for name, values in self.rewards.items())


@dataclass(frozen=True)
class Paired:
    """One reward of two models on the same pictures.

    Args:
        base: Mean of the first model.
        tuned: Mean of the second.
        difference: Mean of tuned - base.
        low: Lower end of the 95 % confidence interval of the difference.
        high: Upper end.
        wins: Share of pictures on which the second model's reward is higher.
        ties: Share on which both are equal.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    wins: float
    ties: float


def choose(prompts: Sequence[str], count: int, per_prompt: int = 1) -> list[Picture]:
    """Choose `count` pictures of a prompt set, always the same ones.

    Where there are fewer prompts than pictures, prompts repeat with new noise. Where there are
    more, some are picked at random: sets are often sorted, and every n-th would be of one kind.

    Args:
        prompts: The set.
        count: Number of pictures, rounded up to whole prompts.
        per_prompt: Pictures of each prompt, each with its own noise.
    """
    if per_prompt > 1:
        return [
            Picture(chosen.prompt, chosen.prompt_index, chosen.image_index * per_prompt + number)
            for chosen in choose(prompts, -(-count // per_prompt))
            for number in range(per_prompt)
        ]
    if count >= len(prompts):
        return [
            Picture(prompts[i % len(prompts)], i % len(prompts), i // len(prompts))
            for i in range(count)
        ]
    order: list[int] = np.random.default_rng(count).permutation(len(prompts)).tolist()
    return [Picture(prompts[i], i) for i in sorted(order[:count])]


@torch.no_grad()
def draw(
    model: DiffusionModel,
    pictures: Sequence[Picture],
    mixture: Mixture,
    config: SampleConfig,
    *,
    seed: int,
    batch_size: int,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_batch: Callable[[int], object] = lambda done: None,
) -> Drawn:
    """Draw pictures and measure them. Training's random numbers are not touched.

    Args:
        model: With or without a LoRA.
        pictures: What to draw, at least one.
        mixture: The rewards to measure.
        config: Steps, guidance, eta, size.
        seed: Of the noise.
        batch_size: Pictures drawn at once.
        features: Gives the features (B, D) of images (B, 3, H, W), to be kept with the pictures.
        on_batch: Called with the number of pictures finished, after each batch.

    Raises:
        ConfigError: If there is nothing to draw, or the size does not fit the model.
        RunError: If pictures or rewards are not finite.
    """
    if not pictures:
        raise ConfigError("nothing to draw: no prompts were given")
    shape = model.latent_shape(config.height, config.width)
    schedule = model.schedule(config.num_inference_steps)
    merged = lora.Merged(model.network)
    drawn: list[NDArray[np.uint8]] = []
    seen: list[Floats] = []
    rewards: dict[str, list[Floats]] = {name: [] for name in mixture.figures}
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        prompts = [picture.prompt for picture in batch]
        keys = [(picture.prompt_index, picture.image_index) for picture in batch]
        latents = rng.image_noise(seed, "eval_noise", keys, shape).to(model.device)

        def fresh_noise(i: int, keys: Sequence[tuple[int, int]] = keys) -> torch.Tensor:
            return rng.image_noise(seed, "eval_eta", keys, shape, i).to(model.device)

        conditioning = model.encode_prompts(prompts, config.negative_prompt)
        denoise = model.denoiser(conditioning, config.guidance_scale, config.guidance_interval)
        with merged:
            latents = sample(denoise, latents, schedule, eta=config.eta, draw_noise=fresh_noise)
        decoded = model.decode(latents)
        for name, scores in mixture.score(decoded, prompts).items():
            rewards[name].append(scores.double().cpu().numpy())
        if features is not None:
            seen.append(features(decoded).double().cpu().numpy())
        drawn.append(image_tools.to_uint8(decoded).numpy())
        on_batch(min(start + batch_size, len(pictures)))
    return Drawn(
        tuple(pictures),
        np.concatenate(drawn),
        {name: np.concatenate(parts) for name, parts in rewards.items()},
        np.concatenate(seen) if seen else None,
    )


def diversity(drawn: Drawn) -> tuple[list[Picture], Floats]:
    """Return how different the pictures of one prompt are, for each prompt with several.

    1 minus the mean cosine of the features of all pairs of its pictures: 0 where all are the same.

    Args:
        drawn: With features.

    Returns:
        One picture of each such prompt, and the values, shape (P,).

    Raises:
        ValueError: If there are no features.
    """
    if drawn.features is None:
        raise ValueError("diversity needs features of the pictures")
    groups: dict[int, list[int]] = {}
    for i, picture in enumerate(drawn.pictures):
        groups.setdefault(picture.prompt_index, []).append(i)
    several = [members for members in groups.values() if len(members) > 1]
    values: list[float] = []
    for members in several:
        cosines = drawn.features[members] @ drawn.features[members].T
        values.append(1.0 - float(cosines[np.triu_indices(len(members), k=1)].mean()))
    return [drawn.pictures[members[0]] for members in several], np.array(values)


def compare(pictures: Sequence[Picture], base: Floats, tuned: Floats, *, seed: int = 0) -> Paired:
    """Compare a reward on the same pictures of two models.

    The interval is a percentile bootstrap over prompts: pictures of one prompt are alike, so
    prompts are what is drawn again, not pictures.

    Args:
        pictures: N pictures.
        base: Rewards of the first model, shape (N,).
        tuned: Rewards of the second, shape (N,).
        seed: Of the bootstrap.
    """
    difference = tuned - base
    indices = np.array([picture.prompt_index for picture in pictures])
    prompts, group, counts = np.unique(indices, return_inverse=True, return_counts=True)
    totals = np.bincount(group, weights=difference)
    low = high = float(difference.mean())
    if len(prompts) > 1 and float(np.ptp(difference)) > 0.0:
        # A ratio of sums, so that prompts with more pictures weigh more.
        result = stats.bootstrap(
            (totals, counts.astype(np.float64)),
            lambda t, c, axis=-1: t.sum(axis=axis) / c.sum(axis=axis),
            paired=True,
            n_resamples=9999,
            method="percentile",
            rng=np.random.default_rng(rng.key(seed, "bootstrap")),
        )
        low, high = map(float, result.confidence_interval)
    return Paired(
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=float(difference.mean()),
        low=low,
        high=high,
        wins=float((difference > 0).mean()),
        ties=float((difference == 0).mean()),
    )


def checks(drawn: Mapping[str, Drawn]) -> dict[str, dict[str, Floats]]:
    """Ask the checkers of the built-in prompt sets which images are as their prompts say.

    Args:
        drawn: By name the images of a model, all of the same prompts.

    Returns:
        By part of the prompt and by model 1 for an image that has it right and 0 for one that has
        not, shape (N,). Empty where no checker knows these prompts.
    """
    prompts = [picture.prompt for picture in next(iter(drawn.values())).pictures]
    for checker in dict.fromkeys(s.checker for s in BUILT_IN.values() if s.checker is not None):
        module, _, function = checker.partition(":")
        check = getattr(import_module(module), function)
        found = {name: check(one.images, prompts) for name, one in drawn.items()}
        if all(found.values()):
            parts = next(iter(found.values()))
            return {p: {n: own[p].astype(np.float64) for n, own in found.items()} for p in parts}
    return {}
