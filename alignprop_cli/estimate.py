"""What a step is expected to need, put together from its parts: memory and operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from alignprop_cli.config import Config, GradientConfig

Level = Literal["none", "block", "call"]
"""What is computed again in backward: nothing, the blocks of the network, its whole call."""

LEVELS: tuple[Level, ...] = get_args(Level)

GIB = 2**30

# CUDA's own context and the libraries' work space, before anything is allocated.
CUDA_CONTEXT = GIB // 2
# What is left free for fragmentation and for what the estimate does not see.
RESERVE = 0.08


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
        context = CUDA_CONTEXT if self.device_type == "cuda" else 0
        return int((self.bytes - context) * (1.0 - RESERVE))


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to need.

    Args:
        parts: Bytes by part at the moment of the peak.
        flops: Operations of one step of one process.
        floor: The same with nothing computed twice.
    """

    parts: Mapping[str, int]
    flops: float
    floor: float

    @property
    def peak(self) -> int:
        """Return the bytes at the peak."""
        return sum(self.parts.values())


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


def estimate(
    footprint: Footprint,
    config: Config,
    *,
    micro_batch: int,
    accumulation: int,
    network: Level,
    decoder: bool,
    reward: bool,
) -> Estimate:
    """Return the peak memory and the operations of one step of one process.

    The peak is the largest of: a call of the roll-out; decoding, scoring, and going back through
    both, with all calls of the longest window stored; going back through one call of it.

    Args:
        footprint: What the parts need.
        config: For T, the estimator and the optimiser.
        micro_batch: Images at once.
        accumulation: Micro-batches in a step.
        network: What of the network is computed again.
        decoder: Whether the decoder's blocks are.
        reward: Whether the reward's blocks are.
    """
    steps = config.sample.num_inference_steps
    longest = longest_window(config.gradient, steps)
    first, call = footprint.first[network], footprint.call[network]
    images, scores = footprint.decoder[decoder], footprint.reward[reward]
    m = micro_batch

    stored = first.saved(m) + (longest - 1) * call.saved(m)
    before_last = stored - (call if longest > 1 else first).saved(m)
    last = call if longest > 1 else first
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
    phase = max(phases.values(), key=lambda parts: sum(parts.values()))
    # float32 weights, gradients and AdamW's two moments.
    parts = {**footprint.weights, "LoRA and optimiser": 16 * footprint.trained, **phase}

    def operations(level: Level, again_decoder: bool, again_reward: bool) -> float:
        mean = mean_window(config.gradient, steps)
        one, more = footprint.first[level], footprint.call[level]
        back = one.backward_flops(m) + (mean - 1.0) * more.backward_flops(m)
        tail = (footprint.decoder[again_decoder], footprint.reward[again_reward])
        rest = sum(part.forward_flops(m) + part.backward_flops(m) for part in tail)
        return accumulation * (steps * footprint.rollout.forward_flops(m) + back + rest)

    return Estimate(
        parts={name: math.ceil(size) for name, size in parts.items()},
        flops=operations(network, decoder, reward),
        floor=operations("none", False, False),
    )
