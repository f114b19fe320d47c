"""How a batch is divided, what is recomputed, and how much memory that is thought to need."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignprop_cli.calls import LastCalls
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.estimators import Estimator, GradPath, window
from alignprop_cli.planning.chain import Chain
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import (
    GIB,
    Budget,
    Division,
    Estimate,
    Footprint,
    Level,
    estimate,
)
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.request import make_estimator, plan_request
from alignprop_cli.planning.work import Affine, Work

LEVELS: tuple[Level, ...] = get_args(Level)
MIB = 2**20
LATENTS = 64 * 2**10


def config(gradient: dict[str, Any] | None = None, **train: object) -> Config:
    return parse({"reward": {"brightness": {}}, "train": train, "gradient": gradient or {}})


def asked(
    gradient: dict[str, Any] | None = None, *, processes: int = 1, **train: object
) -> PlanRequest:
    return plan_request(config(gradient, **train), processes)


def work(saved: float, forward: float, backward: float, flops: float, again: float) -> Work:
    """Return numbers of one image, memory in MiB."""
    bytes_each = (Affine(0.0, size * MIB) for size in (saved, forward, backward))
    return Work(*bytes_each, flops, again)


def footprint(scale: float = 1.0) -> Footprint:
    """Return round numbers, a little like those of Stable Diffusion 1.5 in bfloat16."""
    s = scale
    network = {
        "none": work(2000 * s, 2050 * s, 2100 * s, 1600, 2000),
        "block": work(300 * s, 400 * s, 1600 * s, 1600, 3600),
        "call": work(0.1 * s, 130 * s, 2101 * s, 1600, 3600),
    }
    return Footprint(
        weights={"network weights": 1700 * MIB},
        trained=800_000,
        latents=LATENTS,
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


def cpu(gib: float) -> Budget:
    return Budget(int(gib * GIB), "cpu", "free RAM")


def division(rollout_batch: int, micro_batch: int, decode_batch: int, **more: Any) -> Division:
    return Division(
        rollout_batch=rollout_batch, micro_batch=micro_batch, decode_batch=decode_batch, **more
    )


def estimated(chain: Chain, how: Division, images: int, scale: float = 1.0) -> Estimate:
    return estimate(footprint(scale), chain, how, images=images)


def needed(plan: Plan) -> int:
    assert plan.estimate is not None
    return plan.estimate.peak


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 16, 128])
def test_an_automatic_plan_covers_the_batch_exactly(processes: int, batch_size: int) -> None:
    plan = make_plan(asked(batch_size=batch_size, processes=processes), footprint=footprint())
    assert plan.micro_batch * plan.accumulation * plan.processes == batch_size == plan.batch_size
    assert 1 <= plan.decode_batch <= plan.micro_batch <= plan.rollout_batch <= plan.share


def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can() -> None:
    with pytest.raises(
        ConfigError, match="10 is not a multiple of 4 processes; nearest that is: 8"
    ):
        make_plan(asked(batch_size=10, processes=4), footprint=footprint())


@pytest.mark.parametrize("key", ["rollout_batch", "micro_batch", "decode_batch"])
def test_a_batch_that_is_larger_than_the_share_of_a_process_names_what_fits(key: str) -> None:
    too_large = asked(batch_size=12, processes=2, **{key: 7})
    with pytest.raises(ConfigError, match=rf"train.{key}: 7 is more than .*; at most 6$"):
        make_plan(too_large, footprint=footprint())
    make_plan(asked(batch_size=12, processes=2, **{key: 6}), footprint=footprint())


def test_what_a_given_micro_batch_leaves_over_is_a_smaller_one() -> None:
    alike = asked({"method": "last_k"}, batch_size=20, processes=2, micro_batch=4)
    plan = make_plan(alike, footprint=footprint())
    assert (plan.share, plan.micro_batch, plan.accumulation) == (10, 4, 3)
    # Two groups, of which each process has a half: twice 4 and 1.
    groups = asked({"method": "random_k"}, batch_size=20, processes=2, micro_batch=4)
    plan = make_plan(groups, footprint=footprint())
    assert (plan.share, plan.micro_batch, plan.accumulation) == (10, 4, 4)


def test_a_micro_batch_is_no_larger_than_the_images_that_share_their_calls() -> None:
    """Of a random method those of one group, divided among the processes; otherwise all."""
    one = {"method": "random_k", "window_group": 6}
    for gradient, processes, most in ((one, 1, 6), (one, 4, 2), ({"method": "last_k"}, 1, 24)):
        request = asked(gradient, processes=processes, batch_size=24, micro_batch=24 // processes)
        plan = make_plan(request, footprint=footprint(), budget=gpu(1000))
        assert plan.micro_batch == most
    # The default: 24 images are 3 groups of 8.
    request = asked({"method": "random_k"}, batch_size=24)
    assert make_plan(request, footprint=footprint(), budget=gpu(1000)).micro_batch == 8


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(72, 9), (96, 12), (128, 16)])
def test_an_automatic_micro_batch_divides_the_images_that_share_their_calls(
    batch_size: int, micro_batch: int
) -> None:
    """Four groups of 18, 24 or 32, and at most 16 at once: with another one some are smaller."""
    request = asked({"method": "random_k"}, batch_size=batch_size)
    plan = make_plan(request, footprint=footprint(0.01), budget=gpu(80))
    assert plan.micro_batch == micro_batch
    # What the plan says is what a step does.
    assert plan.accumulation == 4 * math.ceil(batch_size / 4 / micro_batch)


def test_groups_of_a_prime_number_of_images_are_not_taken_one_by_one() -> None:
    request = asked({"method": "random_k"}, batch_size=34)  # two groups of 17
    assert make_plan(request, footprint=footprint(0.01), budget=gpu(80)).micro_batch == 2


def test_with_enough_memory_nothing_is_recomputed() -> None:
    plan = make_plan(asked(batch_size=8), footprint=footprint(), budget=gpu(1000))
    assert (plan.checkpoint_network, plan.checkpoint_decoder) == ("none", False)
    assert plan.checkpoint_reward is False
    assert plan.estimate is not None
    assert plan.estimate.flops == plan.estimate.floor
    assert (plan.rollout_batch, plan.micro_batch, plan.decode_batch) == (8, 8, 8)


def test_the_estimate_is_the_largest_moment_of_a_step() -> None:
    """By hand: 50 calls, 2 images, the decoder's blocks recomputed."""
    chain = asked({"method": "full"}, batch_size=4)
    found = estimated(chain, division(2, 2, 2, checkpoint_decoder=True), images=4)
    stored = 50 * 2 * 2000
    # Going back through the decoder: 2 x 2500 more. Everything else is less.
    assert found.parts["stored calls"] == stored * MIB
    assert found.parts["decoder"] == 2 * 2500 * MIB
    assert found.parts["LoRA and optimiser"] == 16 * 800_000
    # The latents of 4 images that were rolled out, 2 clean ones and their gradient.
    assert found.parts["latents"] == 8 * LATENTS
    assert found.peak == (stored + 5000 + 1700) * MIB + 16 * 800_000 + 8 * LATENTS
    one = 50 * 1600 + 50 * 2000 + 2500 + 160 + 170
    assert found.floor == pytest.approx(4 * (one + 2600))
    assert found.flops == pytest.approx(4 * (one + 4300))


