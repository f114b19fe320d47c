"""The memory and the operations that a step is expected to need, put together from its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from alignprop_cli.planning.chain import Chain
from alignprop_cli.planning.work import NO_WORK, Work

Part = Literal["network", "decoder", "reward"]
"""What a footprint is put together from, each counted without the others."""

Level = Literal["none", "block", "call"]
"""What is recomputed of the network in backward: nothing, its blocks, or whole calls."""

GIB = 2**30

# Memory outside any tensor: CUDA's context, and what libraries load in the first step.
_CONTEXT = {"cuda": GIB // 2, "cpu": GIB // 4}
# The share that is left free, for gaps between tensors and whatever the estimate does not see. On
# the CPU glibc leaves larger gaps: tests/benchmarks/results/heap_epyc-2-cores_202611.md.
_RESERVE, _CPU_RESERVE = 0.08, 0.25


@dataclass(frozen=True)
class Footprint:
    """What the parts of a step need.

    Args:
        weights: Bytes of frozen weights, by part.
        trained: Number of LoRA parameters.
        latents: Bytes of one image's latents.
        rollout: A network call without gradient, both guidance branches.
        first: A network call with gradient whose input carries none, by level: the first call of a
            path, or every call where the estimator detaches their input.
        call: A network call with gradient whose input carries gradient, by level.
        decoder: From latents to the images that are rewarded, by whether its blocks are recomputed.
        reward: From images to the loss, by whether its blocks are recomputed.
        uncounted: Names of the rewards whose need is unknown.
        sampling_decoder: From latents to samples, without gradient; None takes `decoder`.
        trained_each: Bytes of each LoRA parameter, its gradient and optimiser: with AdamW 4 x 4.
        embeddings: Bytes of one image's prompt embeddings, both guidance branches.
    """

    weights: Mapping[str, int]
    trained: int
    latents: int
    rollout: Work
    first: Mapping[Level, Work]
    call: Mapping[Level, Work]
    decoder: Mapping[bool, Work]
    reward: Mapping[bool, Work]
    uncounted: tuple[str, ...] = ()
    sampling_decoder: Work | None = None
    trained_each: float = 16.0
    embeddings: int = 0


NOTHING = Footprint(
    weights={}, trained=0, latents=0, rollout=NO_WORK, first={}, call={}, decoder={}, reward={}
)
"""Before any part is counted."""


@dataclass(frozen=True)
class Budget:
    """The memory of one process.

    Args:
        bytes: The memory that may be used.
        device_type: `cuda`, `cpu`, ...
        source: Where the number comes from, for people.
        has_context: Whether the memory outside any tensor is taken off already, as it is where a
            driver says what is free.
    """

    bytes: int
    device_type: str
    source: str
    has_context: bool = False

    @property
    def usable(self) -> int:
        """Return the largest estimate, in bytes, that fits."""
        return int((self.bytes - self._context) * (1.0 - self._reserve))

    def least(self, peak: int) -> int:
        """Return the smallest budget, in bytes, that an estimate would fit: `usable` inverted."""
        return math.ceil(peak / (1.0 - self._reserve)) + self._context

    @property
    def _context(self) -> int:
        return 0 if self.has_context else _CONTEXT.get(self.device_type, 0)

    @property
    def _reserve(self) -> float:
        return _CPU_RESERVE if self.device_type == "cpu" else _RESERVE


@dataclass(frozen=True)
class Correction:
    """The line from estimated to measured bytes: fixed + factor x estimate."""

    fixed: float = 0.0
    factor: float = 1.0

    def __call__(self, size: float) -> float:
        """Return the bytes that a device is expected to need for this estimate."""
        return self.fixed + self.factor * size

    @staticmethod
    def through(points: Sequence[tuple[float, float]]) -> Correction:
        """Return the line through one or two points (estimated, measured).

        One point alone, or two points on a falling line, give a line of slope 1 through the point
        that needs most beyond its estimate.
        """
        if len(points) == 2 and points[0][0] != points[1][0]:
            (x, y), (other_x, other_y) = points
            factor = (y - other_y) / (x - other_x)
            if factor > 0.0:
                return Correction(y - factor * x, factor)
        return Correction(max(y - x for x, y in points))


UNCORRECTED = Correction()

# On an H200 the peaks of SD 1.5 were 3.4 to 4.6 % above the estimates, for every plan.
_EXPECTED = {"cuda": Correction(factor=1.04)}


def expected_correction(device_type: str) -> Correction:
    """Return the correction of estimates before anything was measured on a device."""
    return _EXPECTED.get(device_type, UNCORRECTED)


@dataclass(frozen=True, kw_only=True)
class Division:
    """How one process works through its images: three batch sizes and what is recomputed.

    Args:
        rollout_batch: Images rolled out together, without gradient.
        micro_batch: Images that go through the calls with gradient, and back, together. The last
            micro-batch may be smaller.
        decode_batch: Images decoded, scored and differentiated together; at most `micro_batch`.
        checkpoint_network: What is recomputed of each network call with gradient.
        stored_calls: With the level `call`: how many calls, counted from the last, are stored
            instead of recomputed.
        checkpoint_decoder: Whether the decoder's blocks are recomputed.
        checkpoint_reward: Whether the blocks of the rewards' networks are recomputed.
    """

    rollout_batch: int
    micro_batch: int
    decode_batch: int
    checkpoint_network: Level = "none"
    stored_calls: int = 0
    checkpoint_decoder: bool = False
    checkpoint_reward: bool = False


NOTHING_RECOMPUTED = Division(rollout_batch=1, micro_batch=1, decode_batch=1)


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to need.

    Args:
        parts: Bytes by part at the moment of the peak.
        flops: Operations of one step of one process.
        floor: Operations of the same step with nothing recomputed.
        correction: From the sum of the parts to what was measured.
    """

    parts: Mapping[str, int]
    flops: float
    floor: float
    correction: Correction = UNCORRECTED

    @property
    def uncorrected(self) -> int:
        """Return the estimated bytes at the peak, without the correction."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """Return the bytes at the peak, corrected by what was measured."""
        return math.ceil(self.correction(self.uncorrected))


def estimate(
    footprint: Footprint,
    chain: Chain,
    division: Division,
    *,
    images: int,
    correction: Correction = UNCORRECTED,
) -> Estimate:
    """Return the peak memory and the operations of one step of one process.

    Args:
        footprint: What the parts need.
        chain: What each image goes through.
        division: How the images are worked through.
        images: Images of one step in one process.
        correction: From such estimates to what was measured on the device.
    """
    return Estimate(
        parts=peak_parts(footprint, chain, division, images),
        flops=images * operations(footprint, chain, division),
        floor=images * operations(footprint, chain, NOTHING_RECOMPUTED),
        correction=correction,
    )


def peak_parts(
    footprint: Footprint, chain: Chain, division: Division, images: int
) -> dict[str, int]:
    """Return the bytes by part at the moment of the peak.

    All images are rolled out first, by `rollout_batch`. Each micro-batch then goes through the
    calls with gradient, which are stored; its clean latents are decoded, scored and differentiated
    by `decode_batch`; last it goes back through the calls. The peak is the largest of these.
    """
    m, d = division.micro_batch, division.decode_batch
    decoder = footprint.decoder[division.checkpoint_decoder]
    reward = footprint.reward[division.checkpoint_reward]
    # Every step may draw the longest path, so memory is planned for that one.
    window = _Window(footprint, chain, division)
    longest = chain.longest

    stored, before_last = window.stored(longest), window.stored(longest - 1)
    last = window.call(longest - 1)
    # Each moment that can be the peak, with what lives then besides the parts that always do. A
    # call's own activations are part of its `forward` and `backward`, so "before_last" goes there.
    phases = {
        "roll-out": {"roll-out": footprint.rollout.forward(division.rollout_batch)},
        "last call": {"stored calls": before_last, "network": last.forward(m)},
        "decode": {"stored calls": stored, "decoder": decoder.forward(d)},
        "score": {
            "stored calls": stored,
            "decoder": decoder.saved(d),
            "reward": max(reward.forward(d), reward.backward(d)),
        },
        "decoder back": {"stored calls": stored, "decoder": decoder.backward(d)},
        "network back": {"stored calls": before_last, "network": last.backward(m)},
    }
    if 0 < window.kept < longest:
        # Backward has reached the last of the recomputed calls; the stored ones are freed by then.
        i = longest - window.kept - 1
        phases["recomputed back"] = {
            "stored calls": window.stored(i),
            "network": window.call(i).backward(m),
        }
    # The embeddings of the images that are in the calls, which stay until they have gone back.
    for name, moment in phases.items():
        moment["embeddings"] = footprint.embeddings * (
            division.rollout_batch if name == "roll-out" else m
        )
    # The moments exclude each other, so the parts of the largest one alone are added.
    phase = max(phases.values(), key=lambda parts: sum(parts.values()))
    # What lives during the whole step, and the largest of the moments.
    parts = {
        **footprint.weights,
        "LoRA and optimiser": footprint.trained_each * footprint.trained,
        # Those of all images from the roll-out; the clean ones of a micro-batch and their gradient.
        # Where calls are compared with the base model's: input, prediction and difference of each.
        "latents": footprint.latents
        * (images + 2 * m * chain.ends + 3 * m * longest * chain.compares),
        **phase,
    }
    return {name: math.ceil(size) for name, size in parts.items()}


class _Window:
    """The calls of the longest path; the last `kept` of them are stored whatever the level."""

    def __init__(self, footprint: Footprint, chain: Chain, division: Division) -> None:
        self.level: Level = division.checkpoint_network
        self.images = division.micro_batch
        self.kept = min(division.stored_calls, chain.longest) if self.level == "call" else 0
        self.recomputed = chain.longest - self.kept
        self.first = footprint.first
        self.later = footprint.call if chain.is_attached else footprint.first

    def call(self, i: int) -> Work:
        """Return what call i of the path needs."""
        level: Level = "none" if i >= self.recomputed else self.level
        return self.later[level] if i else self.first[level]

    def stored(self, i: int) -> float:
        """Return the bytes that the calls before call i store."""
        if i == 0:
            return 0.0
        # The first call has a cost of its own; then come the recomputed ones, then the kept ones.
        recomputed = max(min(i, self.recomputed), 1)
        part = self.later[self.level].saved(self.images)
        whole = self.later["none"].saved(self.images)
        return self.call(0).saved(self.images) + (recomputed - 1) * part + (i - recomputed) * whole


def operations(footprint: Footprint, chain: Chain, division: Division) -> float:
    """Return the operations of one image, averaged over the estimator's draws.

    The batch sizes of the division make no difference, only what is recomputed does.
    """
    # 1. Backward through the calls with gradient. The first of them is cheaper, as its input needs
    #    no gradient; the stored ones are not recomputed.
    level, kept, mean = division.checkpoint_network, division.stored_calls, chain.mean
    first, later = footprint.first, footprint.call if chain.is_attached else footprint.first
    back = first[level].backward_flops + (mean - 1.0) * later[level].backward_flops
    if level == "call" and kept:
        back -= chain.stored(kept) * (later[level].backward_flops - later["none"].backward_flops)

    # 2. Decoder and reward, forward and backward, once per clean latents.
    decoder = footprint.decoder[division.checkpoint_decoder]
    reward = footprint.reward[division.checkpoint_reward]
    tail = decoder.flops + reward.flops
    calls = chain.calls + chain.base_calls
    return calls * footprint.rollout.forward_flops + back + chain.ends * tail
