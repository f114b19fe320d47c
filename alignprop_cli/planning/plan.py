"""How a global batch is worked through: three batch sizes and what backward recomputes.

A plan changes how fast and in how much memory a step runs, never what it computes. Among the plans
that fit the memory the one with the fewest operations is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

from alignprop_cli.errors import ConfigError, Problem, RunError
from alignprop_cli.estimators import GradPath
from alignprop_cli.planning.estimate import (
    GIB,
    NOTHING_RECOMPUTED,
    UNCORRECTED,
    Budget,
    Chain,
    Correction,
    Division,
    Estimate,
    Footprint,
    Level,
    estimate,
    operations,
    peak_parts,
)

Auto = Literal["auto"]

# Beyond this nothing gets faster on a CPU. An H200 is still 1.19 x as fast an image at 16 as at 8;
# larger batches were not tried.
_LARGEST = {"cuda": 16, "cpu": 8}
# Where the roll-out is worth a larger batch than the calls with gradient, whose memory bounds it.
_LARGEST_ROLLOUT = {"cuda": 16}


@dataclass(frozen=True)
class PlanRequest(Chain):
    """What a plan is wanted for, and what of it is given.

    Args:
        batch_size: Images of one step over all processes.
        processes: Number of processes that work on one step.
        rollout_batch: As in `Plan`, and so are the others; `auto` is to be chosen.
        micro_batch: In images.
        decode_batch: In images; more than the micro-batch means all of it.
        checkpoint_network: What backward recomputes.
        checkpoint_decoder: Likewise.
        checkpoint_reward: Likewise.
        group: Images of the batch whose calls with gradient are the same, and so can go together;
            None: all of them.
        advice: What the user can change, by the part of the estimate that it makes smaller.
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
    def is_open(self) -> bool:
        """Return whether there is a choice that needs a footprint.

        Without one, the roll-out and the decoder take the whole micro-batch.
        """
        network = (self.checkpoint_network, self.checkpoint_decoder, self.checkpoint_reward)
        return "auto" in (self.micro_batch, *network)