def test_each_part_has_the_memory_of_its_own_batch() -> None:
    """By hand: 16 images rolled out, 4 through one call, decoded by 2 or by 1."""
    chain = asked({"method": "last_k", "k": 1}, batch_size=16)
    found = estimated(chain, division(16, 4, 2), images=16)
    # Going back through the decoder of 2 images, with the call of 4 stored.
    assert found.parts["stored calls"] == 4 * 2000 * MIB
    assert found.parts["decoder"] == 2 * 3200 * MIB
    assert found.parts["latents"] == (16 + 2 * 4) * LATENTS
    # Two decoders of one image would be less than the roll-out of 100.
    found = estimated(chain, division(100, 4, 1), images=100)
    assert found.parts["roll-out"] == 100 * 130 * MIB
    assert "decoder" not in found.parts
    # With next to nothing stored, the network's own backward is the peak.
    found = estimated(chain, division(4, 4, 1, checkpoint_network="call"), images=4)
    assert found.parts["network"] == math.ceil(4 * 2101 * MIB)


def test_the_estimate_of_a_window_of_which_the_last_calls_are_stored() -> None:
    """By hand: 10 calls of which 4 are stored, 1 image, decoder and reward recomputed."""
    how = division(
        1,
        1,
        1,
        checkpoint_network="call",
        stored_calls=4,
        checkpoint_decoder=True,
        checkpoint_reward=True,
    )
    found = estimated(asked({"method": "last_k", "k": 10}, batch_size=1), how, images=1)
    # Back through the decoder, with 4 calls stored and the inputs of 6.
    assert found.parts["stored calls"] == 4 * 2000 * MIB + math.ceil(6 * 0.1 * MIB)
    assert found.parts["decoder"] == 2500 * MIB
    again = 6 * 1600
    tail = 2500 + 4300 + 160 + 330
    assert found.flops == pytest.approx(50 * 1600 + 10 * 2000 + again + tail)


