"""Which images a process works on in a step, and in which batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from alignprop_cli import rng
from alignprop_cli.estimators import Estimator, GradPath
from alignprop_cli.models.base import Sampler
from alignprop_cli.planning.plan import whole_groups
from alignprop_cli.prompts import PromptStream
from alignprop_cli.schedule import NoiseSchedule
from alignprop_cli.training.optimizer import OptimizerSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a step computes, whatever its plan.

    Args:
        sampler: How images are sampled.
        estimator: Where the gradient flows.
        optimizer: Settings of AdamW.
        batch_size: Images of one step over all processes.
        window_group: Number of consecutive images that share one path of the gradient.
        rollout_steps: Number of calls that replace those before the path; None replaces nothing.
        kl_weight: Weight of the KL to the base model in the loss; see `kl.Penalty`.
        detach_uncond: Whether the gradient stops at the unconditional branch.
        seed: Seed of everything random.
        on_nonfinite: What a step does that is not finite; see `nonfinite.FiniteGuard`.
        nonfinite_limit: Steps in a row that may be skipped for that.
    """

    sampler: Sampler
    estimator: Estimator
    optimizer: OptimizerSettings
    batch_size: int
    window_group: int
    rollout_steps: int | None = None
    kl_weight: float = 0.0
    detach_uncond: bool = False
    seed: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 5


@dataclass(frozen=True)
class StepImage:
    """One image of a step.

    Args:
        number: Its index in the global batch.
        prompt: Its prompt.
        path: Where its gradient flows.
        schedule: The noise levels of its chain.
    """

    number: int
    prompt: str
    path: GradPath
    schedule: NoiseSchedule

    @property
    def rollout_calls(self) -> int:
        """Return how many calls come before its path."""
        return self.path.rollout_calls(len(self.schedule))


Batch = Sequence[StepImage]
"""Images that are worked on together."""


def images_of_step(
    settings: Settings,
    stream: PromptStream,
    schedule: NoiseSchedule,
    step: int,
    process: tuple[int, int],
) -> list[StepImage]:
    """Return a process's share of the images of a step, those with the longest roll-out first.

    All processes have equally many images: whole groups where `whole_groups` says so, else each of
    n processes takes every n-th image. Images with equal paths follow each other, whatever their
    group.

    Args:
        settings: What the step computes.
        stream: The training prompts, in the order of the images.
        schedule: Noise levels of the whole chain.
        step: Counted from 0.
        process: (index of the process, number of processes).
    """
    # 1. One path per group. Every process draws all of them, so that none has to be sent.
    groups = settings.batch_size // settings.window_group
    generator = rng.generator(settings.seed, "window", step)
    paths = settings.estimator.draw(len(schedule), generator, groups)

    # 2. This process's images, each with the path of its group.
    first = step * settings.batch_size
    found: list[StepImage] = []
    for number in _numbers(settings, paths, len(schedule), process):
        path, levels = paths[number // settings.window_group], schedule
        before, calls = path.calls[0], settings.rollout_steps
        if calls is not None and calls < before:
            # Fewer, larger steps to where the path begins. Its calls are the same ones and only
            # have smaller indices in the shorter chain.
            levels = schedule.shortened(before, calls)
            path = path.earlier(before - calls)
        found.append(StepImage(number, stream.prompt(first + number), path, levels))

    # 3. In the order that `rollout` and `batches` want: equal schedules together, stops descending,
    #    equal paths together. The sort is stable, so within a path images stay in their order.
    return sorted(
        found,
        key=lambda i: (len(i.schedule), -i.rollout_calls, i.path.calls, i.path.stop or 0),
    )


def _numbers(
    settings: Settings, paths: Sequence[GradPath], steps: int, process: tuple[int, int]
) -> Iterator[int]:
    """Yield the numbers of a process's images; `paths` are those of the step's groups."""
    index, processes = process
    if not whole_groups(settings.estimator, steps, len(paths), processes):
        yield from range(index, settings.batch_size, processes)
        return
    # Back and forth, from the longest path to the shortest: whoever gets the longest of one round
    # gets the shortest of the next.
    order = sorted(range(len(paths)), key=lambda group: -len(paths[group]))
    for first in range(0, len(order), processes):
        dealt = order[first : first + processes]
        back = first // processes % 2 == 1
        start = dealt[-1 - index if back else index] * settings.window_group
        yield from range(start, start + settings.window_group)


def batches(items: Sequence[T], size: int, key: Callable[[T], object]) -> Iterator[list[T]]:
    """Yield the items in their order, in batches of at most `size` that share one key."""
    for _, group in itertools.groupby(items, key=key):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]