@dataclass(frozen=True)
class Plan(Division):
    """What one optimiser step does.

    Args:
        batch_size: Images of one step over all processes.
        processes: Number of processes; they have equal shares of the batch.
        estimate: What it is expected to need; None where nothing was counted.
    """

    batch_size: int
    processes: int
    estimate: Estimate | None = None

    @property
    def share(self) -> int:
        """Return the images of one step in one process."""
        return self.batch_size // self.processes

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of one step in one process."""
        return math.ceil(self.share / self.micro_batch)

    def recomputed_calls(self, path: GradPath) -> tuple[int, ...]:
        """Return the calls of a path that backward recomputes as a whole."""
        if self.checkpoint_network != "call":
            return ()
        return path.calls[: max(len(path.calls) - self.stored_calls, 0)]

    def halved(self) -> Plan:
        """Return the plan with half of each batch size, rounded down, for when memory ran out.

        Raises:
            ValueError: If all three are 1.
        """
        # All three, since it is not known which of them needed too much.
        if max(self.rollout_batch, self.micro_batch, self.decode_batch) == 1:
            raise ValueError("batches of one image cannot be halved")
        return replace(
            self,
            rollout_batch=max(self.rollout_batch // 2, 1),
            micro_batch=max(self.micro_batch // 2, 1),
            decode_batch=max(self.decode_batch // 2, 1),
            estimate=None,
        )

    def describe(self) -> str:
        """Return the plan in one line for people."""
        # 1. The batches; those that are as large as the micro-batch go without saying.
        text = f"{self.batch_size} images a step = "
        text += f"{self.processes} processes x " if self.processes > 1 else ""
        text += f"{self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''} of "
        text += "at most " if self.share % self.micro_batch else ""
        text += f"{self.micro_batch}"
        parts = [f"roll-out by {self.rollout_batch}"] * (self.rollout_batch != self.micro_batch)
        parts += [f"decoder by {self.decode_batch}"] * (self.decode_batch != self.micro_batch)
        text += f" ({', '.join(parts)})" if parts else ""

        # 2. What is recomputed.
        calls = "the network's calls"
        calls += f" but the last {self.stored_calls}" if self.stored_calls else ""
        network = {"none": [], "block": ["the network by block"], "call": [calls]}
        again = network[self.checkpoint_network]
        again += ["decoder"] * self.checkpoint_decoder + ["reward"] * self.checkpoint_reward
        text += f"; recomputed in backward: {', '.join(again) or 'nothing'}"
        if self.estimate is not None:
            text += f"; about {self.estimate.peak / GIB:.2f} GiB"
        return text


def make_plan(
    request: PlanRequest,
    *,
    footprint: Footprint | None = None,
    budget: Budget | None = None,
    correction: Correction = UNCORRECTED,
    below: float = math.inf,
) -> Plan:
    """Choose what the request leaves open.

    Operations count first. Of plans that differ by less than a hundredth in them, the one with the
    largest micro-batch is taken. The roll-out's and the decoder's batch then take what memory is
    left, so that neither makes anything be recomputed.

    Args:
        request: What is wanted.
        footprint: What the parts need; None only where nothing is left to choose.
        budget: The memory of a process; None is without limit.
        correction: What was measured of such estimates on the device.
        below: An estimate, in bytes, at which memory ran out on the device.

    Raises:
        ConfigError: If the batch cannot be divided; names numbers that would do.
        RunError: If no plan fits the budget; names the smallest that would do.
        ValueError: If something is to be chosen and there is no footprint.
    """
    _check(request)
    device_type = budget.device_type if budget else "cpu"
    if footprint is None:
        if request.is_open:
            raise ValueError("there is a choice of plans and no footprint to choose by")
        (micro,) = _micro_batches(request, device_type)
        plan = _with_micro_batch(next(_choices(request)), request, micro, device_type)
        return replace(plan, decode_batch=_decode_batches(request, micro)[0])

    search = _Search(request, footprint, device_type, budget, correction, below)
    best = search.least_work()
    if best is None:
        assert budget is not None
        raise _too_small(search.with_estimate(search.smallest()), request, budget)
    return search.with_estimate(search.enlarged(best))


@dataclass(frozen=True)
class _Search:
    """The plans that a request allows, and which of them fit; fields are those of `make_plan`."""

    request: PlanRequest
    footprint: Footprint
    device_type: str
    budget: Budget | None
    correction: Correction
    below: float

    def peak(self, plan: Plan) -> int:
        return sum(peak_parts(self.footprint, self.request, plan, plan.share).values())

    def fits(self, plan: Plan) -> bool:
        size, usable = self.peak(plan), math.inf if self.budget is None else self.budget.usable
        return size < self.below and self.correction(size) <= usable

    def least_work(self) -> Plan | None:
        """Return the plan with the fewest operations that fits, None where none does."""
        # 1. Every choice of what is recomputed, with the largest micro-batch that fits beside the
        # smallest roll-out and decoder batch. Batches do not change the work.
        found: list[tuple[float, Plan]] = []
        floor = operations(self.footprint, self.request, NOTHING_RECOMPUTED)
        for choice in _choices(self.request):
            plans = (
                _with_micro_batch(choice, self.request, micro, self.device_type)
                for micro in _micro_batches(self.request, self.device_type)
            )
            # Smallest first, since most choices hold few images or none.
            fitting = list(takewhile(self.fits, plans))
            if fitting:
                work = operations(self.footprint, self.request, choice) / floor
                found.append((work, fitting[-1]))

        # 2. Rounded first, since a few operations do not outweigh a larger micro-batch; then to the
        # last one, then the least memory.
        def rank(pair: tuple[float, Plan]) -> tuple[int, int, float, int]:
            work, plan = pair
            return round(100.0 * work), -plan.micro_batch, work, self.peak(plan)

        return min(found, key=rank)[1] if found else None

    def enlarged(self, plan: Plan) -> Plan:
        """Return the plan with the largest roll-out and decoder batch that fit beside the rest."""
        for name, sizes in (
            ("rollout_batch", _rollout_batches(self.request, plan.micro_batch, self.device_type)),
            ("decode_batch", _decode_batches(self.request, plan.micro_batch)),
        ):
            larger = (replace(plan, **{name: size}) for size in sizes)
            plan = next(filter(self.fits, larger), plan)
        return plan

    def smallest(self) -> Plan:
        """Return the plan that needs the least memory."""
        micro = _micro_batches(self.request, self.device_type)[0]
        return min(
            (
                _with_micro_batch(c, self.request, micro, self.device_type)
                for c in _choices(self.request)
            ),
            key=self.peak,
        )

    def with_estimate(self, plan: Plan) -> Plan:
        expected = estimate(
            self.footprint, self.request, plan, images=plan.share, correction=self.correction
        )
        return replace(plan, estimate=expected)


def _choices(request: PlanRequest) -> Iterator[Plan]:
    """Yield a plan of the smallest batches for all that may be recomputed."""

    def either(value: bool | Auto) -> tuple[bool, ...]:
        return (False, True) if value == "auto" else (value,)

    wanted = request.checkpoint_network
    # Storing all calls is the level `none`, so of those recomputed one at least is not stored.
    longest = request.estimator.longest(request.num_inference_steps)
    networks: list[tuple[Level, int]] = [("none", 0), ("block", 0)]
    networks.extend(("call", kept) for kept in range(longest))
    if wanted != "auto":
        networks = [(wanted, 0)]
    for network, kept in networks:
        for decoder in either(request.checkpoint_decoder):
            for reward in either(request.checkpoint_reward):
                yield Plan(
                    batch_size=request.batch_size,
                    processes=request.processes,
                    rollout_batch=1,
                    micro_batch=1,
                    decode_batch=1,
                    checkpoint_network=network,
                    stored_calls=kept,
                    checkpoint_decoder=decoder,
                    checkpoint_reward=reward,
                )


def _with_micro_batch(choice: Plan, request: PlanRequest, micro: int, device_type: str) -> Plan:
    """Return a choice with a micro-batch, and the smallest other batches that go with it."""
    return replace(
        choice,
        rollout_batch=_rollout_batches(request, micro, device_type)[-1],
        micro_batch=micro,
        decode_batch=_decode_batches(request, micro)[-1],
    )


def _micro_batches(request: PlanRequest, device_type: str) -> list[int]:
    """Return the micro-batches to choose from, smallest first."""
    # Only images of one path go back together.
    together = math.ceil((request.group or request.batch_size) / request.processes)
    if request.micro_batch != "auto":
        return [min(request.micro_batch, together)]
    limit = min(_LARGEST.get(device_type, 1), together)
    return [m for m in _divisors(request.share)[::-1] if m <= limit]


def _rollout_batches(request: PlanRequest, micro: int, device_type: str) -> list[int]:
    """Return the roll-out's batches to choose from, largest first: whole micro-batches."""
    if request.rollout_batch != "auto":
        return [request.rollout_batch]
    # A part of a micro-batch would leave a small one over after every roll-out.
    limit = min(request.share, _LARGEST_ROLLOUT.get(device_type, 0))
    return list(range(micro, limit + 1, micro))[::-1] or [micro]