def test_calls_whose_input_is_detached_are_all_counted_as_the_first_one() -> None:
    plain = footprint()
    cheap = {level: work(100, 110, 120, 1600, 900) for level in LEVELS}
    given_first = replace(plain, first=cheap)  # type: ignore[arg-type]
    attached = Chain(num_inference_steps=50, estimator=Estimator(LastCalls(3, 3)))
    detached = Chain(num_inference_steps=50, estimator=Estimator(LastCalls(3, 3), input_grad=0.0))
    one = division(1, 1, 1)
    first = estimate(given_first, attached, one, images=1)
    all_first = estimate(given_first, detached, one, images=1)
    assert first.parts["stored calls"] == (100 + 2 * 2000) * MIB
    assert all_first.parts["stored calls"] == 3 * 100 * MIB
    assert first.flops - all_first.flops == pytest.approx(2 * (2000 - 900))


def test_every_copy_of_the_last_call_is_stored_and_decoded() -> None:
    """By hand: the whole chain, then one call 3 times from its end; each copy has an image."""
    chain = Chain(
        num_inference_steps=50, estimator=Estimator(LastCalls(1, 1), copies=3, own_end=False)
    )
    found = estimated(chain, division(2, 2, 1), images=2)
    assert found.parts["stored calls"] == 3 * 2 * 2000 * MIB
    assert found.parts["latents"] == (2 + 2 * 2 * 3) * LATENTS
    tail = 2500 + 2600 + 160 + 170
    assert found.floor == pytest.approx(2 * (50 * 1600 + 3 * (1600 + 2000 + tail)))


@pytest.mark.parametrize(("calls", "copies"), [(3, 0), (1, 2)])
def test_comparing_with_the_base_model_is_one_more_call_for_each_with_gradient(
    calls: int, copies: int
) -> None:
    """By hand: without gradient, and three latents of each call until its gradient is there."""
    chain = Chain(
        num_inference_steps=50, estimator=Estimator(LastCalls(calls, calls), copies=copies)
    )
    plain = estimated(chain, division(2, 2, 1), images=4)
    compared = estimated(replace(chain, compares=True), division(2, 2, 1), images=4)
    made = calls * (1 + copies)  # the copies come on top of the chain's own call
    assert compared.flops - plain.flops == pytest.approx(4 * made * 1600)
    assert compared.floor - plain.floor == pytest.approx(4 * made * 1600)
    assert compared.parts["latents"] - plain.parts["latents"] == 3 * 2 * made * LATENTS
    assert not asked().compares
    assert asked(kl_weight=0.1).compares


