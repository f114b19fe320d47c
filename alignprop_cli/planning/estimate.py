"""What a step is expected to need, put together from its parts: memory and operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from alignprop_cli.config.schema import Config, GradientConfig

Level = Literal["none", "block", "call"]
"""What is computed again in backward: nothing, the blocks of the network, its whole call."""

LEVELS: tuple[Level, ...] = get_args(Level)

GIB = 2**30

# What is taken beside the tensors: CUDA's own context; what libraries load in the first step.
_CONTEXT = {"cuda": GIB // 2, "cpu": GIB // 4}
# The share left free for gaps between tensors and for what the estimate does not see. glibc leaves
# more gaps: tests/benchmarks/results/heap_epyc-2-cores_202611.md.
_RESERVE, _CPU_RESERVE = 0.08, 0.25


@dataclass(frozen=True)
class Linear:
    """A figure that grows with the micro-batch: fixed + each x images."""

    fixed: float
    each: float

    def __call__(self, images: int) -> float:
        """Return the figure for a micro-batch of so many images."""
        return self.fixed + self.each * images


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one part of a step; see `memory.Cost`."""

    saved: Linear
    forward: Linear
    backward: Linear
    forward_flops: Linear
    backward_flops: Linear


@dataclass(frozen=True)
class Footprint:
    """What the parts of a step need, for any micro-batch.

    Args:
        weights: Bytes of frozen weights, by part.
        trained: Number of LoRA parameters.
        rollout: A network call without gradient, both guidance branches.
        first: The first call of the window, whose input carries no gradient, by level.
        call: Every later call of the window, by level.
        decoder: From latents to images, by whether its blocks are computed again.
        reward: From images to the loss, likewise.
        uncounted: Rewards that could not be counted.
    """

    weights: Mapping[str, int]
    trained: int
    rollout: Work
    first: Mapping[Level, Work]
    call: Mapping[Level, Work]
    decoder: Mapping[bool, Work]
    reward: Mapping[bool, Work]
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """The memory of one process.

    Args:
        bytes: What may be used.
        device_type: `cuda`, `cpu`, ...
        source: Where the figure comes from, for people.
    """

    bytes: int
    device_type: str
    source: str

    @property
    def usable(self) -> int:
        """Return what the estimate may reach."""
        return int((self.bytes - self._context) * (1.0 - self._reserve))

    def least(self, peak: int) -> int:
        """Return the bytes that would do for an estimate."""
        return math.ceil(peak / (1.0 - self._reserve)) + self._context

    @property
    def _context(self) -> int:
        return _CONTEXT.get(self.device_type, 0)

    @property
    def _reserve(self) -> float:
        return _CPU_RESERVE if self.device_type == "cpu" else _RESERVE


@dataclass(frozen=True)
class Correction:
    """What a device needs, by what it was estimated to need: fixed + factor x estimate."""

    fixed: float = 0.0
    factor: float = 1.0

    def __call__(self, size: float) -> float:
        """Return the bytes that are needed where so many were estimated."""
        return self.fixed + self.factor * size

    @staticmethod
    def through(points: Sequence[tuple[float, float]]) -> Correction:
        """Return the line through (estimated, measured) points, one or two of them.

        One point alone, or two that would mean less for more, give a line of slope 1 through the
        worst of them.
        """
        if len(points) == 2 and points[0][0] != points[1][0]:
            (x, y), (other_x, other_y) = points
            factor = (y - other_y) / (x - other_x)
            if factor > 0.0:
                return Correction(y - factor * x, factor)
        return Correction(max(y - x for x, y in points))


