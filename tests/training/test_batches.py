"""Which images each of several processes works on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignprop_cli.estimators import Estimator, last_k, random_k
from alignprop_cli.guidance import Guidance
from alignprop_cli.models.base import Sampler
from alignprop_cli.planning.plan import Plan, PlanRequest, whole_groups
from alignprop_cli.prompts import PromptStream
from alignprop_cli.schedule import NoiseSchedule, Step
from alignprop_cli.training.batches import Settings, StepImage, batches, images_of_step
from alignprop_cli.training.optimizer import OptimizerSettings

STEPS, BATCH, GROUP = 20, 32, 8
SCHEDULE = NoiseSchedule(
    tuple(
        Step(float(t), 1 - t / STEPS, t / STEPS, 1 - (t - 1) / STEPS, (t - 1) / STEPS)
        for t in range(STEPS, 0, -1)
    ),
    "flow",
)


def shares(estimator: Estimator, processes: int) -> list[list[StepImage]]:
    """Return each process's images of one step: 4 groups of 8 images, chains of 20 calls."""
    sampler = Sampler(STEPS, Guidance(1.0))
    settings = Settings(sampler, estimator, OptimizerSettings(1.0), BATCH, GROUP)
    stream = PromptStream([f"prompt {i}" for i in range(40)], 0)
    return [
        images_of_step(settings, stream, SCHEDULE, 3, (index, processes))
        for index in range(processes)
    ]


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("estimator", [last_k(3), random_k(1, 5), random_k()])
def test_the_processes_share_the_step_of_one(estimator: Estimator, processes: int) -> None:
    (alone,) = shares(estimator, 1)
    dealt = shares(estimator, processes)
    assert {len(share) for share in dealt} == {BATCH // processes}
    together = [image for share in dealt for image in share]
    assert sorted(together, key=lambda i: i.number) == sorted(alone, key=lambda i: i.number)


def groups(share: list[StepImage]) -> set[int]:
    return {image.number // GROUP for image in share}


def calls(share: list[StepImage]) -> int:
    return sum(len(image.path) for image in share)


def test_two_groups_a_process_are_dealt_so_that_none_waits_long() -> None:
    # Stratified k of 1 to 20: one in each quarter, so the sums of longest with shortest and of the
    # two in between differ by less than two quarters' width.
    first, second = shares(random_k(), 2)
    assert len(groups(first)) == len(groups(second)) == 2
    assert abs(calls(first) - calls(second)) <= GROUP * 2 * STEPS // 4


def test_the_images_of_a_share_are_in_the_order_of_one_process() -> None:
    """So each process's micro-batches of up to a group are some of those of one process."""
    (alone,) = shares(random_k(1, 5), 1)
    for processes in (2, 4):
        for share in shares(random_k(1, 5), processes):
            for group in groups(share):
                own = [i.number for i in share if i.number // GROUP == group]
                assert own == [i.number for i in alone if i.number // GROUP == group]
                assert len(own) == GROUP


def test_one_group_a_process_is_divided_where_all_would_wait_for_the_longest() -> None:
    # k of 1 to 5: 20 + 1.3 x 5 against 20 + 1.3 x 3 calls, 11 % more. k of 1 to 20: 20 + 1.3 x 20
    # against 20 + 1.3 x 10.5, 37 % more.
    assert whole_groups(random_k(1, 5), STEPS, 4, 4)
    assert not whole_groups(random_k(), STEPS, 4, 4)
    assert all(len(groups(share)) == 4 for share in shares(random_k(), 4))
    assert all(len(groups(share)) == 1 for share in shares(random_k(1, 5), 4))
    # Three processes cannot share four groups.
    assert not whole_groups(random_k(1, 5), STEPS, 4, 3)


@pytest.mark.parametrize("estimator", [random_k(1, 5), random_k()])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_plan_knows_how_many_images_of_one_path_a_process_has(
    estimator: Estimator, processes: int
) -> None:
    request = PlanRequest(
        num_inference_steps=STEPS,
        estimator=estimator,
        batch_size=BATCH,
        processes=processes,
        group=GROUP,
    )
    most = max(
        sum(image.number // GROUP == group for image in share)
        for share in shares(estimator, processes)
        for group in range(BATCH // GROUP)
    )
    assert request.together == most


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize(("batch", "group"), [(36, 9), (36, 6), (36, 36), (36, 1), (72, 18)])
@pytest.mark.parametrize("estimator", [last_k(3), random_k()])
def test_a_plan_says_how_many_micro_batches_a_step_has(
    estimator: Estimator, batch: int, group: int, processes: int
) -> None:
    request = PlanRequest(
        batch_size=batch,
        processes=processes,
        num_inference_steps=STEPS,
        estimator=estimator,
        group=group if estimator.calls.uniforms else None,
    )
    plan = Plan(
        batch_size=batch,
        processes=processes,
        groups=request.groups,
        rollout_batch=1,
        micro_batch=1,
        decode_batch=1,
    )
    settings = Settings(
        Sampler(STEPS, Guidance(1.0)), estimator, OptimizerSettings(1.0), batch, group
    )
    stream = PromptStream(["a"], 0)
    for index in range(processes):
        found = images_of_step(settings, stream, SCHEDULE, 0, (index, processes))
        paths = {image.number // group: image.path for image in found}
        if len(set(paths.values())) < len(paths) and request.group is not None:
            continue  # groups with equal paths go back together
        for micro in range(1, 13):
            made = list(batches(found, micro, key=lambda image: image.path))
            assert len(made) == replace(plan, micro_batch=micro).accumulation


def test_where_a_group_is_no_multiple_of_the_micro_batch_equal_paths_save_one() -> None:
    plan = Plan(
        batch_size=24, processes=1, groups=4, rollout_batch=1, micro_batch=4, decode_batch=1
    )
    sampler = Sampler(STEPS, Guidance(1.0))
    settings = Settings(sampler, random_k(1, 2), OptimizerSettings(1.0), 24, 6)
    found = images_of_step(settings, PromptStream(["a"], 0), SCHEDULE, 0, (0, 1))
    # Two groups of each path, 12 images: 3 of 4 each instead of two times 4 and 2.
    assert len(list(batches(found, 4, key=lambda image: image.path))) == 6
    assert plan.accumulation == 8
    assert "up to 8 micro-batches of at most 4" in plan.describe()