@given(
    share=st.integers(1, 48),
    rollout=st.integers(1, 48),
    micro=st.integers(1, 48),
    decode=st.integers(1, 48),
)
def test_the_operations_of_a_step_do_not_depend_on_its_batches(
    share: int, rollout: int, micro: int, decode: int
) -> None:
    chain = asked({"method": "random_k"})
    found = estimated(chain, division(rollout, micro, min(decode, micro)), images=share)
    whole = estimated(chain, division(share, share, share), images=share)
    assert (found.flops, found.floor) == (whole.flops, whole.floor)


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
def test_the_calls_that_are_recomputed_on_average(
    gradient: dict[str, Any], calls: int, beyond: float
) -> None:
    """One call that is recomputed costs 1600 more."""
    chain = asked(gradient)
    every = division(1, 1, 1, checkpoint_network="call")
    but_the_last = replace(every, stored_calls=calls)
    mean = chain.estimator.mean(50)
    saved = estimated(chain, every, 1).flops - estimated(chain, but_the_last, 1).flops
    assert saved == pytest.approx(1600 * (mean - beyond))


def test_the_calls_beyond_a_normal_window_are_those_of_its_integral() -> None:
    """E max(k - 5, 0), k = 50 - s for s normal around 42, rounded and within the chain."""
    grid = np.linspace(0.5, 49.5, 200_001)
    density = np.exp(-(((grid - 42.0) / 5.0) ** 2) / 2.0)
    beyond = np.maximum(50.0 - np.rint(grid) - 5.0, 0.0)
    expected = (beyond * density).sum() / density.sum()
    gradient = config({"method": "gaussian_k", "mean": 0.84, "std": 0.1}).gradient
    assert make_estimator(gradient).mean_beyond(50, 5) == pytest.approx(expected, rel=1e-4)


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
        return estimated(asked({**gradient, **more}), division(1, 1, 1), images=1).floor

    windows = {
        "full": [50],
        "last_k": [gradient.get("k", 0)],
        "random_k": range(gradient.get("k_min", 0), gradient.get("k_max", 0) + 1),
    }[gradient["method"]]
    left_out = [max(50 - k - calls, 0) for k in windows]
    expected = flops() - 1600 * sum(left_out) / len(left_out)
    assert flops(rollout_steps=calls) == pytest.approx(expected)


def test_of_the_calls_as_many_are_stored_as_fit() -> None:
    request = asked({"method": "last_k", "k": 10}, batch_size=1)
    plans = [
        make_plan(request, footprint=footprint(), budget=gpu(gib))
        for gib in (8.0, 16.0, 24.0, 40.0)
    ]
    assert [plan.checkpoint_network for plan in plans] == ["call", "call", "call", "none"]
    stored = [plan.stored_calls for plan in plans]
    assert 0 <= stored[0] < stored[1] < stored[2] < 10
    work = [plan.estimate.flops for plan in plans if plan.estimate is not None]
    assert work == sorted(work, reverse=True)
    assert "calls but the last" in plans[1].describe()


def test_only_what_does_not_fit_is_recomputed() -> None:
    one_call = asked({"method": "last_k", "k": 1}, batch_size=1)
    levels = [
        make_plan(one_call, footprint=footprint(), budget=gpu(gib)) for gib in (10.0, 7.0, 5.2)
    ]
    assert [p.checkpoint_network for p in levels] == ["none", "call", "call"]
    assert [p.checkpoint_decoder for p in levels] == [False, False, True]


def test_decoding_in_parts_is_preferred_to_recomputing_and_to_a_smaller_micro_batch() -> None:
    """8 images through one call take 15.6 GiB; decoded together they would take 25 more."""
    one_call = asked({"method": "last_k", "k": 1}, batch_size=8)
    plans = [
        make_plan(one_call, footprint=footprint(), budget=gpu(gib)) for gib in (23.0, 34.0, 60.0)
    ]
    for plan in plans:
        assert (plan.micro_batch, plan.checkpoint_network) == (8, "none")
        assert (plan.checkpoint_decoder, plan.checkpoint_reward) == (False, False)
    assert [plan.decode_batch for plan in plans] == [1, 4, 8]


