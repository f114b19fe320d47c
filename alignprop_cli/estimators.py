"""Where the gradient flows: the estimators of the reward's gradient, as values.

A chain has T network calls, i = 0 .. T-1, the last one nearest the image. An estimator is four
facts, apart from the sampler that obeys them:

1. which calls carry gradient (`calls`, a distribution that is drawn from);
2. what their input is (`input_grad`: attached, detached, or mixed with a factor alpha);
3. where the chain ends (`end`: the last latents, or the clean sample that the last of the calls
   predicts; `leaps`: whether a call's output reaches the next of the calls in one jump);
4. how often and how strongly it counts (`copies`, `weight`).

One path is drawn per group of images (never inside a chain), as a function of seed and step. The
draws of one step are stratified over its groups: the marginal distribution of each is unchanged,
and their mean varies less.

Most estimators are biased: the gradient through fewer calls is not a noisy version of the full one
but a cheaper direction, with K = 1 reaching mostly fine detail and large K also the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Literal, Protocol

import torch


@dataclass(frozen=True)
class GradPath:
    """Where the gradient flows in one chain; what one draw of an estimator says.

    Args:
        calls: Which network calls carry gradient, ascending. The gradient stops at all others; the
            arithmetic of the steps between them passes it on.
        input_grad: alpha, the share of the gradient that each call passes on through its input, in
            [0, 1]: 1 leaves the input attached, 0 detaches it.
        end: None ends the chain at its last latents; "predicted" at the clean sample that the last
            of the calls predicts.
        leaps: Whether a call's output reaches the next of the calls, or the end, in one jump. The
            values stay those of the true chain; only the gradient goes through the jump.
        copies: 0 is the chain itself. n > 0 takes the last call n times instead, from the true end
            with fresh noise added back to the level before that call.
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
        if self.copies:
            return num_inference_steps
        return self.calls[0] if self.calls else num_inference_steps

    def earlier(self, calls: int) -> GradPath:
        """Return the same path in a chain that has so many calls fewer before it."""
        return replace(self, calls=tuple(i - calls for i in self.calls))


def window(start: int, stop: int) -> GradPath:
    """Return the path through the calls start <= i < stop, attached, to the last latents."""
    return GradPath(tuple(range(start, stop)))


class Calls(Protocol):
    """A distribution over sets of calls, drawn by inverse transform from uniform numbers.

    Args:
        uniforms: How many numbers in [0, 1) one draw takes; 0 for what is not random.
    """

    @property
    def uniforms(self) -> int:
        """Return how many numbers in [0, 1) one draw takes."""
        ...

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Return the calls, ascending, for such numbers."""
        ...

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        """Return the probability of every number of calls that can be drawn."""
        ...

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong with it for so many steps, in words; empty where nothing is."""
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
        least = num_inference_steps if self.k_min is None else self.k_min
        most = num_inference_steps if self.k_max is None else self.k_max
        return range(least, most + 1)

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Return the last k calls."""
        sizes = self._range(num_inference_steps)
        k = sizes[int(uniforms[0] * len(sizes))] if self.uniforms else sizes[0]
        return tuple(range(num_inference_steps - k, num_inference_steps))

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        """Return the same probability for each k."""
        sizes = self._range(num_inference_steps)
        return {k: 1.0 / len(sizes) for k in sizes}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Say whether 1 <= k_min <= k_max <= T does not hold."""
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
        std: Standard deviation of s as a fraction of T, >= 0; 0 is the nearest s to the mean.
    """

    mean: float
    std: float

    @property
    def uniforms(self) -> int:
        """Return 1, or 0 where s is fixed."""
        return 0 if self.std == 0.0 else 1

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        """Return the calls from s on."""
        # Inverse transform over s, ascending; the last one takes what rounding leaves.
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
            normal = NormalDist(self.mean * steps, self.std * steps)
            mass = {s: normal.cdf(s + 0.5) - normal.cdf(s - 0.5) for s in range(1, steps)}
        total = sum(mass.values())
        if total <= 0.0:
            # No deviation, or all of the normal's mass lies outside the chain.
            return {steps - nearest: 1.0}
        return {steps - s: p / total for s, p in mass.items() if p > 0.0}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Say whether T >= 2, 0 < mean < 1 and std >= 0 do not hold."""
        if num_inference_steps >= 2 and 0.0 < self.mean < 1.0 and self.std >= 0.0:
            return []
        return [
            "gaussian_k needs at least 2 steps, 0 < mean < 1 and std >= 0, got "
            f"num_inference_steps={num_inference_steps}, mean={self.mean}, std={self.std}"
        ]


@dataclass(frozen=True)
class Estimator:
    """How the gradient of the reward is estimated: the four facts of the module's docstring.

    Planner, probe, validation and trainer ask this value, and never the name of a method.

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
        """Draw the paths of the groups of one step, stratified over them.

        Each path alone has the estimator's distribution. Of G groups each takes another G-th part
        of [0, 1) for each of its uniform numbers, so that e.g. small and large k take turns.

        Args:
            num_inference_steps: T, the number of network calls of the chain.
            generator: Source of all randomness; estimators that draw nothing leave it untouched.
            groups: How many paths to draw.

        Raises:
            ValueError: If the estimator has `problems` with so many steps.
        """
        for problem in self.problems(num_inference_steps):
            raise ValueError(problem)
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
        """Return the path through some calls, whatever would be drawn."""
        return GradPath(calls, self.input_grad, self.end, self.leaps, self.copies, self.weight)

    def longest(self, num_inference_steps: int) -> int:
        """Return the largest number of calls that can carry gradient."""
        return max(self.calls.sizes(num_inference_steps))

    def mean(self, num_inference_steps: int) -> float:
        """Return the mean number of calls that carry gradient."""
        return self.mean_beyond(num_inference_steps, 0)

    def mean_beyond(self, num_inference_steps: int, calls: int) -> float:
        """Return the mean number of calls with gradient beyond so many: E max(k - calls, 0)."""
        sizes = self.calls.sizes(num_inference_steps)
        return sum(p * max(k - calls, 0) for k, p in sizes.items())

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what makes it impossible for a chain of so many steps, in words."""
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

    Source: the rule of the current main of the AlignProp reference repository, with its mean 42 and
        deviation 5 divided by its 50 steps so that they hold for any T. It draws until
        1 <= s < T; this is that truncated distribution.
    """
    return Estimator(GaussianStart(mean, std))


DRAWS_PER_STEP = 4
"""How many paths a step draws at most.

On the embedded model one draw a step adds 1.3 % to the variance of its gradient, four stratified
ones 0.05 % (tests/benchmarks/results/window_group_epyc-2-cores_202611.md).
"""

_LEAST_GROUP = 8
"""Images of one path go through the network together, and fewer than this keep a GPU waiting."""


def window_group(batch_size: int) -> int:
    """Return how many consecutive images share one path by default.

    A function of the batch alone, never of memory or processes, so that a step computes the same
    on any machine: the batch is divided by `DRAWS_PER_STEP`, or by the largest smaller number that
    leaves whole groups of 8 and more.
    """
    draws = (d for d in range(1, DRAWS_PER_STEP + 1) if batch_size % d == 0)
    return batch_size // max((d for d in draws if batch_size // d >= _LEAST_GROUP), default=1)
