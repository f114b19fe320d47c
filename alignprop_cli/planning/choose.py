"""Choose a plan: the fastest that fits the memory.

Where the pace of a device is known (speed.py), plans are compared by seconds. Otherwise, as on the
CPU, they are compared by operations: there nothing is lost in small batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from alignprop_cli.errors import ConfigError, Problem, RunError
from alignprop_cli.planning.estimate import (
    GIB,
    NOTHING_RECOMPUTED,
    UNCORRECTED,
    Budget,
    Correction,
    Footprint,
    Level,
    estimate,
    expected_correction,
    operations,
    peak_parts,
)
from alignprop_cli.planning.plan import Auto, Plan, PlanRequest
from alignprop_cli.planning.speed import Times, step_seconds

# The largest micro-batch worth trying. A CPU is no faster per image beyond 8. An H200 is 1.19 x as
# fast per image with 16 as with 8; larger batches were not measured.
_LARGEST = {"cuda": 16, "cpu": 8}
# The same for the roll-out, which stores nothing and so may have a larger batch than the calls with
# gradient. Not listed: it takes the micro-batch.
_LARGEST_ROLLOUT = {"cuda": 32}


def make_plan(
    request: PlanRequest,
    *,
    footprint: Footprint | None = None,
    budget: Budget | None = None,
    correction: Correction = UNCORRECTED,
    below: float = math.inf,
    times: Times | None = None,
) -> Plan:
    """Choose what the request leaves open.

    With `times` it is the plan that takes the fewest seconds, and of plans equal to within 1 % the
    one that needs the least memory.

    Without, the fewest operations come first. Among plans whose operations are equal to within 1 %,
    the largest micro-batch is taken. The roll-out's and the decoder's batch then fill what memory
    is left, so they are never the reason that something is recomputed.

    Args:
        request: What the plan is for, and what the user has fixed.
        footprint: What the parts of a step need; None only where nothing is left to choose.
        budget: The memory of one process; None is unlimited.
        correction: From estimates to what was measured on the device.
        below: Only plans with a smaller estimate, in bytes: at this one memory ran out.
        times: The pace of the device; None compares plans by operations.

    Raises:
        ConfigError: If the batch cannot be divided; names numbers that would do.
        RunError: If no plan fits the budget; names the memory that would do.
        ValueError: If there is something to choose and no footprint.
    """
    _check(request)
    device_type = budget.device_type if budget else "cpu"
    # 1. Nothing to choose: no footprint is needed, and no device has to be counted for.
    if footprint is None:
        if request.is_open:
            raise ValueError("there is a choice of plans and no footprint to choose by")
        (micro,) = _micro_batches(request, device_type)
        plan = _with_micro_batch(next(_choices(request)), request, micro, device_type)
        return replace(plan, decode_batch=_decode_batches(request, micro)[0])

    # 2. What is recomputed and the micro-batch; then the other two batches. If nothing fits, the
    #    error explains the smallest plan.
    search = _Search(request, footprint, device_type, budget, correction, below, times)
    best = search.least_work() if times is None else search.fastest(times)
    if best is None:
        assert budget is not None
        raise _too_small(search.with_estimate(search.smallest()), request, budget)
    return search.with_estimate(best)


def fits_at_all(request: PlanRequest, footprint: Footprint, budget: Budget) -> bool:
    """Return whether the smallest plan fits, before anything is measured on the device."""
    correction = expected_correction(budget.device_type)
    search = _Search(request, footprint, budget.device_type, budget, correction, math.inf)
    return search.fits(search.smallest())


@dataclass(frozen=True)
class _Search:
    """The plans that a request allows, and which of them fit; fields are those of `make_plan`."""

    request: PlanRequest
    footprint: Footprint
    device_type: str
    budget: Budget | None
    correction: Correction
    below: float
    times: Times | None = None

    def peak(self, plan: Plan) -> int:
        return sum(peak_parts(self.footprint, self.request, plan, plan.share).values())

    def fits(self, plan: Plan) -> bool:
        size, usable = self.peak(plan), math.inf if self.budget is None else self.budget.usable
        return size < self.below and self.correction(size) <= usable

    def least_work(self) -> Plan | None:
        """Return the plan with the fewest operations that fits, None where none does."""
        # 1. For every choice of what is recomputed, the largest micro-batch that fits together with
        #    the smallest roll-out and decoder batch. Batch sizes do not change the operations.
        found: list[tuple[float, Plan]] = []
        floor = operations(self.footprint, self.request, NOTHING_RECOMPUTED)
        for choice in _choices(self.request):
            plans = (
                _with_micro_batch(choice, self.request, micro, self.device_type)
                for micro in _micro_batches(self.request, self.device_type)
            )
            # Smallest first: `takewhile` then ends early, as most choices hold few images or none.
            fitting = list(takewhile(self.fits, plans))
            if fitting:
                work = operations(self.footprint, self.request, choice) / floor
                found.append((work, fitting[-1]))

        # 2. Operations rounded to 1 %, since a few more are worth a larger micro-batch; ties go to
        #    the exact number, then to the least memory.
        def rank(pair: tuple[float, Plan]) -> tuple[int, int, float, int]:
            work, plan = pair
            return round(100.0 * work), -plan.micro_batch, work, self.peak(plan)

        return self.enlarged(min(found, key=rank)[1]) if found else None

    def fastest(self, times: Times) -> Plan | None:
        """Return the plan with the fewest seconds that fits, None where none does."""
        # 1. Every combination of the batches and of what is recomputed. Of the calls as many are
        #    stored as fit, since each stored one saves time and nothing else.
        request, device = self.request, self.device_type
        found = [
            plan
            for choice in _choices(request)
            if not choice.stored_calls
            for micro in _micro_batches(request, device)
            for rollout in _even(_rollout_batches(request, micro, device), request.share)
            for decode in _decode_batches(request, micro)
            for plan in [
                self.most_stored(
                    replace(choice, rollout_batch=rollout, micro_batch=micro, decode_batch=decode)
                )
            ]
            if plan is not None
        ]
        if not found:
            return None
        # 2. The fastest, and of those that are equal to within 1 % the smallest.
        seconds = {plan: self.seconds(plan, times) for plan in found}
        limit = 1.01 * min(seconds.values())
        return min(
            (p for p in found if seconds[p] <= limit), key=lambda p: (self.peak(p), seconds[p])
        )

    def most_stored(self, plan: Plan) -> Plan | None:
        """Return the plan with as many calls stored as fit; None if it does not fit with none."""
        if not self.fits(plan):
            return None
        if plan.checkpoint_network != "call" or self.request.checkpoint_network != "auto":
            return plan
        # The need grows with the number: halve the interval in which the largest one lies.
        low, high = 0, self.request.storable
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(replace(plan, stored_calls=middle)):
                low = middle
            else:
                high = middle - 1
        return replace(plan, stored_calls=low)

    def seconds(self, plan: Plan, times: Times) -> float:
        return step_seconds(times, self.footprint, self.request, plan, plan.share)

    def enlarged(self, plan: Plan) -> Plan:
        """Return the plan with the largest roll-out and decoder batch that still fit."""
        # The roll-out first: most network calls are there.
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
        seconds = None if self.times is None else self.seconds(plan, self.times)
        return replace(plan, estimate=expected, seconds=seconds)


def _choices(request: PlanRequest) -> Iterator[Plan]:
    """Yield every choice of what is recomputed, as a plan with batches of one image."""

    def either(value: bool | Auto) -> tuple[bool, ...]:
        return (False, True) if value == "auto" else (value,)

    wanted = request.checkpoint_network
    # With the level `call` at least one call is recomputed: storing all of them is `none`.
    networks: list[tuple[Level, int]] = [("none", 0), ("block", 0)]
    networks.extend(("call", kept) for kept in range(request.storable + 1))
    if wanted != "auto":
        networks = [(wanted, 0)]
    for network, kept in networks:
        for decoder in either(request.checkpoint_decoder):
            for reward in either(request.checkpoint_reward):
                yield Plan(
                    batch_size=request.batch_size,
                    processes=request.processes,
                    groups=request.groups,
                    rollout_batch=1,
                    micro_batch=1,
                    decode_batch=1,
                    checkpoint_network=network,
                    stored_calls=kept,
                    checkpoint_decoder=decoder,
                    checkpoint_reward=reward,
                )


def _with_micro_batch(choice: Plan, request: PlanRequest, micro: int, device_type: str) -> Plan:
    """Return a choice with a micro-batch and the smallest other batches that fit to it."""
    return replace(
        choice,
        rollout_batch=_rollout_batches(request, micro, device_type)[-1],
        micro_batch=micro,
        decode_batch=_decode_batches(request, micro)[-1],
    )


def _micro_batches(request: PlanRequest, device_type: str) -> list[int]:
    """Return the micro-batches to choose from, smallest first."""
    if request.micro_batch != "auto":
        return [min(request.micro_batch, request.together)]
    # Divisors of what goes back together: equal ones waste no memory on a smaller last one.
    together = request.together
    limit = min(_LARGEST.get(device_type, 1), together)
    equal = [m for m in _divisors(together)[::-1] if m <= limit]
    # Of 17 images, for instance, these are single ones: those of the share are better, if larger.
    fewest = math.ceil(together / equal[-1])
    others = [m for m in _divisors(request.share)[::-1] if m <= limit]
    return [*equal, *(m for m in others if math.ceil(together / m) < fewest)]


def _rollout_batches(request: PlanRequest, micro: int, device_type: str) -> list[int]:
    """Return the roll-out's batches to choose from, largest first: multiples of `micro`."""
    if request.rollout_batch != "auto":
        return [request.rollout_batch]
    # Each roll-out then ends where a micro-batch ends.
    limit = min(request.share, _LARGEST_ROLLOUT.get(device_type, 0))
    return list(range(micro, limit + 1, micro))[::-1] or [micro]


def _even(sizes: list[int], share: int) -> list[int]:
    """Return the sizes that leave no smaller last batch, or all if none does."""
    return [size for size in sizes if share % size == 0] or sizes


def _decode_batches(request: PlanRequest, micro: int) -> list[int]:
    """Return the decoder's batches to choose from, largest first."""
    if request.decode_batch != "auto":
        return [min(request.decode_batch, micro)]
    # Equal parts: a smaller last part would save no memory and cost one more decoding.
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
    # These three go into one message; the share they are compared with needs a batch that divides.
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
    """Return the error that says how much memory is needed, for what, and what to change."""
    assert smallest.estimate is not None
    needed = budget.least(smallest.estimate.peak)
    largest = sorted(smallest.estimate.parts.items(), key=lambda item: -item[1])[:3]
    where = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in largest)

    # First what the user fixed and the plan would choose smaller; then what makes the largest parts
    # smaller at the cost of something else.
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