def test_a_gpu_rolls_out_more_images_than_it_trains_on_at_once() -> None:
    request = asked({"method": "last_k", "k": 10, "checkpoint_network": "none"}, batch_size=32)
    plan = make_plan(request, footprint=footprint(), budget=gpu(30))
    assert (plan.rollout_batch, plan.micro_batch, plan.decode_batch) == (32, 1, 1)
    assert "roll-out by 32" in plan.describe()
    # What is rolled out takes memory too: 16 GiB for 130 images.
    wide = replace(footprint(), rollout=work(0, 2000, 0, 1600, 0))
    plan = make_plan(request, footprint=wide, budget=gpu(30))
    assert plan.micro_batch == 1
    assert 1 < plan.rollout_batch < 32
    # On the CPU, where a larger one is no faster, the roll-out takes the micro-batch.
    plan = make_plan(request, footprint=footprint(), budget=cpu(40))
    assert plan.rollout_batch == plan.micro_batch


@given(batch=st.integers(1, 64), gib=st.floats(8.0, 300.0), device=st.sampled_from([gpu, cpu]))
def test_a_larger_decoder_batch_would_not_fit(batch: int, gib: float, device: Any) -> None:
    request = asked({"method": "last_k", "k": 2}, batch_size=batch)
    budget = device(gib)
    try:
        plan = make_plan(request, footprint=footprint(), budget=budget)
    except RunError:
        assume(False)
        raise
    assert plan.micro_batch % plan.decode_batch == 0
    larger = [d for d in range(plan.decode_batch + 1, plan.micro_batch + 1)]
    for decode_batch in (d for d in larger if plan.micro_batch % d == 0):
        more = replace(plan, decode_batch=decode_batch)
        assert estimated(request, more, plan.share).peak > budget.usable


def test_given_batches_are_kept_and_the_decoder_takes_at_most_the_micro_batch() -> None:
    request = asked({"method": "last_k"}, batch_size=8, rollout_batch=3, decode_batch=5)
    plan = make_plan(request, footprint=footprint(), budget=gpu(1000))
    assert (plan.rollout_batch, plan.micro_batch, plan.decode_batch) == (3, 8, 5)
    small = replace(request, micro_batch=2)
    plan = make_plan(small, footprint=footprint(), budget=gpu(1000))
    assert (plan.rollout_batch, plan.micro_batch, plan.decode_batch) == (3, 2, 2)


@pytest.mark.parametrize("gib", [6.0, 12.0, 80.0])
@pytest.mark.parametrize("method", ["random_k", "gaussian_k"])
def test_a_plan_is_chosen_in_a_moment(method: str, gib: float) -> None:
    request = asked({"method": method}, batch_size=128)
    started = time.process_time()
    make_plan(request, footprint=footprint(0.9), budget=gpu(gib))
    assert time.process_time() - started < 0.25  # 0.05 on a quiet machine


def test_a_budget_that_is_too_small_names_the_smallest_that_would_do() -> None:
    request = asked(batch_size=4)
    with pytest.raises(RunError, match=r"no plan fits 3\.00 GiB \(a card\)") as caught:
        make_plan(request, footprint=footprint(), budget=gpu(3))
    least = float(str(caught.value).split("the smallest needs ")[1].split(" GiB")[0])
    make_plan(request, footprint=footprint(), budget=gpu(least + 0.01))
    with pytest.raises(RunError):
        make_plan(request, footprint=footprint(), budget=gpu(least - 0.02))


