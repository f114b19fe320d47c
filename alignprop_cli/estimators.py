"""Where the gradient flows: the estimators of the reward's gradient, as values.

A chain has T network calls, i = 0 .. T-1, the last one nearest the image. An estimator draws a
window of calls that carry gradient; `sampling.sample` obeys it. Truncation is biased: the gradient
through fewer calls is not an estimate of the full one but a cheaper direction, with K = 1 reaching
mostly fine detail and large K also the layout.

One window is drawn per group of images (never inside a chain), from a generator that is a function
of the seed, the step and the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class GradWindow:
    """The calls start <= i < stop carry gradient; the gradient stops at all others."""

    start: int
    stop: int

    def __contains__(self, i: int) -> bool:
        return self.start <= i < self.stop

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)


class Truncation(Protocol):
    """An estimator: draws the window of one group of images."""

    def draw(self, num_inference_steps: int, generator: torch.Generator) -> GradWindow:
        """Draw a window of at least one call.

        Args:
            num_inference_steps: T, the number of network calls of the chain.
            generator: Source of all randomness; the deterministic estimators leave it untouched.

        Raises:
            ValueError: If the estimator asks for more calls than there are, or for none.
        """
        ...


def _last(k: int, num_inference_steps: int) -> GradWindow:
    if not 1 <= k <= num_inference_steps:
        raise ValueError(
            f"k must be between 1 and num_inference_steps={num_inference_steps}, got {k}"
        )
    return GradWindow(num_inference_steps - k, num_inference_steps)


@dataclass(frozen=True)
class Full:
    """Every call carries gradient: the exact gradient of the reward.

    Source: Prabhudesai et al. 2023, arXiv:2310.03739, section 4 (AlignProp);
        Clark et al. 2023, arXiv:2309.17400, section 4 (DRaFT).
    """

    def draw(self, num_inference_steps: int, generator: torch.Generator) -> GradWindow:
        """Return the window of all calls."""
        return _last(num_inference_steps, num_inference_steps)


@dataclass(frozen=True)
class LastK:
    """The last k calls carry gradient.

    Args:
        k: Number of calls, 1 <= k <= T; k = T is `Full`.

    Source: Clark et al. 2023, arXiv:2309.17400 (DRaFT-K); AlignProp's "K = 1" variant.
    """

    k: int

    def draw(self, num_inference_steps: int, generator: torch.Generator) -> GradWindow:
        """Return the window of the last k calls."""
        return _last(self.k, num_inference_steps)


@dataclass(frozen=True)
class RandomK:
    """The last k calls carry gradient, k uniform on {k_min, ..., k_max}, drawn once per group.

    Args:
        k_min: Smallest k, at least 1.
        k_max: Largest k, at most T; None means T.

    Source: Prabhudesai et al. 2023, arXiv:2310.03739 (randomised truncation; their U(0, 50)
        includes the empty window, which has no gradient and is left out here).
    """

    k_min: int = 1
    k_max: int | None = None

    def draw(self, num_inference_steps: int, generator: torch.Generator) -> GradWindow:
        """Draw k and return the window of the last k calls."""
        k_max = num_inference_steps if self.k_max is None else self.k_max
        if not 1 <= self.k_min <= k_max <= num_inference_steps:
            raise ValueError(
                f"expected 1 <= k_min <= k_max <= num_inference_steps={num_inference_steps}, "
                f"got k_min={self.k_min}, k_max={k_max}"
            )
        k = int(torch.randint(self.k_min, k_max + 1, (), generator=generator).item())
        return _last(k, num_inference_steps)


@dataclass(frozen=True)
class GaussianK:
    """The calls from s on carry gradient, s normal and redrawn until 1 <= s < T.

    Args:
        mean: Mean of s as a fraction of T, in (0, 1). Published: 42 of 50 steps = 0.84.
        std: Standard deviation of s as a fraction of T, >= 0. Published: 5 of 50 steps = 0.1.

    Source: the rule of the current main of the AlignProp reference repository, with its mean and
        deviation divided by its 50 steps so that they hold for any T.
    """

    mean: float = 0.84
    std: float = 0.1

    def draw(self, num_inference_steps: int, generator: torch.Generator) -> GradWindow:
        """Draw s and return the window from s to the last call."""
        if num_inference_steps < 2 or not 0.0 < self.mean < 1.0 or self.std < 0.0:
            raise ValueError(
                "gaussian_k needs at least 2 steps, 0 < mean < 1 and std >= 0, got "
                f"num_inference_steps={num_inference_steps}, mean={self.mean}, std={self.std}"
            )
        while True:
            draw = torch.randn((), generator=generator, dtype=torch.float64).item()
            start = round((self.mean + self.std * draw) * num_inference_steps)
            if self.std == 0.0:
                start = min(max(start, 1), num_inference_steps - 1)
            if 1 <= start < num_inference_steps:
                return GradWindow(start, num_inference_steps)
