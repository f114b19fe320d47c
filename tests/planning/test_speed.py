"""How long a step takes, and the plans that are chosen by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alignprop_cli.config import presets
from alignprop_cli.errors import ConfigError
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import GIB, Budget, Footprint, estimate
from alignprop_cli.planning.plan import PlanRequest
from alignprop_cli.planning.probe import measure_times
from alignprop_cli.planning.speed import (
    CARDS,
    Pace,
    Times,
    assumed,
    card_for,
    find_card,
    step_seconds,
)
from alignprop_cli.training.trial import Trial
from tests.planning import test_plan
from tests.planning.test_footprint import config, plan_of, trainer

# Measured on an H200 (milliseconds for 1 and for 16 images; SD 1.5, bfloat16, LoRA rank 4): a
# roll-out call, a call with gradient both ways, decoder and reward both ways.
H200 = Times(
    rollout=Pace(63.3e-3, 148.67e-3 / 16),
    call=Pace(140e-3, 342.1e-3 / 16),
    decoder=Pace(57.56e-3, 568.07e-3 / 16),
    reward=Pace(35e-3, 56.51e-3 / 16),
    source="measured on an H200",
)

# Seconds an image of the best plans that a search over one common batch found, with the measured
# times themselves (by GiB of the card).
BEST = {
    "k1": {8: 3.4, 12: 1.7, 16: 0.9, 24: 0.6, 40: 0.5, 80: 0.5},
    "k10": {8: 5.0, 12: 2.3, 16: 1.2, 24: 0.9, 40: 0.9, 80: 0.7},
    "random": {8: 7.7, 12: 3.4, 16: 1.8, 24: 1.3, 40: 1.3, 80: 1.1},
}
FLAGS = {
    "k1": {"gradient.method": "last_k", "gradient.k": 1},
    "k10": {"gradient.method": "last_k", "gradient.k": 10},
    "random": {"gradient.method": "random_k"},
}


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return planning.measure(presets.resolve(preset="aesthetic"), "cuda")


def request(window: str) -> PlanRequest:
    return planning.plan_request(presets.resolve(preset="aesthetic", flags=FLAGS[window]), 1)


@pytest.mark.parametrize("window", BEST)
@pytest.mark.parametrize("gib", BEST["k1"])
def test_plans_by_the_times_of_an_h200_reach_the_best_of_one_common_batch(
    footprint: Footprint, window: str, gib: int
) -> None:
    budget = Budget(gib * GIB, "cuda", "--gpu-memory")
    plan = make_plan(request(window), footprint=footprint, budget=budget, times=H200)
    assert plan.seconds is not None
    # The figures above are rounded to 0.1 s.
    assert plan.seconds / plan.batch_size <= BEST[window][gib] + 0.05


def test_a_small_batch_takes_what_its_launches_take() -> None:
    pace = Pace(launch=0.06, each=0.01)
    assert [pace(n) for n in (0, 1, 6, 8)] == [0.0, 0.06, 0.06, 0.08]


# One second a call or an image of each part, in powers of ten, so that a sum shows what is in it.
PLAIN = Times(Pace(0.0, 1.0), Pace(0.0, 100.0), Pace(0.0, 1e4), Pace(0.0, 1e6), "here")


@pytest.mark.parametrize(
    ("gradient", "division", "expected"),
    [
        # T = 50, 8 images: (T - K) calls without gradient, K with, one decoding and one reward.
        ({"method": "last_k", "k": 3}, {}, 8 * (47 + 300 + 1e4 + 1e6)),
        ({"method": "full"}, {}, 8 * (5000 + 1e4 + 1e6)),
        # Uniform on 1..50: 25.5 on average.
        ({"method": "random_k"}, {}, 8 * (24.5 + 2550 + 1e4 + 1e6)),
        # Every block, or every call but the last two, once more.
        ({"method": "last_k", "k": 3}, {"checkpoint_network": "block"}, 8 * (50 + 300 + 1e4 + 1e6)),
        (
            {"method": "last_k", "k": 3},
            {"checkpoint_network": "call", "stored_calls": 2},
            8 * (47 + 1 + 300 + 1e4 + 1e6),
        ),
        # Of the test's footprint recomputation makes 5100 operations of the decoder 6800, and 330
        # of the reward 490.
        ({"method": "last_k", "k": 3}, {"checkpoint_decoder": True}, None),
    ],
)
def test_the_time_of_a_step_is_that_of_its_parts(gradient, division, expected) -> None:
    asked, parts = test_plan.asked(gradient, batch_size=8), test_plan.footprint()
    plan = replace(plan_of(2), **division)
    if expected is None:
        expected = 8 * (47 + 300 + 1e4 * 6800 / 5100 + 1e6)
    assert step_seconds(PLAIN, parts, asked, plan, 8) == pytest.approx(expected, rel=1e-12)


def test_the_calls_of_the_base_model_take_time_too() -> None:
    asked = test_plan.asked({"method": "last_k", "k": 3}, batch_size=8, kl_weight=0.1)
    found = step_seconds(PLAIN, test_plan.footprint(), asked, plan_of(2), 8)
    assert found == pytest.approx(8 * (47 + 3 + 300 + 1e4 + 1e6), rel=1e-12)


def test_smaller_last_batches_are_counted() -> None:
    times = Times(Pace(10.0, 1.0), Pace(0.0, 0.0), Pace(0.0, 0.0), Pace(0.0, 0.0), "here")
    asked = test_plan.asked({"method": "last_k", "k": 49}, batch_size=20)
    # One call without gradient: 16 images take 16 s, the other 4 take what a launch takes.
    plan = plan_of(4, rollout_batch=16)
    assert step_seconds(times, test_plan.footprint(), asked, plan, 20) == pytest.approx(26.0)


def test_a_micro_batch_has_images_of_one_group() -> None:
    # 12 images in two groups of 6, by 4: micro-batches of 4, 2, 4 and 2, decoded by 3.
    launches = {"launch": 1.0, "each": 0.0}
    times = Times(Pace(0.0, 0.0), Pace(**launches), Pace(100.0, 0.0), Pace(1e4, 0.0), "here")
    asked = test_plan.asked({"method": "last_k", "k": 1}, batch_size=12)
    plan = replace(plan_of(4), batch_size=12, decode_batch=3, groups=2)
    assert plan.accumulation == 4
    # Of 4 images 3 and 1 are decoded, of 2 both.
    parts = test_plan.footprint()
    assert step_seconds(times, parts, asked, plan, 12) == pytest.approx(4 + 6 * (100 + 1e4))
    # A process that has 7 of the images has groups of 4 and 3.
    plan = replace(plan, processes=2, batch_size=14)
    assert step_seconds(times, parts, asked, plan, 7) == pytest.approx(2 + 3 * (100 + 1e4))
    # One group: micro-batches of 4, 4 and 4.
    plan = replace(plan_of(4), batch_size=12, decode_batch=4)
    assert step_seconds(times, parts, asked, plan, 12) == pytest.approx(3 + 3 * (100 + 1e4))


def test_of_equally_fast_plans_the_smallest_is_taken() -> None:
    """Bound by launches alone, everything is one batch; where every image counts, nothing is."""
    asked = test_plan.asked({"method": "last_k", "k": 2}, batch_size=8)
    parts = test_plan.footprint()
    images = Times(Pace(0.0, 1.0), Pace(0.0, 2.0), Pace(0.0, 1.0), Pace(0.0, 1.0), "here")
    each = make_plan(asked, footprint=parts, times=images)
    assert (each.rollout_batch, each.micro_batch, each.decode_batch) == (1, 1, 1)
    assert each.checkpoint_network == "none"
    launch = Times(*(Pace(1.0, 0.0) for _ in range(4)), source="here")
    whole = make_plan(asked, footprint=parts, times=launch, budget=Budget(200 * GIB, "cuda", ""))
    assert (whole.rollout_batch, whole.micro_batch, whole.decode_batch) == (8, 8, 8)
    # To within 1 %, for which something may be recomputed.
    assert whole.seconds is not None
    assert 52.0 <= whole.seconds <= 52.0 * 1.01
    assert whole.images_per_hour == pytest.approx(8 * 3600 / whole.seconds)
    assert "images an hour" in whole.describe()


def test_as_many_calls_are_stored_as_fit() -> None:
    asked, parts = (
        test_plan.asked({"method": "last_k", "k": 40}, batch_size=8),
        test_plan.footprint(),
    )
    budget = Budget(24 * GIB, "cuda", "")
    launch = Times(Pace(1.0, 0.1), Pace(2.0, 0.2), Pace(0.1, 0.1), Pace(0.1, 0.1), "here")
    plan = make_plan(asked, footprint=parts, budget=budget, times=launch)
    assert plan.checkpoint_network == "call"
    assert plan.estimate is not None
    assert plan.estimate.peak <= budget.usable

    def fits(stored: int) -> bool:
        found = estimate(parts, asked, replace(plan, stored_calls=stored), images=plan.share)
        return found.peak <= budget.usable

    assert fits(plan.stored_calls)
    assert not fits(plan.stored_calls + 1)


def test_cards_are_found_by_name_and_by_memory(footprint: Footprint) -> None:
    assert [find_card(n) for n in ("RTX 4090", "rtx-4090", "GeForce RTX4090")] == ["rtx4090"] * 3
    with pytest.raises(ConfigError, match=r"--gpu: unknown card 'rtx 4091'.*rtx4090"):
        find_card("rtx 4091")
    assert [card_for(n * GIB) for n in (8, 12, 16, 24, 80, 500)] == [
        *("rtx3060", "rtx3060", "rtx4080", "rtx4090", "a100", "h200")
    ]
    # The H200's own figures come out again: what was measured is where they are from.
    times = assumed(footprint, "h200")
    # It launched 1534 operators a call then; those of the LoRA are two a layer now instead of six.
    launched = footprint.rollout.launches
    assert launched == 1534 - 4 * 128
    assert times.rollout.launch == pytest.approx(63.3e-3 * launched / 1534, rel=0.01)
    assert times.rollout.each == pytest.approx(9.3e-3, rel=0.05)
    assert times.call.each == pytest.approx(342.1e-3 / 16, rel=0.05)
    assert "h200" in times.source
    # Every card has its numbers, and a faster one is faster.
    pace = {name: assumed(footprint, name).rollout.each for name in CARDS}
    assert pace["h200"] < pace["a100"] < pace["rtx4090"] < pace["rtx3090"] < pace["rtx3060"]


class Clock:
    """A device of our making: seconds by batch, and the largest batch that it holds."""

    def __init__(self, times: Times, holds: int) -> None:
        self.times, self.holds, self.tried = times, holds, list[int]()

    def part_seconds(self, images: int) -> dict[str, float]:
        self.tried.append(images)
        if images > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        names = ("rollout", "call", "decoder", "reward")
        return {name: getattr(self.times, name)(images) for name in names}

    def largest(self, value: int | None) -> int | None:
        return value


def test_the_pace_of_a_device_is_measured_with_what_it_holds() -> None:
    real = Times(Pace(0.06, 0.01), Pace(0.1, 0.02), Pace(0.01, 0.03), Pace(0.0, 0.004), "")
    clock = Clock(real, holds=8)
    found = measure_times(clock, 128)  # type: ignore[arg-type]
    assert clock.tried == [1, 8]
    assert found.source == "measured"
    # One image is what launching takes, or more; eight fill the device or do not.
    assert found.rollout == Pace(0.06, 0.08 / 8)
    assert found.decoder == Pace(0.03, 0.03)
    assert found.reward == Pace(0.004, 0.004)
    small = Clock(real, holds=2)
    assert measure_times(small, 128).call == Pace(0.1, 0.05)  # type: ignore[arg-type]
    assert small.tried == [1, 8, 4, 2]
    assert Clock(real, 8).tried == []
    one = Clock(real, holds=1)
    assert measure_times(one, 128).call == Pace(0.1, 0.1)  # type: ignore[arg-type]


def test_timing_the_parts_of_a_real_trainer_learns_nothing() -> None:
    made = trainer(plan_of(2), config(method="last_k", k=2))
    before = {n: p.detach().clone() for n, p in made.optimizer.parameters.items()}
    seconds = Trial(made).part_seconds(3)
    assert seconds.keys() == {"rollout", "call", "decoder", "reward"}
    assert all(value > 0.0 for value in seconds.values())
    assert made.step_number == 0
    assert all(p.grad is None for p in made.optimizer.parameters.values())
    assert all(torch.equal(before[n], p) for n, p in made.optimizer.parameters.items())