@pytest.mark.parametrize(
    ("gradient", "train", "advice", "never"),
    [
        # What is recomputed is open: fewer calls would save next to nothing.
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
        ({}, {"micro_batch": 2, "decode_batch": 2}, "train.decode_batch: auto", "decoder: auto"),
    ],
)
def test_the_advice_is_what_would_help(
    gradient: dict[str, Any], train: dict[str, Any], advice: str, never: str
) -> None:
    request = asked(gradient, batch_size=4, **train)
    with pytest.raises(RunError) as caught:
        make_plan(request, footprint=footprint(), budget=gpu(3))
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
    request = asked({"method": "last_k", "k": k}, batch_size=batch, processes=processes)
    if batch % processes:
        with pytest.raises(ConfigError, match="the batch cannot be divided") as caught:
            make_plan(request, footprint=footprint(scale), budget=gpu(gib))
        (problem,) = caught.value.problems
        nearest = int(problem.message.split("nearest that is: ")[1])
        assert nearest % processes == 0
        assert abs(nearest - batch) <= processes
        return
    # The least that any plan needs: one image, the best choice of what is recomputed.
    least = min(
        estimated(
            request,
            division(
                1,
                1,
                1,
                checkpoint_network=level,
                checkpoint_decoder=decoder,
                checkpoint_reward=reward,
            ),
            request.share,
            scale,
        ).peak
        for level in LEVELS
        for decoder in (False, True)
        for reward in (False, True)
    )
    if least > gpu(gib).usable:
        with pytest.raises(RunError, match="the smallest needs"):
            make_plan(request, footprint=footprint(scale), budget=gpu(gib))
        return
    plan = make_plan(request, footprint=footprint(scale), budget=gpu(gib))
    assert plan.micro_batch * plan.accumulation * processes == batch
    assert 1 <= plan.decode_batch <= plan.micro_batch <= plan.rollout_batch <= plan.share
    assert plan.estimate is not None
    assert plan.estimate.peak <= gpu(gib).usable < gpu(gib).bytes
    assert plan.estimate.flops >= plan.estimate.floor


@given(
    batch=st.integers(1, 32), k=st.integers(1, 50), gib=st.floats(5.0, 100.0), more=st.floats(1, 8)
)
def test_more_memory_never_means_more_work(batch: int, k: int, gib: float, more: float) -> None:
    request = asked({"method": "last_k", "k": k}, batch_size=batch)
    try:
        here = make_plan(request, footprint=footprint(), budget=gpu(gib))
    except RunError:
        assume(False)
        raise
    there = make_plan(request, footprint=footprint(), budget=gpu(gib * more))
    assert here.estimate is not None
    assert there.estimate is not None
    # As close as operations are told apart.
    assert there.estimate.flops <= here.estimate.flops + 0.01 * here.estimate.floor


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
    batches=st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16)),
    level=st.sampled_from(LEVELS),
    decoder=st.booleans(),
    reward=st.booleans(),
    scale=st.floats(0.1, 4.0),
    stored_calls=st.integers(0, 50),
)
def test_the_estimate_grows_with_calls_images_and_resolution(
    k: int,
    batches: tuple[int, int, int],
    level: Any,
    decoder: bool,
    reward: bool,
    scale: float,
    stored_calls: int,
) -> None:
    def peak(k: int, batches: tuple[int, int, int], scale: float) -> int:
        how = division(
            *batches,
            checkpoint_network=level,
            stored_calls=stored_calls,
            checkpoint_decoder=decoder,
            checkpoint_reward=reward,
        )
        return estimated(asked({"method": "last_k", "k": k}), how, 16, scale).peak

    here = peak(k, batches, scale)
    assert peak(k + 1, batches, scale) >= here
    rollout, micro, decode = batches
    larger = [(rollout + 1, micro, decode), (rollout, micro + 1, decode)]
    larger.append((rollout, micro, decode + 1))
    assert min(peak(k, more, scale) for more in larger) >= here
    assert peak(k, (rollout + 1, micro + 1, decode + 1), scale) > here
    assert peak(k, batches, 1.5 * scale) > here