UNCORRECTED = Correction()


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to need.

    Args:
        parts: Bytes by part at the moment of the peak.
        flops: Operations of one step of one process.
        floor: The same with nothing computed twice.
        correction: What a measurement says of the sum of the parts.
    """

    parts: Mapping[str, int]
    flops: float
    floor: float
    correction: Correction = UNCORRECTED

    @property
    def peak(self) -> int:
        """Return the bytes at the peak."""
        return math.ceil(self.correction(sum(self.parts.values())))


def longest_window(gradient: GradientConfig, steps: int) -> int:
    """Return the largest number of network calls that can carry gradient."""
    if gradient.method == "full":
        return steps
    if gradient.method == "last_k":
        return gradient.k
    if gradient.method == "random_k":
        return gradient.k_max or steps
    return steps - 1


def mean_window(gradient: GradientConfig, steps: int) -> float:
    """Return the mean number of network calls that carry gradient, drawing aside rounding."""
    if gradient.method == "random_k":
        return (gradient.k_min + (gradient.k_max or steps)) / 2.0
    if gradient.method == "gaussian_k":
        return steps * (1.0 - gradient.mean)
    return float(longest_window(gradient, steps))


def mean_beyond(gradient: GradientConfig, steps: int, calls: int) -> float:
    """Return the mean number of network calls with gradient beyond the last so many."""
    if gradient.method == "random_k":
        longest = longest_window(gradient, steps)
        sizes = range(gradient.k_min, longest + 1)
        return sum(max(k - calls, 0) for k in sizes) / len(sizes)
    if gradient.method == "gaussian_k" and gradient.std > 0.0:
        # E max(k - calls, 0) of a normal k, drawing aside rounding and limits.
        std = gradient.std * steps
        z = (mean_window(gradient, steps) - calls) / std
        density = math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)
        return std * (density + z * math.erfc(-z / math.sqrt(2.0)) / 2.0)
    return max(mean_window(gradient, steps) - calls, 0.0)


def estimate(
    footprint: Footprint,
    config: Config,
    *,
    micro_batch: int,
    accumulation: int,
    network: Level,
    decoder: bool,
    reward: bool,
    stored_calls: int = 0,
    correction: Correction = UNCORRECTED,
) -> Estimate:
    """Return the peak memory and the operations of one step of one process.

    The peak is the largest of: a call of the roll-out; decoding, scoring, and going back through
    both, with all calls of the longest window stored; going back through one call of it, stored or
    computed again.

    Args:
        footprint: What the parts need.
        config: For T, the estimator and the optimiser.
        micro_batch: Images at once.
        accumulation: Micro-batches in a step.
        network: What of the network is computed again.
        decoder: Whether the decoder's blocks are.
        reward: Whether the reward's blocks are.
        stored_calls: With the level `call`, how many of the last calls are stored all the same.
        correction: What was measured of such estimates on the device.
    """
    longest = longest_window(config.gradient, config.sample.num_inference_steps)
    kept = min(stored_calls, longest) if network == "call" else 0
    window = _Window(footprint, network, longest, kept, micro_batch)
    images, scores = footprint.decoder[decoder], footprint.reward[reward]
    m = micro_batch

    stored, before_last = window.stored(longest), window.stored(longest - 1)
    last = window.call(longest - 1)
    phases = {
        "roll-out": {"roll-out": footprint.rollout.forward(m)},
        "last call": {"stored calls": before_last, "network": last.forward(m)},
        "decode": {"stored calls": stored, "decoder": images.forward(m)},
        "score": {
            "stored calls": stored,
            "decoder": images.saved(m),
            "reward": max(scores.forward(m), scores.backward(m)),
        },
        "decoder back": {"stored calls": stored, "decoder": images.backward(m)},
        "network back": {"stored calls": before_last, "network": last.backward(m)},
    }
    if 0 < kept < longest:
        again = longest - kept - 1
        phases["recomputed back"] = {
            "stored calls": window.stored(again),
            "network": window.call(again).backward(m),
        }
    phase = max(phases.values(), key=lambda parts: sum(parts.values()))
    # float32 weights, gradients and AdamW's two moments.
    parts = {**footprint.weights, "LoRA and optimiser": 16 * footprint.trained, **phase}
    return Estimate(
        parts={name: math.ceil(size) for name, size in parts.items()},
        flops=accumulation * _operations(footprint, config, m, network, kept, decoder, reward),
        floor=accumulation * _operations(footprint, config, m, "none", 0, False, False),
        correction=correction,
    )


@dataclass(frozen=True)
class _Window:
    """The calls that carry gradient, of which the last `kept` are stored whatever the level."""

    footprint: Footprint
    level: Level
    calls: int
    kept: int
    images: int

    def call(self, i: int) -> Work:
        """Return call i of the window."""
        level: Level = "none" if i >= self.calls - self.kept else self.level
        return self.footprint.first[level] if i == 0 else self.footprint.call[level]

    def stored(self, i: int) -> float:
        """Return the bytes that the calls before call i store."""
        if i == 0:
            return 0.0
        again = max(min(i, self.calls - self.kept), 1)
        sizes = {level: self.footprint.call[level].saved(self.images) for level in LEVELS}
        later = (again - 1) * sizes[self.level] + (i - again) * sizes["none"]
        return self.call(0).saved(self.images) + later


def _operations(
    footprint: Footprint,
    config: Config,
    images: int,
    level: Level,
    kept: int,
    decoder: bool,
    reward: bool,
) -> float:
    """Return the operations of one micro-batch, on the average over the windows."""
    steps, gradient = config.sample.num_inference_steps, config.gradient
    mean = mean_window(gradient, steps)
    one, more = footprint.first[level], footprint.call[level]
    back = one.backward_flops(images) + (mean - 1.0) * more.backward_flops(images)
    if kept:
        stored = mean - mean_beyond(gradient, steps, kept)
        plain = footprint.call["none"].backward_flops(images)
        back -= stored * (more.backward_flops(images) - plain)
    tail = (footprint.decoder[decoder], footprint.reward[reward])
    rest = sum(part.forward_flops(images) + part.backward_flops(images) for part in tail)
    calls = float(steps)
    if gradient.rollout_steps is not None:
        # Those before the window that are left out: max(steps - k - rollout_steps, 0) on average.
        beyond = max(steps - gradient.rollout_steps, 0)
        calls -= beyond - mean + mean_beyond(gradient, steps, beyond)
    return calls * footprint.rollout.forward_flops(images) + back + rest
