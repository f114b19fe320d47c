"""Which network calls carry gradient: distributions over sets of calls.

A chain has T calls, i = 0 .. T-1, the last one nearest the image. A draw maps uniform numbers to a
set (inverse transform sampling) and never touches a generator, so that the draws of several groups
of images can be stratified (estimators.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, Protocol

import torch


class Draw(NamedTuple):
    """One draw of a distribution over sets of calls.

    Args:
        calls: The calls that carry gradient, ascending.
        stop: The call whose predicted clean sample the gradient starts from; it need not be one of
            `calls`. None: the gradient starts from the chain's last latents.
    """

    calls: tuple[int, ...]
    stop: int | None = None


class Calls(Protocol):
    """A distribution over sets of calls."""

    @property
    def uniforms(self) -> int:
        """Return how many numbers in [0, 1) one draw needs; 0 where nothing is random."""
        ...

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return the set that belongs to these numbers."""
        ...

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return all possible draws with their probabilities, or a `tally` of many draws."""
        ...

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return why it is impossible in a chain of T steps, in words; empty if it is possible."""
        ...


def stratified(uniforms: int, groups: int, generator: torch.Generator) -> list[list[float]]:
    """Return the numbers of the draws of several groups, each uniform in [0, 1).

    Args:
        uniforms: How many numbers one draw needs.
        groups: G, how many draws.
        generator: Source of all randomness.

    Returns:
        G rows. In each column the G numbers fall into different G-th parts of [0, 1).
    """
    # A random part for each group (a permutation, so that group 0 is not always the smallest), and
    # a random place in it.
    columns: list[list[float]] = []
    for _ in range(uniforms):
        strata = torch.randperm(groups, generator=generator).double()
        within = torch.rand(groups, generator=generator, dtype=torch.float64)
        columns.append(list(map(float, (strata + within) / groups)))
    return [[column[group] for column in columns] for group in range(groups)]


@functools.cache
def tally(calls: Calls, num_inference_steps: int) -> Mapping[Draw, float]:
    """Return the shares of 2,000 fixed, stratified draws, where there are too many to list.

    Args:
        calls: Hashable, as a frozen dataclass is.
        num_inference_steps: T.
    """
    count = 2000
    rows = stratified(calls.uniforms, count, torch.Generator().manual_seed(0))
    found = Counter(calls.draw(num_inference_steps, row) for row in rows)
    return {draw: times / count for draw, times in found.items()}


def calls_in(span: tuple[float, float], num_inference_steps: int) -> range:
    """Return the calls of a part of the chain: at least one.

    Args:
        span: Two fractions of the T calls: 0 is the noise, 1 the image. A call that lies in it
            partly belongs to it.
        num_inference_steps: T.
    """
    # Rounding must not add a call: 0.6 x 5 is 3, a little more or less.
    tiny, steps = 1e-9, num_inference_steps
    first = min(math.floor(span[0] * steps + tiny), steps - 1)
    return range(first, max(math.ceil(span[1] * steps - tiny), first + 1))


def _span_problems(span: tuple[float, float]) -> list[str]:
    if 0.0 <= span[0] < span[1] <= 1.0:
        return []
    return [f"expected a span 0 <= low < high <= 1, got {span[0]} to {span[1]}"]


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

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return the last k calls."""
        sizes = self._range(num_inference_steps)
        # A number in [0, 1) falls into one of len(sizes) equal parts.
        k = sizes[int(uniforms[0] * len(sizes))] if self.uniforms else sizes[0]
        return _last(k, num_inference_steps)

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return the possible k, all of the same probability."""
        sizes = self._range(num_inference_steps)
        return {_last(k, num_inference_steps): 1.0 / len(sizes) for k in sizes}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong unless 1 <= k_min <= k_max <= T."""
        sizes = self._range(num_inference_steps)
        if 1 <= sizes.start < sizes.stop <= num_inference_steps + 1:
            return []
        least, most = sizes.start, sizes.stop - 1
        asked = f"k={least}" if least == most else f"k_min={least}, k_max={most}"
        return [f"expected 1 to num_inference_steps={num_inference_steps} calls, got {asked}"]


def _last(k: int, num_inference_steps: int) -> Draw:
    return Draw(tuple(range(num_inference_steps - k, num_inference_steps)))


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

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return the calls from s on."""
        # Inverse transform over ascending s. The last one also gets what rounding leaves of the
        # probability 1.
        sizes = list(self.draws(num_inference_steps).items())
        remaining, found = (uniforms[0] if self.uniforms else 0.0), sizes[-1][0]
        for draw, probability in sizes:
            remaining -= probability
            if remaining < 0.0:
                return draw
        return found

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return the probability of each s, ascending, under the truncated normal."""
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
            return {_last(steps - nearest, steps): 1.0}
        return {_last(steps - s, steps): p / total for s, p in mass.items() if p > 0.0}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong unless T >= 2, 0 < mean < 1 and std >= 0."""
        if num_inference_steps >= 2 and 0.0 < self.mean < 1.0 and self.std >= 0.0:
            return []
        return [
            "gaussian_k needs at least 2 steps, 0 < mean < 1 and std >= 0, got "
            f"num_inference_steps={num_inference_steps}, mean={self.mean}, std={self.std}"
        ]


