"""How a batch is divided, what is computed again, and how much memory that is thought to need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.planning.estimate import (
    GIB,
    LEVELS,
    Budget,
    Footprint,
    Linear,
    Work,
    estimate,
    longest_window,
    mean_beyond,
    mean_window,
)
from alignprop_cli.planning.plan import make_plan


def config(gradient: dict[str, Any] | None = None, **train: object) -> Config:
    group = train.pop("window_group", None)
    return parse(
        {
            "reward": {"brightness": {}},
            "train": train,
            "gradient": {"window_group": group, **(gradient or {})},
        }
    )


def work(saved: float, forward: float, backward: float, flops: float, again: float) -> Work:
    """Return figures of one image, memory in MiB."""
    bytes_each = (Linear(0.0, figure * 2**20) for figure in (saved, forward, backward))
    return Work(*bytes_each, Linear(0.0, flops), Linear(0.0, again))


def footprint(scale: float = 1.0) -> Footprint:
    """Return round figures, a little like those of Stable Diffusion 1.5 in bfloat16."""
    s = scale
    network = {
        "none": work(2000 * s, 2050 * s, 2100 * s, 1600, 2000),
        "block": work(300 * s, 400 * s, 1600 * s, 1600, 3600),
        "call": work(0.1 * s, 130 * s, 2101 * s, 1600, 3600),
    }
    return Footprint(
        weights={"network": 1700 * 2**20},
        trained=800_000,
        rollout=work(0, 130 * s, 0, 1600, 0),
        first=network,  # type: ignore[arg-type]
        call=network,  # type: ignore[arg-type]
        decoder={
            False: work(2800 * s, 2850 * s, 3200 * s, 2500, 2600),
            True: work(400 * s, 850 * s, 2500 * s, 2500, 4300),
        },
        reward={
            False: work(300 * s, 310 * s, 350 * s, 160, 170),
            True: work(40 * s, 60 * s, 90 * s, 160, 330),
        },
    )


def gpu(gib: float) -> Budget:
    return Budget(int(gib * GIB), "cuda", "a card")


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 16, 128])
def test_an_automatic_plan_covers_the_batch_exactly(processes: int, batch_size: int) -> None:
    plan = make_plan(config(batch_size=batch_size), processes=processes, footprint=footprint())
    assert plan.micro_batch * plan.accumulation * plan.processes == batch_size
    assert plan.window_group % (plan.micro_batch * plan.processes) == 0
    assert batch_size % plan.window_group == 0


def test_an_automatic_micro_batch_keeps_a_given_window_group() -> None:
    plan = make_plan(config(batch_size=24, window_group=6), processes=2, footprint=footprint())
    assert plan.window_group == 6
    assert 6 % (plan.micro_batch * 2) == 0


def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can() -> None:
    with pytest.raises(
        ConfigError, match="10 is not a multiple of 4 processes; nearest that is: 8"
    ):
        make_plan(config(batch_size=10), processes=4, footprint=footprint())


def test_a_micro_batch_that_does_not_divide_the_share_of_a_process_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"4 x 2 processes does not divide .* \(12\); these do: 1, 2, 3, 6$"
    ):
        make_plan(config(batch_size=12, micro_batch=4), processes=2, footprint=footprint())


def test_a_window_group_smaller_than_all_processes_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"2 must be a multiple of .* \(2 x 2\) .* these do: 4, 8$"
    ):
        make_plan(
            config(batch_size=8, micro_batch=2, window_group=2), processes=2, footprint=footprint()
        )


def test_with_enough_memory_nothing_is_computed_twice() -> None:
    plan = make_plan(config(batch_size=8), processes=1, footprint=footprint(), budget=gpu(1000))
    assert (plan.checkpoint_network, plan.checkpoint_decoder) == ("none", False)
    assert plan.checkpoint_reward is False
    assert plan.estimate is not None
    assert plan.estimate.flops == plan.estimate.floor
    assert plan.micro_batch == 8


def test_the_estimate_is_the_largest_moment_of_a_step() -> None:
    """By hand: 50 calls, 2 images, the decoder's blocks computed again."""
    given = footprint()
    found = estimate(
        given,
        config(gradient={"method": "full"}, batch_size=4),
        micro_batch=2,
        accumulation=2,
        network="none",
        decoder=True,
        reward=False,
    )
    stored = 50 * 2 * 2000
    # Going back through the decoder: 2 x 2500 more. Everything else is less.
    assert found.parts["stored calls"] == stored * 2**20
    assert found.parts["decoder"] == 2 * 2500 * 2**20
    assert found.parts["LoRA and optimiser"] == 16 * 800_000
    assert found.peak == (stored + 5000 + 1700) * 2**20 + 16 * 800_000
    one = 50 * 1600 + 50 * 2000 + 2500 + 160 + 170
    assert found.floor == pytest.approx(4 * (one + 2600))
    assert found.flops == pytest.approx(4 * (one + 4300))


