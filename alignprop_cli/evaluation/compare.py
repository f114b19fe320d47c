"""Compare models on the same samples, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from scipy import stats

from alignprop_cli import rng
from alignprop_cli.evaluation.draw import Floats, Sample, Samples
from alignprop_cli.prompts import BUILT_IN

DIVERSITY, VENDI = "diversity", "vendi"
"""The names of `diversity` and `vendi` among the metrics."""

# Values that a bootstrap resamples together.
_AT_ONCE = 2**18


@dataclass(frozen=True)
class Paired:
    """One metric of two models on the same samples.

    Args:
        base: Mean of the first model.
        tuned: Mean of the second model.
        difference: Mean of tuned - base.
        low: Lower end of the 95 % confidence interval of the difference.
        high: Upper end of the interval.
        wins: Share of samples on which the second model's value is higher.
        ties: Share of samples on which both values are equal.
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
        mean: Mean over all samples.
        std: Standard deviation over all samples.
        paired: Comparison with the base model; None for the base model itself.
    """

    mean: float
    std: float
    paired: Paired | None


Metrics = Mapping[str, Mapping[str, Metric]]
"""Name of the metric -> name of the model -> metric."""


@dataclass(frozen=True)
class Identity:
    """Which LoRA was used, at which strength.

    Args:
        file: Its file, as an absolute path.
        sha256: Hash of the file.
        strength: Factor on its update.
        trained_on: Names of the rewards it was trained on, if the file records them.
        base_model: Id of the model it was trained on; None if the file does not record it.
        base_until: Share of the chain's calls, from the noise on, that ran without it.
    """

    file: str
    sha256: str
    strength: float
    trained_on: list[str]
    base_model: str | None = None
    base_until: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: what was sampled and measured, and how the models compare.

    Args:
        model: Id and fingerprint of the base model that sampled all images.
        variants: The LoRAs by name.
        prompt_set: Name or file of the prompt set.
        seed: Seed of the noise.
        sample: The `sample` section of the configuration.
        axis: Title of the curve's x axis.
        curve: The x value of each variant; empty if no curve is plotted.
        sampled: Samples by model: base, and each variant.
        group_of: The group of each prompt that has one, by the prompt's index.
        seconds: Wall-clock time of everything but the comparison.
        prompt_files: SHA-256 of each file of the prompt set, by its address or path.
    """

    model: Mapping[str, str]
    variants: Mapping[str, Identity]
    prompt_set: str
    seed: int
    sample: Mapping[str, Any]
    axis: str
    curve: Sequence[float]
    sampled: Mapping[str, Samples]
    group_of: Mapping[int, str]
    seconds: float
    prompt_files: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Return the samples, which are the same for every model."""
        return self.sampled["base"].samples

    @property
    def trained_on(self) -> set[str]:
        """Return the rewards that any of the LoRAs was trained on."""
        return {reward for variant in self.variants.values() for reward in variant.trained_on}

    @property
    def other_models(self) -> list[str]:
        """Return the models that LoRAs were trained on, where it is not the one that sampled."""
        found = {v.base_model: None for v in self.variants.values() if v.base_model}
        return [name for name in found if name != self.model["id"]]

    # Cached, since several outputs read them and each interval is a bootstrap.
    @cached_property
    def metrics(self) -> Metrics:
        """Return all metrics over all samples."""
        return compare_all(self.sampled)

    @cached_property
    def groups(self) -> Mapping[str, Metrics]:
        """Return all metrics over the samples of each group, in the order of the prompt set."""
        rows: dict[str, list[int]] = {}
        for row, sample in enumerate(self.samples):
            group = self.group_of.get(sample.prompt_index)
            if group is not None:
                rows.setdefault(group, []).append(row)
        return {
            group: compare_all({m: found.measured(members) for m, found in self.sampled.items()})
            for group, members in rows.items()
        }

    @cached_property
    def checker(self) -> Metrics:
        """Return the shares of images that match their prompt, by part of the prompt.

        Empty if no checker knows the prompts.
        """
        found = checks(self.sampled)
        return {part: metric(self.samples, right) for part, right in found.items()}


def compare(samples: Sequence[Sample], base: Floats, tuned: Floats, *, seed: int = 0) -> Paired:
    """Compare a metric on the same samples of two models.

    The interval is a percentile bootstrap over prompts, not images: images of one prompt are alike,
    and resampling them would make the interval too narrow.

    Args:
        samples: N samples.
        base: Values of the first model, shape (N,).
        tuned: Values of the second model, shape (N,).
        seed: Seed of the bootstrap.
    """
    # 1. The sum and the number of differences of each prompt, which is all the bootstrap needs.
    difference = tuned - base
    indices = np.array([sample.prompt_index for sample in samples])
    prompts, group, counts = np.unique(indices, return_inverse=True, return_counts=True)
    totals = np.bincount(group, weights=difference)
    # 2. The interval. With one prompt, or no spread at all, there is nothing to resample.
    low = high = float(difference.mean())
    if len(prompts) > 1 and float(np.ptp(difference)) > 0.0:
        # The mean over images as a ratio of sums: prompts with more images weigh more. 9999 is
        # scipy's default, with which the ends of the interval are stable to about 1 % of its width.
        result = stats.bootstrap(
            (totals, counts.astype(np.float64)),
            lambda t, c, axis=-1: t.sum(axis=axis) / c.sum(axis=axis),
            paired=True,
            n_resamples=9999,
            # The numbers are drawn in the same order; all together they would take 25 GB of memory
            # for the 30,000 prompts of COCO.
            batch=max(1, _AT_ONCE // len(prompts)),
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
    """Return every metric of every model, and diversity if prompts repeat.

    Args:
        sampled: Samples by model, the base model as "base"; the same samples for all.
    """
    # 1. What was measured on every image.
    base = sampled["base"]
    metrics = {
        name: metric(base.samples, {model: found.rewards[name] for model, found in sampled.items()})
        for name in base.rewards
    }
    # 2. What is measured on all images of a prompt together.
    if base.features is not None:
        for name, function in ((DIVERSITY, diversity), (VENDI, vendi)):
            spread = {model: function(found) for model, found in sampled.items()}
            prompts, _ = spread["base"]
            if prompts:
                values = {model: each for model, (_, each) in spread.items()}
                metrics[name] = metric(prompts, values)
    return metrics


def metric(samples: Sequence[Sample], values: Mapping[str, Floats]) -> dict[str, Metric]:
    """Return mean, spread and comparison of one metric.

    Args:
        samples: N samples.
        values: Values (N,) by model, the base model as "base".
    """
    base = values["base"]
    return {
        model: Metric(
            float(each.mean()),
            float(each.std()),
            None if model == "base" else compare(samples, base, each),
        )
        for model, each in values.items()
    }


def remarks(samples: Sequence[Sample]) -> list[str]:
    """Return what has to be said beside intervals over these samples."""
    if len({sample.prompt_index for sample in samples}) > 1:
        return []
    return ["all images are of one prompt: the interval, which is over prompts, says nothing here"]


def diversity(sampled: Samples) -> tuple[list[Sample], Floats]:
    """Return how different the images of one prompt are, for each of the P prompts with several.

    1 minus the mean cosine similarity of the features over all pairs of images; 0 if all are equal.

    Args:
        sampled: Samples with features.

    Returns:
        One sample of each such prompt, and the values, shape (P,).

    Raises:
        ValueError: If there are no features.
    """
    several, cosines = _cosines(sampled)
    # Above the diagonal each pair appears once.
    values = [1.0 - float(c[np.triu_indices(len(c), k=1)].mean()) for c in cosines]
    return several, np.array(values)


def vendi(sampled: Samples) -> tuple[list[Sample], Floats]:
    """Return how many different images each of the P prompts with several has, in effect.

    exp(-sum_i l_i log l_i) with the eigenvalues l_i of the kernel of cosines divided by the number
    n of images: 1 if all are equal, n if all are orthogonal.

    Args:
        sampled: Samples with features.

    Returns:
        One sample of each such prompt, and the values, shape (P,).

    Raises:
        ValueError: If there are no features.

    Source: Friedman & Dieng 2023, arXiv:2210.02410, definition 3.1.
    """
    several, cosines = _cosines(sampled)
    values: list[float] = []
    for kernel in cosines:
        # Rounding leaves tiny negative ones, and 0 log 0 is 0.
        eigenvalues = np.linalg.eigvalsh(kernel / len(kernel))
        positive = eigenvalues[eigenvalues > 0.0]
        values.append(float(np.exp(-(positive * np.log(positive)).sum())))
    return several, np.array(values)


def _cosines(sampled: Samples) -> tuple[list[Sample], list[Floats]]:
    """Return one sample of each prompt with several images, and their cosines, (n, n) for n."""
    if sampled.features is None:
        raise ValueError("diversity needs features of the images")
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(sampled.samples):
        groups.setdefault(sample.prompt_index, []).append(i)
    several = [members for members in groups.values() if len(members) > 1]
    # Features have unit length, so their products are cosines.
    found = [sampled.features[rows] @ sampled.features[rows].T for rows in several]
    return [sampled.samples[members[0]] for members in several], found


def checks(sampled: Mapping[str, Samples]) -> dict[str, dict[str, Floats]]:
    """Ask the checkers of the built-in prompt sets which images match their prompts.

    Args:
        sampled: Samples by model; the same samples for all.

    Returns:
        Part of the prompt -> model -> 1 for an image that has it right, else 0, shape (N,). Empty
        if no checker knows these prompts.
    """
    # Prompt sets name their checker as module:function. It is imported here, since a checker may
    # need a network of its own.
    prompts = [sample.prompt for sample in next(iter(sampled.values())).samples]
    for checker in dict.fromkeys(s.checker for s in BUILT_IN.values() if s.checker is not None):
        module, _, function = checker.partition(":")
        check = getattr(import_module(module), function)
        found = {name: check(one.images, prompts) for name, one in sampled.items()}
        # A checker returns nothing for prompts that are not of its set.
        if all(found.values()):
            parts = next(iter(found.values()))
            return {p: {n: each[p].astype(np.float64) for n, each in found.items()} for p in parts}
    return {}