def _decode_batches(request: PlanRequest, micro: int) -> list[int]:
    """Return the decoder's batches to choose from, largest first."""
    if request.decode_batch != "auto":
        return [min(request.decode_batch, micro)]
    # Equal parts: a smaller last one would save no memory and cost a decoding of its own.
    return _divisors(micro)


def _divisors(number: int) -> list[int]:
    return [d for d in range(number, 0, -1) if number % d == 0]


def _check(request: PlanRequest) -> None:
    """Refuse a batch that the processes cannot share, and batches larger than a share.

    Raises:
        ConfigError: With numbers that would do.
    """
    size, processes, share = request.batch_size, request.processes, request.share
    problems = list[Problem]()
    if size % processes:
        nearest = max(processes, round(size / processes) * processes)
        message = f"{size} is not a multiple of {processes} processes; nearest that is: {nearest}"
        raise ConfigError("the batch cannot be divided", [Problem("train.batch_size", message)])
    for name in ("rollout_batch", "micro_batch", "decode_batch"):
        wanted: int | Auto = getattr(request, name)
        if wanted != "auto" and wanted > share:
            message = (
                f"{wanted} is more than the {share} images of a process (train.batch_size {size}, "
                f"processes: {processes}); at most {share}"
            )
            problems.append(Problem(f"train.{name}", message))
    if problems:
        raise ConfigError("the batch cannot be divided", problems)


def _too_small(smallest: Plan, request: PlanRequest, budget: Budget) -> RunError:
    """Say how much memory would do, where it goes, and what to change."""
    assert smallest.estimate is not None
    needed = budget.least(smallest.estimate.peak)
    largest = sorted(smallest.estimate.parts.items(), key=lambda item: -item[1])[:3]
    where = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in largest)

    # What was given and would be smaller if it were left to the plan; then what else would help.
    given = {
        "train.micro_batch": request.micro_batch not in ("auto", 1),
        "train.decode_batch": request.decode_batch not in ("auto", 1),
        "gradient.checkpoint_network": request.checkpoint_network in ("none", "block"),
        "gradient.checkpoint_decoder": request.checkpoint_decoder is False,
        "gradient.checkpoint_reward": request.checkpoint_reward is False,
    }
    advice = [f"{key}: auto" for key, is_large in given.items() if is_large]
    advice += [request.advice[name] for name, _ in largest if name in request.advice]
    advice.append("a smaller sample.height and width")
    return RunError(
        f"no plan fits {budget.bytes / GIB:.2f} GiB ({budget.source}): the smallest needs "
        f"{needed / GIB:.2f} GiB, most of it for {where}",
        hint=f"try {', '.join(advice)}",
    )
