"""Which images a process works on in a step, and in which batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from alignprop_cli import rng
from alignprop_cli.estimators import Estimator, GradPath
from alignprop_cli.models.base import Sampler
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
        optimizer: What AdamW is told.
        batch_size: Images of one step over all processes.
        window_group: Consecutive images that share one path of the gradient.
        rollout_steps: Calls that replace those before the path; None replaces nothing.
        seed: Of everything random.
    """

    sampler: Sampler
    estimator: Estimator
    optimizer: OptimizerSettings
    batch_size: int
    window_group: int
    rollout_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepImage:
    """One image of a step.

    Args:
        number: Within the global batch.
        prompt: What is asked for.
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


def images_of_step(
    settings: Settings,
    stream: PromptStream,
    schedule: NoiseSchedule,
    step: int,
    process: tuple[int, int],
) -> list[StepImage]:
    """Return a process's share of the images of a step, those with the longest roll-out first.

    Every process takes each n-th image, so it has the same number of them as the others and a part
    of every group. Images whose paths are equal follow each other, whatever their group.

    Args:
        settings: What the step computes.
        stream: Of the training prompts.
        schedule: Noise levels of the whole chain.
        step: Counted from 0.
        process: Which one, counted from 0, and how many there are.
    """
    groups = settings.batch_size // settings.window_group
    generator = rng.generator(settings.seed, "window", step)
    paths = settings.estimator.draw(len(schedule), generator, groups)
    first = step * settings.batch_size
    found: list[StepImage] = []
    for number in range(process[0], settings.batch_size, process[1]):
        path, levels = paths[number // settings.window_group], schedule
        before, calls = path.rollout_calls(len(schedule)), settings.rollout_steps
        if calls is not None and calls < before:
            # A shorter way to where the path begins; its calls are the same, earlier in the list.
            levels = schedule.shortened(before, calls)
            path = path.earlier(before - calls)
        found.append(StepImage(number, stream.prompt(first + number), path, levels))
    return sorted(found, key=lambda i: (len(i.schedule), -i.rollout_calls, i.path.calls))


def batches(items: Sequence[T], size: int, key: Callable[[T], object]) -> Iterator[list[T]]:
    """Yield the items in their order, at most so many at once, and never of two keys at once."""
    for _, group in itertools.groupby(items, key=key):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]
