"""How a global batch is worked through: three batch sizes and what is recomputed in backward.

A plan decides how fast and in how much memory a step runs, never what it computes. choose.py
chooses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from alignprop_cli.estimators import Estimator, GradPath
from alignprop_cli.planning.chain import Chain
from alignprop_cli.planning.estimate import GIB, Division, Estimate, Level

Auto = Literal["auto"]

# How much longer than the mean a process may be expected to work before groups are divided.
_MOST_WAITING = 1.3


def whole_groups(
    estimator: Estimator, num_inference_steps: int, groups: int, processes: int
) -> bool:
    """Return whether each process works on whole groups of images instead of a part of every group.

    Whole groups keep the batches of one process, and with them its rounding: adapters of several
    processes then differ by the order of a few sums alone. But a group with a long path takes
    longer. With two groups or more for each process the long ones are dealt out evenly; with one,
    all wait for the longest.

    Args:
        estimator: Draws the paths of the groups.
        num_inference_steps: T, network calls of one chain.
        groups: Groups of one step over all processes.
        processes: Number of processes.
    """
    if groups % processes:
        return False
    # Going back through a call costs 1.3 times the call (docs/estimators.md).
    longest = num_inference_steps + 1.3 * estimator.longest(num_inference_steps)
    mean = num_inference_steps + 1.3 * estimator.mean(num_inference_steps)
    return groups >= 2 * processes or longest <= _MOST_WAITING * mean


@dataclass(frozen=True)
class PlanRequest(Chain):
    """What a plan is needed for, and which parts of it the user has fixed.

    Args:
        batch_size: Images of one step over all processes.
        processes: Number of processes that work on one step.
        rollout_batch: As in `Plan`; `auto` leaves it to the plan, here and below.
        micro_batch: As in `Plan`.
        decode_batch: As in `Plan`; more than the micro-batch means the whole micro-batch.
        checkpoint_network: As in `Plan`.
        checkpoint_decoder: As in `Plan`.
        checkpoint_reward: As in `Plan`.
        group: Images of the batch whose calls with gradient are the same; None: all of them.
        advice: What the user can change, by the part of the estimate that gets smaller by it.
    """

    batch_size: int
    processes: int
    rollout_batch: int | Auto = "auto"
    micro_batch: int | Auto = "auto"
    decode_batch: int | Auto = "auto"
    checkpoint_network: Level | Auto = "auto"
    checkpoint_decoder: bool | Auto = "auto"
    checkpoint_reward: bool | Auto = "auto"
    group: int | None = None
    advice: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def share(self) -> int:
        """Return the images of one step in one process."""
        return self.batch_size // self.processes

    @property
    def groups(self) -> int:
        """Return the groups that one process has images of: whole ones, or a part of every one."""
        groups = self.batch_size // (self.group or self.batch_size)
        whole = whole_groups(self.estimator, self.num_inference_steps, groups, self.processes)
        return groups // self.processes if whole else groups

    @property
    def together(self) -> int:
        """Return the largest number of images of one path in one process: they go back together."""
        return math.ceil(self.share / self.groups)

    @property
    def is_open(self) -> bool:
        """Return whether there is a choice that needs a footprint.

        The roll-out's and the decoder's batch need none: they can take the whole micro-batch.
        """
        network = (self.checkpoint_network, self.checkpoint_decoder, self.checkpoint_reward)
        return "auto" in (self.micro_batch, *network)


@dataclass(frozen=True)
class Plan(Division):
    """What one optimiser step does.

    Args:
        batch_size: Images of one step over all processes.
        processes: Number of processes; they have equal shares of the batch.
        groups: As in `PlanRequest`; no micro-batch has images of two, unless their paths are equal.
        estimate: What the step is expected to need; None where nothing was counted.
        seconds: What the step is expected to take; None where no pace of the device is known.
    """

    batch_size: int
    processes: int
    groups: int = 1
    estimate: Estimate | None = None
    seconds: float | None = None

    @property
    def share(self) -> int:
        """Return the images of one step in one process."""
        return self.batch_size // self.processes

    @property
    def accumulation(self) -> int:
        """Return the number of micro-batches of one step in one process.

        Where they do not divide the groups, it is less in steps that draw equal paths for two.
        """
        # As equal as they can be: some groups have one image more in this process than others.
        images, larger = divmod(self.share, self.groups)
        return larger * math.ceil((images + 1) / self.micro_batch) + (
            self.groups - larger
        ) * math.ceil(images / self.micro_batch)

    @property
    def images_per_hour(self) -> float | None:
        """Return the images of all processes in an hour; None where `seconds` is."""
        return None if self.seconds is None else 3600.0 * self.batch_size / self.seconds

    def recomputed_calls(self, path: GradPath) -> tuple[int, ...]:
        """Return the calls of a path that are recomputed as a whole: all but the stored ones."""
        if self.checkpoint_network != "call":
            return ()
        # Copies are one call that is made several times: all of them are stored, or none.
        if path.copies:
            return path.calls if self.stored_calls < len(path) else ()
        return path.calls[: max(len(path.calls) - self.stored_calls, 0)]

    @property
    def can_be_halved(self) -> bool:
        """Return whether smaller batches are left to try when memory ran out."""
        # Several processes would have to do it together, and one cannot tell the others.
        batches = self.rollout_batch, self.micro_batch, self.decode_batch
        return self.processes == 1 and max(batches) > 1

    def halved(self) -> Plan:
        """Return the plan with half of each batch size, rounded down; a ValueError if all are 1."""
        # All three, since the error does not say which of them needed too much.
        if max(self.rollout_batch, self.micro_batch, self.decode_batch) == 1:
            raise ValueError("batches of one image cannot be halved")
        return replace(
            self,
            rollout_batch=max(self.rollout_batch // 2, 1),
            micro_batch=max(self.micro_batch // 2, 1),
            decode_batch=max(self.decode_batch // 2, 1),
            estimate=None,
            seconds=None,
        )

    def describe(self) -> str:
        """Return the plan in one line for people."""
        # 1. The batches; the roll-out's and the decoder's only where they are not the micro-batch.
        text = f"{self.batch_size} images a step = "
        text += f"{self.processes} processes x " if self.processes > 1 else ""
        uneven = self.accumulation * self.micro_batch != self.share
        text += "up to " if uneven and self.groups > 1 else ""
        text += f"{self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''} of "
        text += "at most " if uneven else ""
        text += f"{self.micro_batch}"
        parts = [f"roll-out by {self.rollout_batch}"] * (self.rollout_batch != self.micro_batch)
        parts += [f"decoder by {self.decode_batch}"] * (self.decode_batch != self.micro_batch)
        text += f" ({', '.join(parts)})" if parts else ""

        # 2. What is recomputed.
        calls = "the network's calls"
        calls += f" but the last {self.stored_calls}" if self.stored_calls else ""
        network = {"none": [], "block": ["the network by block"], "call": [calls]}
        recomputed = network[self.checkpoint_network]
        recomputed += ["decoder"] * self.checkpoint_decoder + ["reward"] * self.checkpoint_reward
        text += f"; recomputed in backward: {', '.join(recomputed) or 'nothing'}"
        if self.estimate is not None:
            text += f"; about {self.estimate.peak / GIB:.2f} GiB"
        if self.images_per_hour is not None:
            text += f", {self.images_per_hour:,.0f} images an hour"
        return text
