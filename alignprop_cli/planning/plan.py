"""How a global batch is worked through: micro-batch, accumulation, recomputation.

A plan changes how fast and in how much memory a step runs, never what it computes. Among the plans
that fit the memory the one with the fewest operations is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alignprop_cli.config.schema import Config
from alignprop_cli.errors import ConfigError, Problem, RunError
from alignprop_cli.planning.estimate import (
    GIB,
    UNCORRECTED,
    Budget,
    Correction,
    Estimate,
    Footprint,
    Level,
    estimate,
    longest_window,
)

# Beyond so many pictures at once nothing gets faster; on CUDA a guess, not measured.
_LARGEST = {"cuda": 16, "cpu": 8}


@dataclass(frozen=True)
class Plan:
    """What one optimiser step does.

    Args:
        micro_batch: Images in memory at once in one process.
        accumulation: Micro-batches that one process works through in a step.
        processes: Number of processes.
        window_group: Consecutive images that share one gradient window.
        checkpoint_network: What of the network is computed again in backward.
        stored_calls: With `call`: how many calls, the last ones, are stored all the same.
        checkpoint_decoder: Recompute the blocks of the VAE decoder during backward.
        checkpoint_reward: Recompute the blocks of the rewards' networks during backward.
        estimate: What it is expected to need; None where nothing was counted.
    """

    micro_batch: int
    accumulation: int
    processes: int
    window_group: int
    checkpoint_network: Level
    checkpoint_decoder: bool
    checkpoint_reward: bool
    estimate: Estimate | None = None
    stored_calls: int = 0

    @property
    def batch_size(self) -> int:
        """Return the images of one step over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def halved(self) -> Plan:
        """Return the same plan with half as many images at once, or what next divides them.

        Raises:
            ValueError: If it is one image already.
        """
        if self.micro_batch == 1:
            raise ValueError("one image at once cannot be halved")
        smaller = max(m for m in range(1, self.micro_batch // 2 + 1) if self.micro_batch % m == 0)
        more = self.accumulation * self.micro_batch // smaller
        return replace(self, micro_batch=smaller, accumulation=more, estimate=None)

    def describe(self) -> str:
        """Return the plan in one line for people."""
        network = {
            "none": None,
            "block": "the network by block",
            "call": "the network's calls"
            + (f" but the last {self.stored_calls}" if self.stored_calls else ""),
        }[self.checkpoint_network]
        again = [network] if network else []
        again += ["decoder"] * self.checkpoint_decoder + ["reward"] * self.checkpoint_reward
        text = (
            f"{self.batch_size} images a step = {self.micro_batch} at once x {self.accumulation} "
            f"accumulated x {self.processes} process{'es' if self.processes > 1 else ''}; "
            f"computed again in backward: {', '.join(again) or 'nothing'}"
        )
        if self.estimate is not None:
            text += f"; about {self.estimate.peak / GIB:.2f} GiB"
        return text


def make_plan(
    config: Config,
    *,
    processes: int,
    footprint: Footprint | None = None,
    budget: Budget | None = None,
    correction: Correction = UNCORRECTED,
    below: float = math.inf,
) -> Plan:
    """Divide the global batch and choose what is computed again.

    Args:
        config: The complete configuration.
        processes: Number of processes that work on one step.
        footprint: What the parts need; None only where nothing is left to choose.
        budget: The memory of a process; None is without limit.
        correction: What was measured of such estimates on the device.
        below: An estimate, in bytes, at which memory ran out on the device.

    Raises:
        ConfigError: If the batch or the window group cannot be divided; names values that can.
        RunError: If no plan fits the budget; names the smallest that would do.
        ValueError: If something is to be chosen and there is no footprint.
    """
    sizes = _micro_batches(config, processes, budget)
    plans = list(_plans(config, processes, sizes, footprint, correction))
    if footprint is None:
        if len(plans) > 1:
            raise ValueError("there is a choice of plans and no footprint to choose by")
        return plans[0]
    fitting = [
        plan
        for plan in plans
        if (budget is None or _peak(plan) <= budget.usable) and _uncorrected(plan) < below
    ]
    if not fitting:
        assert budget is not None
        raise _too_small(min(plans, key=_peak), config, budget)
    # Fewest operations; of equals the most pictures at once. Rounded first, since a few operations
    # do not outweigh a larger micro-batch; then to the last one, then the least memory.
    return min(
        fitting,
        key=lambda plan: (
            round(100.0 * _effort(plan)),
            -plan.micro_batch,
            _effort(plan),
            _peak(plan),
        ),
    )


def _plans(
    config: Config,
    processes: int,
    micro_batches: Sequence[int],
    footprint: Footprint | None,
    correction: Correction,
) -> Iterator[Plan]:
    """Yield every plan that the configuration allows."""
    for micro_batch in micro_batches:
        accumulation = config.train.batch_size // (processes * micro_batch)
        for network, stored_calls, decoder, reward in _choices(config):
            expected = (
                None
                if footprint is None
                else estimate(
                    footprint,
                    config,
                    micro_batch=micro_batch,
                    accumulation=accumulation,
                    network=network,
                    stored_calls=stored_calls,
                    decoder=decoder,
                    reward=reward,
                    correction=correction,
                )
            )
            yield Plan(
                micro_batch=micro_batch,
                accumulation=accumulation,
                processes=processes,
                window_group=config.gradient.window_group or micro_batch * processes,
                checkpoint_network=network,
                checkpoint_decoder=decoder,
                checkpoint_reward=reward,
                estimate=expected,
                stored_calls=stored_calls,
            )


def _peak(plan: Plan) -> int:
    assert plan.estimate is not None
    return plan.estimate.peak


def _uncorrected(plan: Plan) -> float:
    """Return a plan's estimate as it was before anything was measured."""
    assert plan.estimate is not None
    return sum(plan.estimate.parts.values())


def _effort(plan: Plan) -> float:
    """Return a plan's operations over the floor."""
    assert plan.estimate is not None
    return plan.estimate.flops / plan.estimate.floor


def _choices(config: Config) -> Iterator[tuple[Level, int, bool, bool]]:
    """Yield what may be computed again, as far as the configuration leaves it open."""
    gradient = config.gradient

    def either(value: bool | Literal["auto"]) -> tuple[bool, ...]:
        return (False, True) if value == "auto" else (value,)

    wanted = gradient.checkpoint_network
    networks: list[tuple[Level, int]] = (
        [(wanted, 0)]
        if wanted != "auto"
        else [
            ("none", 0),
            ("block", 0),
            *(
                ("call", n)
                for n in range(longest_window(gradient, config.sample.num_inference_steps))
            ),
        ]
    )
    for network, stored_calls in networks:
        for decoder in either(gradient.checkpoint_decoder):
            for reward in either(gradient.checkpoint_reward):
                yield network, stored_calls, decoder, reward


def _micro_batches(config: Config, processes: int, budget: Budget | None) -> list[int]:
    """Return the micro-batches that divide the batch and the window group.

    Raises:
        ConfigError: If there is none; says what would do.
    """
    train, group = config.train, config.gradient.window_group
    if train.batch_size % processes:
        nearest = max(processes, round(train.batch_size / processes) * processes)
        raise _undivided(
            "train.batch_size",
            f"{train.batch_size} is not a multiple of {processes} processes; "
            f"nearest that is: {nearest}",
        )
    share = train.batch_size // processes
    if group is not None and (group % processes or train.batch_size % group):
        raise _undivided(
            "gradient.window_group",
            f"{group} must be a multiple of micro-batch x processes ({processes} processes) and "
            f"divide train.batch_size ({train.batch_size}); these do: "
            f"{_listed(processes * m for m in _divisors(share))}",
        )
    if isinstance(train.micro_batch, int):
        micro_batch = train.micro_batch
        if share % micro_batch:
            raise _undivided(
                "train.micro_batch",
                f"{micro_batch} x {processes} processes does not divide train.batch_size "
                f"({train.batch_size}); these do: {_listed(_divisors(share))}",
            )
        if group is not None and group % (micro_batch * processes):
            groups = [processes * m for m in _divisors(share) if m % micro_batch == 0]
            raise _undivided(
                "gradient.window_group",
                f"{group} must be a multiple of micro-batch x processes "
                f"({micro_batch} x {processes}) and divide train.batch_size ({train.batch_size}); "
                f"these do: {_listed(groups)}",
            )
        return [micro_batch]
    limit = min(share, _LARGEST.get(budget.device_type if budget else "cpu", 1))
    return [
        m
        for m in _divisors(share)
        if m <= limit and (group is None or group % (m * processes) == 0)
    ]


def _divisors(number: int) -> list[int]:
    return [m for m in range(1, number + 1) if number % m == 0]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _undivided(key: str, message: str) -> ConfigError:
    return ConfigError("the batch cannot be divided", [Problem(key, message)])


def _too_small(smallest: Plan, config: Config, budget: Budget) -> RunError:
    """Say how much memory would do, where it goes, and what to change."""
    needed = budget.least(_peak(smallest))
    assert smallest.estimate is not None
    largest = sorted(smallest.estimate.parts.items(), key=lambda item: -item[1])[:3]
    where = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in largest)
    names = {name for name, _ in largest}
    gradient, advice = config.gradient, list[str]()
    if isinstance(config.train.micro_batch, int) and config.train.micro_batch > 1:
        advice.append("train.micro_batch: auto")
    if gradient.checkpoint_network in ("none", "block"):
        advice.append("gradient.checkpoint_network: auto")
    if gradient.checkpoint_decoder is False:
        advice.append("gradient.checkpoint_decoder: auto")
    if gradient.checkpoint_reward is False:
        advice.append("gradient.checkpoint_reward: auto")
    longest = longest_window(gradient, config.sample.num_inference_steps)
    if "stored calls" in names and longest > 1:
        fewer = {"last_k": "a smaller gradient.k", "random_k": "a smaller gradient.k_max"}
        advice.append(fewer.get(gradient.method, "gradient.method: last_k"))
    if "decoder" in names and config.model.vae_tile_size is None:
        advice.append("model.vae_tile_size: 256 (pictures change a little)")
    coarse = all(reward.dtype != "float32" for reward in config.reward.values())
    if smallest.estimate.parts.get("reward weights", 0) > 0 and not coarse:
        advice.append("bfloat16 as the dtype of a reward with a network")
    advice.append("a smaller sample.height and width")
    return RunError(
        f"no plan fits {budget.bytes / GIB:.2f} GiB ({budget.source}): the smallest needs "
        f"{needed / GIB:.2f} GiB, most of it for {where}",
        hint=f"try {', '.join(advice)}",
    )
