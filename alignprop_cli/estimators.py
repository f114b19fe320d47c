"""Where the gradient flows: the estimators of the reward's gradient, as values.

A chain has T network calls, i = 0 .. T-1, the last one nearest the image. An estimator is four
facts; the sampler (sampling.py) carries them out and knows no method by name:

1. which calls carry gradient (`calls`, a distribution over sets of calls);
2. what their input is (`input_grad`: attached, detached, or mixed with a factor alpha);
3. where the chain ends (`end`: the last latents, or the clean sample predicted by the last call of
   the path; `leaps`: whether a call's output reaches the path's next call in one jump);
4. how often and how strongly the result counts (`copies`, `weight`).

Each group of images draws one path (never inside a chain), as a function of seed and step. The
draws of one step are stratified over its groups: the marginal distribution of each is unchanged,
and their mean varies less.

Most estimators are biased: the gradient through fewer calls is not a noisy version of the full
gradient but another, cheaper direction. K = 1 changes mostly fine detail, large K also the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Literal, Protocol

import torch


@dataclass(frozen=True)
class GradPath:
    """Where the gradient flows in one chain: one draw of an estimator.

    Args:
        calls: Which network calls carry gradient, ascending. The gradient stops at all others; the
            arithmetic of the steps between them passes it on.
        input_grad: alpha, the share of the gradient that each call passes on through its input, in
            [0, 1]: 1 leaves the input attached, 0 detaches it.
        end: None ends the chain at its last latents; "predicted" at the clean sample predicted by
            the last of `calls`.
        leaps: Whether a call's output reaches the path's next call, or the end, in one jump. The
            values stay those of the true chain; only the gradient goes through the jump.
        copies: 0 is the chain itself. n > 0 makes the last call n times instead, each on the clean
            latents noised back to the level before that call with fresh noise.
        weight: Factor on the gradient that enters the chain's end.
    """

    calls: tuple[int, ...]
    input_grad: float = 1.0
    end: Literal["predicted"] | None = None
    leaps: bool = False
    copies: int = 0
    weight: float = 1.0

    def __contains__(self, i: int) -> bool:
        return i in self.calls

    def __len__(self) -> int:
        return len(self.calls)

    def rollout_calls(self, num_inference_steps: int) -> int:
        """Return how many calls come before the first one with gradient, so need no graph."""
        # Copies start from the clean latents, so the whole chain comes before them.
        if self.copies:
            return num_inference_steps
        return self.calls[0] if self.calls else num_inference_steps

    def earlier(self, calls: int) -> GradPath:
        """Return the same path in a chain that has `calls` fewer calls before it."""
        return replace(self, calls=tuple(i - calls for i in self.calls))


def window(start: int, stop: int) -> GradPath:
    """Return the plain path: calls start <= i < stop, inputs attached, to the last latents."""
    return GradPath(tuple(range(start, stop)))


class Calls(Protocol):
    """A distribution over sets of calls.

    A draw maps uniform numbers to a set (inverse transform sampling) and never touches a generator,
    so that the draws of several groups can be stratified.
    """

    @property
    def uniforms(self) -> int:
        """Return how many numbers in [0, 1) one draw needs; 0 where nothing is random."""
        ...

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Return the set, ascending, that belongs to these numbers."""
        ...

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        """Return the possible numbers of calls, each with its probability."""
        ...

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return why it is impossible in a chain of T steps, in words; empty if it is possible."""
        ...


@dataclass(frozen=True)
class LastCalls:
    """The last k calls, k uniform on {k_min, ..., k_max}.

    Args:
        k_min: Smallest k, at least 1; None means T.
        k_max: Largest k, at most T; None means T.
    """

    k_min: int | None = None
    k_max: int | None = None

    @property
    def uniforms(self) -> int:
        """Return 1, or 0 where k is fixed."""
        return 0 if self.k_min == self.k_max else 1

    def _range(self, num_inference_steps: int) -> range:
        # An impossible range is returned as it is: `problems` describes it.
        least = num_inference_steps if self.k_min is None else self.k_min
        most = num_inference_steps if self.k_max is None else self.k_max
        return range(least, most + 1)

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Return the last k calls."""
        sizes = self._range(num_inference_steps)
        # A number in [0, 1) falls into one of len(sizes) equal parts.
        k = sizes[int(uniforms[0] * len(sizes))] if self.uniforms else sizes[0]
        return tuple(range(num_inference_steps - k, num_inference_steps))

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        """Return the possible k, all of the same probability."""
        sizes = self._range(num_inference_steps)
        return {k: 1.0 / len(sizes) for k in sizes}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong unless 1 <= k_min <= k_max <= T."""
        sizes = self._range(num_inference_steps)
        if 1 <= sizes.start < sizes.stop <= num_inference_steps + 1:
            return []
        least, most = sizes.start, sizes.stop - 1
        asked = f"k={least}" if least == most else f"k_min={least}, k_max={most}"
        return [f"expected 1 to num_inference_steps={num_inference_steps} calls, got {asked}"]


@dataclass(frozen=True)
class GaussianStart:
    """All calls from s on, s = round(T x N(mean, std)), truncated to 1 <= s < T.

    Args:
        mean: Mean of s as a fraction of T, in (0, 1).
        std: Standard deviation of s as a fraction of T, >= 0; with 0, s is the rounded mean.
    """

    mean: float
    std: float

    @property
    def uniforms(self) -> int:
        """Return 1, or 0 where s is fixed."""
        return 0 if self.std == 0.0 else 1

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Return the calls from s on."""
        # Inverse transform over ascending s, which is descending k. The last one also gets what
        # rounding leaves of the probability 1.
        sizes = sorted(self.sizes(num_inference_steps).items(), reverse=True)
        remaining, k = (uniforms[0] if self.uniforms else 0.0), sizes[-1][0]
        for size, probability in sizes:
            remaining -= probability
            if remaining < 0.0:
                k = size
                break
        return tuple(range(num_inference_steps - k, num_inference_steps))

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        """Return the probability of each k = T - s under the truncated normal."""
        steps = num_inference_steps
        nearest = min(max(round(self.mean * steps), 1), steps - 1)
        mass: dict[int, float] = {}
        if self.std > 0.0:
            # The mass that rounds to s; what lies outside the chain is cut off, the rest scaled up.
            normal = NormalDist(self.mean * steps, self.std * steps)
            mass = {s: normal.cdf(s + 0.5) - normal.cdf(s - 0.5) for s in range(1, steps)}
        total = sum(mass.values())
        if total <= 0.0:
            # No deviation, or so narrow a normal outside the chain that its mass underflows.
            return {steps - nearest: 1.0}
        return {steps - s: p / total for s, p in mass.items() if p > 0.0}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong unless T >= 2, 0 < mean < 1 and std >= 0."""
        if num_inference_steps >= 2 and 0.0 < self.mean < 1.0 and self.std >= 0.0:
            return []
        return [
            "gaussian_k needs at least 2 steps, 0 < mean < 1 and std >= 0, got "
            f"num_inference_steps={num_inference_steps}, mean={self.mean}, std={self.std}"
        ]


@dataclass(frozen=True)
class Estimator:
    """How the gradient of the reward is estimated: the four facts of the module's docstring.

    Planner, probe and trainer ask this value; none of them looks at the name of a method.

    Args:
        calls: Which calls carry gradient.
        input_grad: As `GradPath.input_grad`.
        end: As `GradPath.end`.
        leaps: As `GradPath.leaps`.
        copies: As `GradPath.copies`.
        weight: As `GradPath.weight`.
    """

    calls: Calls = field(default_factory=LastCalls)
    input_grad: float = 1.0
    end: Literal["predicted"] | None = None
    leaps: bool = False
    copies: int = 0
    weight: float = 1.0

    def draw(
        self, num_inference_steps: int, generator: torch.Generator, groups: int = 1
    ) -> list[GradPath]:
        """Draw one path for each group of a step, stratified over the groups.

        Each path by itself has the estimator's distribution. With G groups, [0, 1) is cut into G
        equal parts and each group draws from a part of its own, so a step has small and large k.

        Args:
            num_inference_steps: T, the number of network calls of the chain.
            generator: Source of all randomness; estimators that draw nothing leave it untouched.
            groups: G, how many paths to draw.

        Raises:
            ValueError: If the estimator has `problems` with T steps.
        """
        for problem in self.problems(num_inference_steps):
            raise ValueError(problem)
        # One column per uniform number, one row per group: a random part of [0, 1) for each group
        # (a permutation, so that group 0 is not always the smallest), and a random place in it.
        columns: list[list[float]] = []
        for _ in range(self.calls.uniforms):
            strata = torch.randperm(groups, generator=generator).double()
            within = torch.rand(groups, generator=generator, dtype=torch.float64)
            columns.append(list(map(float, (strata + within) / groups)))
        return [
            self.path(self.calls.draw(num_inference_steps, [column[group] for column in columns]))
            for group in range(groups)
        ]

    def path(self, calls: tuple[int, ...]) -> GradPath:
        """Return the estimator's path through these calls, without a draw."""
        return GradPath(calls, self.input_grad, self.end, self.leaps, self.copies, self.weight)

    def longest(self, num_inference_steps: int) -> int:
        """Return the largest number of calls that can carry gradient."""
        return max(self.calls.sizes(num_inference_steps))

    def mean(self, num_inference_steps: int) -> float:
        """Return the mean number of calls that carry gradient."""
        return self.mean_beyond(num_inference_steps, 0)

    def mean_beyond(self, num_inference_steps: int, calls: int) -> float:
        """Return E max(k - calls, 0), k the number of calls with gradient."""
        sizes = self.calls.sizes(num_inference_steps)
        return sum(p * max(k - calls, 0) for k, p in sizes.items())

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return why it is impossible in a chain of T steps, in words; empty if it is possible."""
        return self.calls.problems(num_inference_steps)


def full() -> Estimator:
    """Every call carries gradient: the exact gradient of the reward.

    Source: Prabhudesai et al. 2023, arXiv:2310.03739, section 4 (AlignProp);
        Clark et al. 2023, arXiv:2309.17400, section 4 (DRaFT).
    """
    return Estimator(LastCalls())


def last_k(k: int) -> Estimator:
    """The last k calls carry gradient, 1 <= k <= T; k = T is `full`.

    Source: Clark et al. 2023, arXiv:2309.17400 (DRaFT-K); AlignProp's "K = 1" variant.
    """
    return Estimator(LastCalls(k, k))


def random_k(k_min: int = 1, k_max: int | None = None) -> Estimator:
    """The last k calls carry gradient, k uniform on {k_min, ..., k_max}; None means T.

    Source: Prabhudesai et al. 2023, arXiv:2310.03739 (randomised truncation; their U(0, 50)
        includes the empty window, which has no gradient and is left out here).
    """
    return Estimator(LastCalls(k_min, k_max))


def gaussian_k(mean: float = 0.84, std: float = 0.1) -> Estimator:
    """All calls from a normally distributed first one on; both arguments are fractions of T.

    Source: the current main branch of the AlignProp reference repository. Its mean 42 and deviation
        5 are divided by its 50 steps, so that they hold for any T. It repeats the draw until
        1 <= s < T; this is the same truncated distribution.
    """
    return Estimator(GaussianStart(mean, std))


DRAWS_PER_STEP = 4
"""How many paths a step draws at most.

On the embedded model, one draw per step adds 1.3 % to the variance of the step's gradient, four
stratified draws 0.05 % (tests/benchmarks/results/window_group_epyc-2-cores_202611.md).
"""

# Images of one group go through the network together; fewer than 8 leave a GPU waiting.
_LEAST_GROUP = 8


def window_group(batch_size: int) -> int:
    """Return how many consecutive images share one path by default.

    The batch divided by `DRAWS_PER_STEP`, or by the largest smaller number that leaves whole groups
    of at least 8 images.
    """
    # A function of the batch alone, never of memory or processes: a step has to compute the same
    # gradient on any machine.
    draws = (d for d in range(1, DRAWS_PER_STEP + 1) if batch_size % d == 0)
    return batch_size // max((d for d in draws if batch_size // d >= _LEAST_GROUP), default=1)
