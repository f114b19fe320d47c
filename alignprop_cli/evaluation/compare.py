"""What two models differ in on the same samples, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from scipy import stats

from alignprop_cli import rng
from alignprop_cli.evaluation.draw import Floats, Sample, Samples
from alignprop_cli.prompts import BUILT_IN

DIVERSITY = "diversity"
"""What `diversity` is called among the metrics."""


@dataclass(frozen=True)
class Paired:
    """One metric of two models on the same samples.

    Args:
        base: Mean of the first model.
        tuned: Mean of the second.
        difference: Mean of tuned - base.
        low: Lower end of the 95 % confidence interval of the difference.
        high: Upper end.
        wins: Share of samples on which the second model's value is higher.
        ties: Share on which both are equal.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    wins: float
    ties: float


@dataclass(frozen=True)
class Metric:
    """One metric of one model.

    Args:
        mean: Over all samples.
        std: Over all samples.
        paired: Against the base model on the same samples; None for the base model itself.
    """

    mean: float
    std: float
    paired: Paired | None


Metrics = Mapping[str, Mapping[str, Metric]]
"""By name of the metric and of the model."""


@dataclass(frozen=True)
class Identity:
    """Which LoRA at which strength.

    Args:
        file: Its file, in full.
        sha256: Of the file.
        strength: Factor on its update.
        trained_on: Names of the rewards it was trained on, as far as the file says.
    """

    file: str
    sha256: str
    strength: float
    trained_on: list[str]


@dataclass(frozen=True)
class Evaluation:
    """What was sampled and measured, and what the models differ in.

    Args:
        model: The base model's id and fingerprint.
        variants: The LoRAs by name.
        prompt_set: Its name or file.
        seed: Of the noise.
        sample: The `sample` section of the configuration.
        axis: What the places on the curve are.
        curve: Places of the variants on it; empty where none is plotted.
        sampled: By model: base, and each variant.
        group_of: Group of each prompt that has one.
        seconds: Wall-clock time of everything but the comparison.
    """

    model: Mapping[str, str]
    variants: Mapping[str, Identity]
    prompt_set: str
    seed: int
    sample: Mapping[str, Any]
    axis: str
    curve: Sequence[float]
    sampled: Mapping[str, Samples]
    group_of: Mapping[str, str]
    seconds: float

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Return what was sampled with every model."""
        return self.sampled["base"].samples

    @property
    def trained_on(self) -> set[str]:
        """Return the rewards that any of the LoRAs was trained on."""
        return {reward for variant in self.variants.values() for reward in variant.trained_on}

    @cached_property
    def metrics(self) -> Metrics:
        """Return everything that was measured, over all samples."""
        return compare_all(self.sampled)

    @cached_property
    def groups(self) -> Mapping[str, Metrics]:
        """Return the same over the samples of each group of prompts."""
        names = [self.group_of.get(sample.prompt) for sample in self.samples]
        rows = {
            group: [row for row, name in enumerate(names) if name == group]
            for group in sorted({name for name in names if name is not None})
        }
        return {
            group: compare_all({model: own[members] for model, own in self.sampled.items()})
            for group, members in rows.items()
        }

    @cached_property
    def checker(self) -> Metrics:
        """Return the shares of images that are as their prompt says, by part of the prompt.

        Empty where no checker knows the prompts.
        """
        found = checks(self.sampled)
        return {part: metric(self.samples, right) for part, right in found.items()}


def compare(samples: Sequence[Sample], base: Floats, tuned: Floats, *, seed: int = 0) -> Paired:
    """Compare a metric on the same samples of two models.

    The interval is a percentile bootstrap over prompts: images of one prompt are alike, so prompts
    are what is resampled, not images.

    Args:
        samples: N samples.
        base: Values of the first model, shape (N,).
        tuned: Values of the second, shape (N,).
        seed: Of the bootstrap.
    """
    # Sums and counts by prompt are all that the bootstrap needs.
    difference = tuned - base
    indices = np.array([sample.prompt_index for sample in samples])
    prompts, group, counts = np.unique(indices, return_inverse=True, return_counts=True)
    totals = np.bincount(group, weights=difference)
    # One prompt, or no spread at all: there is nothing to resample.
    low = high = float(difference.mean())
    if len(prompts) > 1 and float(np.ptp(difference)) > 0.0:
        # A ratio of sums, so that prompts with more images weigh more.
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


def compare_all(sampled: Mapping[str, Samples]) -> dict[str, dict[str, Metric]]:
    """Return every metric of every model, and diversity where prompts repeat.

    Args:
        sampled: By model, the base model as "base", all of the same samples.
    """
    # 1. What was measured on every image.
    base = sampled["base"]
    metrics = {
        name: metric(base.samples, {model: own.rewards[name] for model, own in sampled.items()})
        for name in base.rewards
    }
    # 2. What is measured on all images of a prompt together.
    if base.features is not None:
        spread = {model: diversity(own) for model, own in sampled.items()}
        prompts, _ = spread["base"]
        if prompts:
            values = {model: own for model, (_, own) in spread.items()}
            metrics[DIVERSITY] = metric(prompts, values)
    return metrics


def metric(samples: Sequence[Sample], values: Mapping[str, Floats]) -> dict[str, Metric]:
    """Return mean, spread and comparison of one metric.

    Args:
        samples: N samples.
        values: By model, the base model as "base", shape (N,).
    """
    base = values["base"]
    return {
        model: Metric(
            float(own.mean()),
            float(own.std()),
            None if model == "base" else compare(samples, base, own),
        )
        for model, own in values.items()
    }


def diversity(sampled: Samples) -> tuple[list[Sample], Floats]:
    """Return how different the images of one prompt are, for each prompt with several.

    1 minus the mean cosine of the features of all pairs of its images: 0 where all are the same.

    Args:
        sampled: With features.

    Returns:
        One sample of each such prompt, and the values, shape (P,).

    Raises:
        ValueError: If there are no features.
    """
    if sampled.features is None:
        raise ValueError("diversity needs features of the images")
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(sampled.samples):
        groups.setdefault(sample.prompt_index, []).append(i)
    several = [members for members in groups.values() if len(members) > 1]
    values: list[float] = []
    for members in several:
        cosines = sampled.features[members] @ sampled.features[members].T
        # Above the diagonal every pair stands once.
        values.append(1.0 - float(cosines[np.triu_indices(len(members), k=1)].mean()))
    return [sampled.samples[members[0]] for members in several], np.array(values)


def checks(sampled: Mapping[str, Samples]) -> dict[str, dict[str, Floats]]:
    """Ask the checkers of the built-in prompt sets which images are as their prompts say.

    Args:
        sampled: By model, all of the same samples.

    Returns:
        By part of the prompt and by model 1 for an image that has it right and 0 for one that has
        not, shape (N,). Empty where no checker knows these prompts.
    """
    # Modules of checkers are named by the sets, and imported here, where they are needed.
    prompts = [sample.prompt for sample in next(iter(sampled.values())).samples]
    for checker in dict.fromkeys(s.checker for s in BUILT_IN.values() if s.checker is not None):
        module, _, function = checker.partition(":")
        check = getattr(import_module(module), function)
        found = {name: check(one.images, prompts) for name, one in sampled.items()}
        # A checker answers with nothing for prompts that are not of its set.
        if all(found.values()):
            parts = next(iter(found.values()))
            return {p: {n: own[p].astype(np.float64) for n, own in found.items()} for p in parts}
    return {}