def test_the_estimate_of_a_window_of_which_the_last_calls_are_stored() -> None:
    """By hand: 10 calls of which 4 are stored, 1 image, decoder and reward computed again."""
    found = estimate(
        footprint(),
        config(gradient={"method": "last_k", "k": 10}, batch_size=1),
        micro_batch=1,
        accumulation=1,
        network="call",
        decoder=True,
        reward=True,
        stored_calls=4,
    )
    # Back through the decoder, with 4 calls stored and the inputs of 6.
    assert found.parts["stored calls"] == 4 * 2000 * 2**20 + math.ceil(6 * 0.1 * 2**20)
    assert found.parts["decoder"] == 2500 * 2**20
    again = 6 * 1600
    tail = 2500 + 4300 + 160 + 330
    assert found.flops == pytest.approx(50 * 1600 + 10 * 2000 + again + tail)


@pytest.mark.parametrize(
    ("gradient", "calls", "beyond"),
    [
        ({"method": "full"}, 30, 20.0),
        ({"method": "last_k", "k": 7}, 9, 0.0),
        # 1 + 2 + ... + 5 of the windows 6 to 10.
        ({"method": "random_k", "k_min": 1, "k_max": 10}, 5, 1.5),
        ({"method": "gaussian_k", "mean": 0.84, "std": 0.0}, 3, 5.0),
    ],
)
def test_the_calls_that_are_computed_again_on_average(
    gradient: dict[str, Any], calls: int, beyond: float
) -> None:
    assert mean_beyond(config(gradient=gradient).gradient, 50, calls) == pytest.approx(beyond)


def test_the_calls_beyond_a_normal_window_are_those_of_its_integral() -> None:
    """E max(k - 5, 0) of k normal around 8 with deviation 5, by a sum over a fine grid."""
    grid = np.linspace(-40.0, 60.0, 200_001)
    density = np.exp(-(((grid - 8.0) / 5.0) ** 2) / 2.0) / (5.0 * math.sqrt(2.0 * math.pi))
    expected = (np.maximum(grid - 5.0, 0.0) * density).sum() * (grid[1] - grid[0])
    gradient = config(gradient={"method": "gaussian_k", "mean": 0.84, "std": 0.1}).gradient
    assert mean_beyond(gradient, 50, 5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "gradient",
    [
        {"method": "last_k", "k": 10},
        {"method": "random_k", "k_min": 1, "k_max": 50},
        {"method": "random_k", "k_min": 3, "k_max": 20},
        {"method": "full"},
    ],
)
@pytest.mark.parametrize("calls", [1, 5, 40])
def test_calls_before_the_window_that_are_left_out_cost_nothing(
    gradient: dict[str, Any], calls: int
) -> None:
    """By counting the calls of every window that can be drawn."""

    def flops(**more: int) -> float:
        return estimate(
            footprint(),
            config(gradient={**gradient, **more}),
            micro_batch=1,
            accumulation=1,
            network="none",
            decoder=False,
            reward=False,
        ).floor

    windows = {
        "full": [50],
        "last_k": [gradient.get("k", 0)],
        "random_k": range(gradient.get("k_min", 0), gradient.get("k_max", 0) + 1),
    }[gradient["method"]]
    left_out = [max(50 - k - calls, 0) for k in windows]
    expected = flops() - 1600 * sum(left_out) / len(left_out)
    assert flops(rollout_steps=calls) == pytest.approx(expected)


