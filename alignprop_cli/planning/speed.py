"""How long a step takes: from the pace of its four parts, measured on a card or assumed for one.

On a GPU a small batch takes as long as it takes to launch its kernels, whatever they compute. So a
part takes max(launch, images x each), and fewer operations are not always less time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.planning.chain import Chain
from alignprop_cli.planning.estimate import GIB, Footprint
from alignprop_cli.planning.plan import Plan
from alignprop_cli.planning.work import Work


@dataclass(frozen=True)
class Pace:
    """Seconds of one part of a step as a function of its batch.

    Args:
        launch: The least that it takes, for any batch.
        each: For each image, where that is more.
    """

    launch: float
    each: float

    def __call__(self, images: float) -> float:
        """Return the seconds for a batch of this many images."""
        return max(self.launch, images * self.each) if images else 0.0


@dataclass(frozen=True)
class Times:
    """The pace of the parts of a step.

    Args:
        rollout: A network call without gradient.
        call: A network call with gradient, forward and backward, nothing recomputed.
        decoder: From latents to images and back, nothing recomputed.
        reward: From images to the loss and back, nothing recomputed.
        source: Where the numbers come from, for people.
        replayed: A network call without gradient that is replayed from a recording, which launches
            nothing by itself; None where none is.
    """

    rollout: Pace
    call: Pace
    decoder: Pace
    reward: Pace
    source: str
    replayed: Pace | None = None


PARTS = ("rollout", "call", "decoder", "reward")
"""The parts of a step that are timed."""


@dataclass(frozen=True)
class Card:
    """A graphics card as its maker describes it.

    Args:
        memory: GiB.
        rate: Matrix operations per second in bfloat16, dense, summed in float32, in TFLOP/s.
        bandwidth: Of its memory, in GB/s.
    """

    memory: int
    rate: float
    bandwidth: float


# Source: NVIDIA's data sheets, and for GeForce cards the whitepapers of their architectures.
CARDS: Mapping[str, Card] = {
    "rtx3060": Card(12, 25.5, 360),
    "rtx3090": Card(24, 71, 936),
    "rtx4070": Card(12, 58.3, 504),
    "rtx4080": Card(16, 97.5, 717),
    "rtx4090": Card(24, 165.2, 1008),
    "rtx5090": Card(32, 209.5, 1792),
    "l4": Card(24, 121, 300),
    "l40s": Card(48, 362, 864),
    "a100": Card(80, 312, 2039),
    "h100": Card(80, 989.4, 3350),
    "h200": Card(141, 989.4, 4800),
}
"""Cards whose speed is assumed in a dry run."""

# The card that is assumed for a memory: the first that has it.
_BY_MEMORY = ("rtx3060", "rtx4080", "rtx4090", "rtx5090", "l40s", "a100", "h200")

# Measured on an H200 with its 16-core host: a roll-out call of SD 1.5 with a LoRA launches 1,534
# operators in 63 ms, and 16 images in a batch take 9.3 ms each for 1.61 TFLOP. In the profile 40 %
# of that is matrix work, at 0.44 of the card's rate; the rest reads and writes memory: 16.7 bytes
# for 1,000 operations. Predicted from these for an RTX 4090: 49 ms an image.
_LAUNCH = 63.3e-3 / 1534
_SHARE_OF_RATE = 0.44
_BYTES_PER_OPERATION = 0.0167


def find_card(name: str) -> str:
    """Return the name of a card in `CARDS`, however it is written: RTX 4090, rtx-4090.

    Raises:
        ConfigError: If there is none.
    """
    found = re.sub(r"[^a-z0-9]|nvidia|geforce", "", name.lower())
    if found not in CARDS:
        raise ConfigError(f"--gpu: unknown card '{name}'.{did_you_mean(found, CARDS)}")
    return found


def card_for(memory: int) -> str:
    """Return the name of the card that is assumed where only its memory (bytes) is known."""
    return next((n for n in _BY_MEMORY if CARDS[n].memory * GIB >= memory), _BY_MEMORY[-1])


def assumed(footprint: Footprint, name: str) -> Times:
    """Return the times of a card that is not here.

    Args:
        footprint: What the parts of a step need.
        name: One of `CARDS`.
    """
    card = CARDS[name]
    per_operation = 1.0 / (_SHARE_OF_RATE * card.rate * 1e12)
    per_operation += _BYTES_PER_OPERATION / (card.bandwidth * 1e9)

    def pace(work: Work) -> Pace:
        return Pace(_LAUNCH * work.launches, per_operation * work.flops)

    return Times(
        rollout=pace(footprint.rollout),
        call=pace(footprint.call["none"]),
        decoder=pace(footprint.decoder[False]),
        reward=pace(footprint.reward[False]),
        source=f"assumed for one {name}",
    )


def step_seconds(
    times: Times, footprint: Footprint, chain: Chain, division: Plan, images: int
) -> float:
    """Return the expected seconds of one step of one process, over the estimator's draws.

    Args:
        times: The pace of the parts.
        footprint: Says how much recomputation adds to decoder and reward.
        chain: What each image goes through.
        division: How the images are worked through.
        images: Images of one step in one process.
    """
    # 1. Calls without gradient: those before the path by `rollout_batch`, those on it with the
    #    micro-batch.
    with_grad, plain = chain.mean, times.replayed or times.rollout
    micro = _micro_batches(division, images)
    total = chain.rolled_out * _batches(plain, division.rollout_batch, images)
    total += chain.between * _sum(times.rollout, micro)

    # 2. Calls with gradient, by `micro_batch`. A block or a call that is recomputed runs forward
    #    once more; what is left over from calls is stored.
    again = with_grad if division.checkpoint_network != "none" else 0.0
    if division.checkpoint_network == "call":
        again -= chain.stored(division.stored_calls) if division.stored_calls else 0.0
    total += with_grad * _sum(times.call, micro)
    total += (again + chain.base_calls) * _sum(times.rollout, micro)

    # 3. The tail, by `decode_batch`, of every clean latents of a micro-batch.
    for pace, works, recompute in (
        (times.decoder, footprint.decoder, division.checkpoint_decoder),
        (times.reward, footprint.reward, division.checkpoint_reward),
    ):
        more = works[recompute].flops / works[False].flops if works[False].flops else 1.0
        for size, number in micro.items():
            total += more * number * _batches(pace, division.decode_batch, size * chain.ends)
    return total


def _micro_batches(plan: Plan, images: int) -> Counter[int]:
    """Return how many micro-batches there are of each size: none has images of two groups."""
    found: Counter[int] = Counter()
    # As equal as they can be: some groups have one image more in this process than others.
    each, larger = divmod(images, plan.groups)
    for size, groups in ((each + 1, larger), (each, plan.groups - larger)):
        whole, rest = divmod(size, plan.micro_batch)
        found[plan.micro_batch] += groups * whole
        found[rest] += groups
    return found


def _sum(pace: Pace, batches: Mapping[int, int]) -> float:
    """Return the seconds of so many batches of each size."""
    return sum(number * pace(size) for size, number in batches.items())


def _batches(pace: Pace, size: int, images: int) -> float:
    """Return the seconds of all images in batches of this size; the last may be smaller."""
    whole, rest = divmod(images, size)
    return whole * pace(size) + pace(rest)
