"""How a global batch is worked through: micro-batch, accumulation, recomputation.

A plan changes how fast and in how much memory a step runs, never what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignprop_cli.config import Config
from alignprop_cli.errors import ConfigError, Problem

# Not measured against memory: small enough for an 8 GB card with recomputation at 512 px.
_AUTO_LARGEST = {"cuda": 2, "cpu": 8}


@dataclass(frozen=True)
class Plan:
    """What one optimiser step does.

    Args:
        micro_batch: Images in memory at once in one process.
        accumulation: Micro-batches that one process works through in a step.
        processes: Number of processes.
        window_group: Consecutive images that share one gradient window.
        checkpoint_network: Recompute network calls during backward.
        checkpoint_decoder: Recompute the VAE decoder during backward.
        checkpoint_reward: Recompute the rewards' networks during backward.
    """

    micro_batch: int
    accumulation: int
    processes: int
    window_group: int
    checkpoint_network: bool
    checkpoint_decoder: bool
    checkpoint_reward: bool

    @property
    def batch_size(self) -> int:
        """Return the images of one step over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def describe(self) -> str:
        """Return the plan in one line for people."""
        kept = [
            name
            for name, on in (
                ("network", self.checkpoint_network),
                ("decoder", self.checkpoint_decoder),
                ("reward", self.checkpoint_reward),
            )
            if on
        ]
        return (
            f"{self.batch_size} images a step = {self.micro_batch} at once x {self.accumulation} "
            f"accumulated x {self.processes} process{'es' if self.processes > 1 else ''}; "
            f"recomputed in backward: {', '.join(kept) or 'nothing'}"
        )


def make_plan(config: Config, *, processes: int, device_type: str) -> Plan:
    """Divide the global batch.

    Args:
        config: The complete configuration.
        processes: Number of processes that work on one step.
        device_type: `cuda`, `cpu`, ...; where the micro-batch is `auto` it sets the largest one.

    Raises:
        ConfigError: If the batch or the window group cannot be divided; names the nearest batch
            size that can.
    """
    train, gradient = config.train, config.gradient
    if train.batch_size % processes:
        nearest = max(processes, round(train.batch_size / processes) * processes)
        raise ConfigError(
            "the batch cannot be divided",
            [
                Problem(
                    "train.batch_size",
                    f"{train.batch_size} is not a multiple of {processes} processes; "
                    f"nearest that is: {nearest}",
                )
            ],
        )
    share = train.batch_size // processes
    group = gradient.window_group
    if isinstance(train.micro_batch, int):
        micro_batch = train.micro_batch
    else:
        limit = _AUTO_LARGEST.get(device_type, 1)
        fits = [
            m
            for m in range(1, limit + 1)
            if share % m == 0 and (group is None or group % (m * processes) == 0)
        ]
        micro_batch = max(fits, default=1)
    if share % micro_batch:
        raise ConfigError(
            "the batch cannot be divided",
            [
                Problem(
                    "train.micro_batch",
                    f"{micro_batch} x {processes} processes does not divide train.batch_size "
                    f"({train.batch_size})",
                )
            ],
        )
    group = group or micro_batch * processes
    if group % (micro_batch * processes) or train.batch_size % group:
        raise ConfigError(
            "the batch cannot be divided",
            [
                Problem(
                    "gradient.window_group",
                    f"{group} must be a multiple of micro-batch x processes "
                    f"({micro_batch} x {processes}) and divide train.batch_size",
                )
            ],
        )
    return Plan(
        micro_batch=micro_batch,
        accumulation=share // micro_batch,
        processes=processes,
        window_group=group,
        checkpoint_network=gradient.checkpoint_network,
        checkpoint_decoder=gradient.checkpoint_decoder,
        checkpoint_reward=gradient.checkpoint_reward,
    )