def test_of_the_calls_as_many_are_stored_as_fit() -> None:
    asked = config(gradient={"method": "last_k", "k": 10}, batch_size=1)
    plans = [
        make_plan(asked, processes=1, footprint=footprint(), budget=gpu(gib))
        for gib in (8.0, 16.0, 24.0, 40.0)
    ]
    assert [plan.checkpoint_network for plan in plans] == ["call", "call", "call", "none"]
    stored = [plan.stored_calls for plan in plans]
    assert 0 <= stored[0] < stored[1] < stored[2] < 10
    work = [plan.estimate.flops for plan in plans if plan.estimate is not None]
    assert work == sorted(work, reverse=True)
    assert "calls but the last" in plans[1].describe()


def test_only_what_does_not_fit_is_computed_again() -> None:
    one_call = config(gradient={"method": "last_k", "k": 1}, batch_size=1)
    levels = [
        make_plan(one_call, processes=1, footprint=footprint(), budget=gpu(gib))
        for gib in (10.0, 7.0, 5.2)
    ]
    assert [p.checkpoint_network for p in levels] == ["none", "call", "call"]
    assert [p.checkpoint_decoder for p in levels] == [False, False, True]


def test_a_budget_that_is_too_small_names_the_smallest_that_would_do() -> None:
    with pytest.raises(RunError, match=r"no plan fits 3\.00 GiB \(a card\)") as caught:
        make_plan(config(batch_size=4), processes=1, footprint=footprint(), budget=gpu(3))
    needed = float(str(caught.value).split("the smallest needs ")[1].split(" GiB")[0])
    make_plan(config(batch_size=4), processes=1, footprint=footprint(), budget=gpu(needed + 0.01))
    with pytest.raises(RunError):
        make_plan(
            config(batch_size=4), processes=1, footprint=footprint(), budget=gpu(needed - 0.02)
        )


@pytest.mark.parametrize(
    ("gradient", "train", "advice", "never"),
    [
        # What is computed again is open: fewer calls would save next to nothing.
        ({"method": "last_k", "k": 10}, {}, "a smaller sample.height", "gradient.k"),
        # The reward holds no network.
        ({}, {}, "a smaller sample.height", "bfloat16"),
        (
            {"method": "last_k", "k": 10, "checkpoint_network": "none"},
            {},
            "gradient.checkpoint_network: auto, a smaller gradient.k,",
            "k_max",
        ),
        ({"checkpoint_network": "block"}, {}, "a smaller gradient.k_max,", "gradient.k,"),
        (
            {"method": "full", "checkpoint_network": "none"},
            {},
            "auto, gradient.method: last_k,",
            "k_max",
        ),
        ({"checkpoint_decoder": False}, {"micro_batch": 2}, "micro_batch: auto", "reward: auto"),
        ({"checkpoint_decoder": False}, {}, "checkpoint_decoder: auto, model.vae_tile", "micro_"),
    ],
)
def test_the_advice_is_what_would_help(
    gradient: dict[str, Any], train: dict[str, Any], advice: str, never: str
) -> None:
    asked = config(gradient=gradient, batch_size=4, **train)
    with pytest.raises(RunError) as caught:
        make_plan(asked, processes=1, footprint=footprint(), budget=gpu(3))
    hint = caught.value.hint
    assert hint is not None
    assert advice in hint
    assert never not in hint


@given(
    batch=st.integers(1, 96),
    processes=st.integers(1, 8),
    gib=st.floats(1.0, 200.0),
    k=st.integers(1, 50),
    scale=st.floats(0.01, 4.0),
)
def test_every_plan_covers_the_batch_and_fits_or_says_what_would(
    batch: int, processes: int, gib: float, k: int, scale: float
) -> None:
    asked = config(gradient={"method": "last_k", "k": k}, batch_size=batch)
    if batch % processes:
        with pytest.raises(ConfigError, match="the batch cannot be divided") as caught:
            make_plan(asked, processes=processes, footprint=footprint(scale), budget=gpu(gib))
        (problem,) = caught.value.problems
        nearest = int(problem.message.split("nearest that is: ")[1])
        assert nearest % processes == 0
        assert abs(nearest - batch) <= processes
        return
    # The least that any plan needs: one image, the best choice of what is computed again.
    least = min(
        estimate(
            footprint(scale),
            asked,
            micro_batch=1,
            accumulation=1,
            network=level,
            decoder=decoder,
            reward=reward,
        ).peak
        for level in LEVELS
        for decoder in (False, True)
        for reward in (False, True)
    )
    if least > gpu(gib).usable:
        with pytest.raises(RunError, match="the smallest needs"):
            make_plan(asked, processes=processes, footprint=footprint(scale), budget=gpu(gib))
        return
    plan = make_plan(asked, processes=processes, footprint=footprint(scale), budget=gpu(gib))
    assert plan.micro_batch * plan.accumulation * processes == batch
    assert plan.estimate is not None
    assert plan.estimate.peak <= gpu(gib).usable < gpu(gib).bytes
    assert plan.estimate.flops >= plan.estimate.floor