@dataclass(frozen=True)
class OneCall:
    """One call m, uniform on those of a span, and the clean sample that it predicts.

    Args:
        span: As in `calls_in`.
    """

    span: tuple[float, float]
    uniforms: int = 1

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return one call, which is also the stop."""
        found = calls_in(self.span, num_inference_steps)
        m = found[int(uniforms[0] * len(found))]
        return Draw((m,), m)

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return the calls of the span, all of the same probability."""
        found = calls_in(self.span, num_inference_steps)
        return {Draw((m,), m): 1.0 / len(found) for m in found}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong with the span."""
        return _span_problems(self.span)


@dataclass(frozen=True)
class SpacedCalls:
    """k equally spaced calls of the chain up to a stop, which is uniform on the calls of a span.

    Of the n = stop + 1 calls up to the stop, the k calls are n // k apart, from an offset that is
    uniform on all that fit. Where n < k all n carry gradient.

    Args:
        k: Number of calls, at least 1.
        span: Where the stop lies, as in `calls_in`.
    """

    k: int
    span: tuple[float, float]
    uniforms: int = 2

    def _spaced(self, stop: int) -> list[Draw]:
        """Return the sets that end at a stop, one for each offset."""
        n = stop + 1
        k = min(self.k, n)
        stride = n // k
        return [
            Draw(tuple(offset + i * stride for i in range(k)), stop)
            for offset in range(n - (k - 1) * stride)
        ]

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return k calls and the stop."""
        stops = calls_in(self.span, num_inference_steps)
        found = self._spaced(stops[int(uniforms[0] * len(stops))])
        return found[int(uniforms[1] * len(found))]

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return every stop with every offset."""
        by_stop = [self._spaced(stop) for stop in calls_in(self.span, num_inference_steps)]
        return {draw: 1.0 / (len(by_stop) * len(found)) for found in by_stop for draw in found}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong with the span, or unless 1 <= k <= T."""
        if not 1 <= self.k <= num_inference_steps:
            what = f"got {self.k}"
            return [f"expected 1 to num_inference_steps={num_inference_steps} calls, {what}"]
        return _span_problems(self.span)


@dataclass(frozen=True)
class TwoCalls:
    """Two calls of a span, every pair equally likely.

    Args:
        span: As in `calls_in`.
    """

    span: tuple[float, float]
    uniforms: int = 1

    def _pairs(self, num_inference_steps: int) -> list[tuple[int, int]]:
        return list(itertools.combinations(calls_in(self.span, num_inference_steps), 2))

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return two calls."""
        pairs = self._pairs(num_inference_steps)
        return Draw(pairs[int(uniforms[0] * len(pairs))])

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return all pairs, all of the same probability."""
        pairs = self._pairs(num_inference_steps)
        return {Draw(pair): 1.0 / len(pairs) for pair in pairs}

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong with the span, or unless it has two calls."""
        found = len(calls_in(self.span, num_inference_steps))
        if found < 2:
            return [f"expected a span of at least 2 calls, got {found} of {num_inference_steps}"]
        return _span_problems(self.span)


@dataclass(frozen=True)
class LateCalls:
    """k different calls of a span, drawn one after the other with weight (i + 1)^bias for call i.

    Args:
        k: Number of calls, at least 1.
        bias: 0 draws them uniformly; the larger, the nearer they are to the image.
        span: As in `calls_in`.
    """

    k: int
    bias: float
    span: tuple[float, float]

    @property
    def uniforms(self) -> int:
        """Return k: one for each call."""
        return self.k

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        """Return k calls, drawn without replacement."""
        left = list(calls_in(self.span, num_inference_steps))
        found: list[int] = []
        for uniform in uniforms:
            # Inverse transform over what is left, by weight. `bisect` would save nothing here.
            sums = list(itertools.accumulate((i + 1.0) ** self.bias for i in left))
            place = next((n for n, s in enumerate(sums) if uniform * sums[-1] < s), len(left) - 1)
            found.append(left.pop(place))
        return Draw(tuple(sorted(found)))

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        """Return a tally: T choose k sets are too many to list."""
        return tally(self, num_inference_steps)

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return what is wrong with the span, or unless it has k calls."""
        found = len(calls_in(self.span, num_inference_steps))
        if not 1 <= self.k <= found:
            return [f"expected 1 to {found} calls, as many as the span has, got {self.k}"]
        return _span_problems(self.span)