@pytest.mark.parametrize(
    ("gradient", "longest", "mean"),
    [
        ({"method": "full"}, 50, 50.0),
        ({"method": "last_k", "k": 7}, 7, 7.0),
        ({"method": "random_k", "k_min": 1, "k_max": None}, 50, 25.5),
        ({"method": "random_k", "k_min": 2, "k_max": 9}, 9, 5.5),
        # The first call is normal around 42 with deviation 5, truncated at 49.5, 1.5 deviations
        # above: its mean is 42 - 5 pdf(1.5) / cdf(1.5).
        ({"method": "gaussian_k", "mean": 0.84}, 49, 8.694),
    ],
)
def test_windows_are_planned_for_their_longest_and_worked_for_their_mean(
    gradient: dict[str, Any], longest: int, mean: float
) -> None:
    estimator = make_estimator(config(gradient).gradient)
    assert estimator.longest(50) == longest
    assert estimator.mean(50) == pytest.approx(mean, rel=1e-3)
    chain = asked(gradient)
    found = estimated(chain, division(1, 1, 1), images=1)
    assert found.parts["stored calls"] == longest * 2000 * MIB
    rest = 50 * 1600 + 2500 + 2600 + 160 + 170
    assert found.floor == pytest.approx(rest + 2000 * estimator.mean(50))


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_a_halved_plan_does_the_same_batch_in_smaller_parts(
    rollout: int, micro: int, decode: int
) -> None:
    plan = Plan(
        batch_size=64,
        processes=1,
        rollout_batch=rollout,
        micro_batch=micro,
        decode_batch=min(decode, micro),
    )
    if (rollout, micro) == (1, 1):
        with pytest.raises(ValueError, match="cannot be halved"):
            plan.halved()
        return
    smaller = plan.halved()
    assert (smaller.batch_size, smaller.processes) == (plan.batch_size, plan.processes)
    assert smaller.decode_batch <= smaller.micro_batch
    for name in ("rollout_batch", "micro_batch", "decode_batch"):
        assert getattr(smaller, name) == max(getattr(plan, name) // 2, 1)


@pytest.mark.parametrize(
    ("level", "stored", "recomputed"),
    [
        ("none", 0, ()),
        ("block", 0, ()),
        ("call", 0, (4, 5, 6)),
        ("call", 2, (4,)),
        ("call", 9, ()),
    ],
)
def test_the_calls_of_a_path_that_are_recomputed_are_its_first_ones(
    level: Any, stored: int, recomputed: tuple[int, ...]
) -> None:
    plan = Plan(
        batch_size=1,
        processes=1,
        rollout_batch=1,
        micro_batch=1,
        decode_batch=1,
        checkpoint_network=level,
        stored_calls=stored,
    )
    assert plan.recomputed_calls(window(4, 7)) == recomputed
    if level == "call":
        assert plan.recomputed_calls(GradPath((1, 8, 9))) == (1, 8, 9)[: 3 - min(stored, 3)]


def test_a_plan_is_described_in_one_line() -> None:
    plan = Plan(batch_size=20, processes=2, rollout_batch=8, micro_batch=4, decode_batch=1)
    assert plan.describe() == (
        "20 images a step = 2 processes x 3 micro-batches of at most 4 "
        "(roll-out by 8, decoder by 1); recomputed in backward: nothing"
    )
    plan = Plan(
        batch_size=24, processes=1, groups=4, rollout_batch=4, micro_batch=4, decode_batch=4
    )
    assert plan.describe() == (
        "24 images a step = up to 8 micro-batches of at most 4; recomputed in backward: nothing"
    )
    plan = Plan(
        batch_size=4,
        processes=1,
        rollout_batch=4,
        micro_batch=4,
        decode_batch=4,
        checkpoint_network="call",
        stored_calls=2,
        checkpoint_decoder=True,
    )
    assert plan.describe() == (
        "4 images a step = 1 micro-batch of 4; recomputed in backward: "
        "the network's calls but the last 2, decoder"
    )


def test_a_choice_without_a_footprint_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no footprint"):
        make_plan(asked(batch_size=4))


def test_where_nothing_is_left_to_choose_nothing_has_to_be_counted() -> None:
    given_all = {
        "checkpoint_network": "none",
        "checkpoint_decoder": False,
        "checkpoint_reward": True,
    }
    plan = make_plan(asked(given_all, batch_size=12, micro_batch=4))
    assert plan == Plan(
        batch_size=12,
        processes=1,
        rollout_batch=4,
        micro_batch=4,
        decode_batch=4,
        checkpoint_reward=True,
    )