@given(peak=st.integers(1, 200 * GIB), device_type=st.sampled_from(["cpu", "cuda"]))
def test_the_least_budget_for_an_estimate_is_the_one_that_just_holds_it(
    peak: int, device_type: str
) -> None:
    least = Budget(0, device_type, "").least(peak)
    assert Budget(least, device_type, "").usable >= peak
    assert Budget(least - 2, device_type, "").usable < peak


@pytest.mark.parametrize(
    ("counted_on", "grew"),
    # MiB; the most of two days in tests/benchmarks/results/heap_epyc-2-cores_202611.md.
    [
        (745, 1009),
        (482, 670),
        (423, 669),
        (3732, 4770),
        (1014, 1253),
        (423, 733),
        (17005, 21200),
        (3381, 4008),
        (424, 753),
    ],
)
def test_a_budget_on_the_cpu_holds_what_processes_were_measured_to_take(
    counted_on: int, grew: int
) -> None:
    least = Budget(0, "cpu", "").least(counted_on * 2**20)
    assert grew * 2**20 <= least < 2.0 * grew * 2**20


@given(
    k=st.integers(1, 49),
    micro_batch=st.integers(1, 16),
    level=st.sampled_from(LEVELS),
    decoder=st.booleans(),
    reward=st.booleans(),
    scale=st.floats(0.1, 4.0),
    stored_calls=st.integers(0, 50),
)
def test_the_estimate_grows_with_calls_images_and_resolution(
    k: int,
    micro_batch: int,
    level: Any,
    decoder: bool,
    reward: bool,
    scale: float,
    stored_calls: int,
) -> None:
    def peak(k: int, micro_batch: int, scale: float) -> int:
        return estimate(
            footprint(scale),
            config(gradient={"method": "last_k", "k": k}),
            micro_batch=micro_batch,
            accumulation=1,
            network=level,
            decoder=decoder,
            reward=reward,
            stored_calls=stored_calls,
        ).peak

    here = peak(k, micro_batch, scale)
    assert peak(k + 1, micro_batch, scale) >= here
    assert peak(k, micro_batch + 1, scale) > here
    assert peak(k, micro_batch, 1.5 * scale) > here


@pytest.mark.parametrize(
    ("gradient", "longest", "mean"),
    [
        ({"method": "full"}, 50, 50.0),
        ({"method": "last_k", "k": 7}, 7, 7.0),
        ({"method": "random_k", "k_min": 1, "k_max": None}, 50, 25.5),
        ({"method": "random_k", "k_min": 2, "k_max": 9}, 9, 5.5),
        ({"method": "gaussian_k", "mean": 0.84}, 49, 8.0),
    ],
)
def test_windows_are_planned_for_their_longest_and_worked_for_their_mean(
    gradient: dict[str, Any], longest: int, mean: float
) -> None:
    chosen = config(gradient=gradient).gradient
    assert longest_window(chosen, 50) == longest
    assert mean_window(chosen, 50) == pytest.approx(mean)


@given(st.integers(2, 64), st.integers(1, 8))
def test_a_halved_plan_does_the_same_batch_in_smaller_parts(size: int, accumulation: int) -> None:
    assume(size > 1)
    asked = config(
        gradient={
            "checkpoint_network": "none",
            "checkpoint_decoder": False,
            "checkpoint_reward": False,
        },
        batch_size=size * accumulation,
        micro_batch=size,
    )
    plan = make_plan(asked, processes=1)
    smaller = plan.halved()
    assert smaller.batch_size == plan.batch_size
    assert smaller.micro_batch < plan.micro_batch
    assert plan.window_group % smaller.micro_batch == 0


def test_a_choice_without_a_footprint_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no footprint"):
        make_plan(config(batch_size=4), processes=1)
