"""Noise levels: DDIM's rule for the next one, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from alignprop_cli.schedule import (
    NoiseSchedule,
    Step,
    consistency_schedule,
    diffusion_schedule,
    euler_schedule,
    flow_schedule,
)
from tests.factories import SD1_BETAS

# alphas_cumprod[t] = (10 - t) / 10 for 10 training timesteps: easy to recognise.
CUMPROD = torch.tensor([(10.0 - t) / 10.0 for t in range(10)], dtype=torch.float64)


def test_the_next_level_is_a_stride_below_and_not_the_next_timestep_of_the_list() -> None:
    # 10 timesteps in 3 steps: a stride of 3, though the list goes 9, 5, 1.
    schedule = diffusion_schedule(CUMPROD, [9, 5, 1], 1.0, "epsilon")
    squared = [(step.alpha**2, step.alpha_next**2) for step in schedule.steps]
    expected = [(0.1, 0.4), (0.5, 0.8), (0.9, 1.0)]
    for actual, wanted in zip(squared, expected, strict=True):
        # sqrt and square round to 1e-16 each.
        assert actual == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("final", [1.0, 0.97])
def test_below_the_first_timestep_is_the_final_level(final: float) -> None:
    schedule = diffusion_schedule(CUMPROD, [6, 1], final, "epsilon")
    last = schedule.steps[-1]
    assert last.alpha_next == pytest.approx(math.sqrt(final), abs=1e-15)
    assert last.sigma_next == pytest.approx(math.sqrt(1.0 - final), abs=1e-15)


def test_a_step_that_lands_on_the_first_timestep_takes_that_level_and_not_the_final_one() -> None:
    schedule = diffusion_schedule(CUMPROD, [5, 0], 0.5, "sample")
    assert schedule.steps[0].alpha_next == pytest.approx(1.0, abs=1e-15)
    assert schedule.steps[1].alpha_next == pytest.approx(math.sqrt(0.5), abs=1e-15)


def test_all_levels_of_stable_diffusion_preserve_variance_and_get_cleaner() -> None:
    scheduler = DDIMScheduler(**SD1_BETAS, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    schedule = diffusion_schedule(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        float(scheduler.final_alpha_cumprod),
        "epsilon",
    )
    assert len(schedule) == 50
    assert [schedule.steps[0].timestep, schedule.steps[-1].timestep] == [981, 1]
    for step in schedule.steps:
        assert step.alpha**2 + step.sigma**2 == pytest.approx(1.0, abs=1e-14)
        assert step.alpha_next**2 + step.sigma_next**2 == pytest.approx(1.0, abs=1e-14)
        assert step.alpha_next > step.alpha
    for step, following in zip(schedule.steps, schedule.steps[1:], strict=False):
        assert (step.alpha_next, step.sigma_next) == (following.alpha, following.sigma)


def test_coefficients_are_python_numbers() -> None:
    step = diffusion_schedule(CUMPROD, [9, 4], 1.0, "epsilon").steps[0]
    assert all(type(value) in (int, float, bool) for value in vars(step).values())


def test_noise_prediction_without_any_signal_is_refused() -> None:
    steps = (Step(999, 0.0, 1.0, 0.5, math.sqrt(0.75)),)
    with pytest.raises(ValueError, match="alpha = 0"):
        NoiseSchedule(steps, "epsilon")
    for prediction in ("v_prediction", "sample", "flow"):
        NoiseSchedule(steps, prediction)


def test_an_empty_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        NoiseSchedule((), "epsilon")
    with pytest.raises(ValueError, match="at least one step"):
        diffusion_schedule(CUMPROD, [], 1.0, "epsilon")


def test_an_unknown_prediction_type_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="'velocity'"):
        NoiseSchedule((Step(1, 0.5, 0.5, 1.0, 0.0),), "velocity")  # type: ignore[arg-type]


def test_fewer_steps_at_the_beginning_end_where_all_of_them_did() -> None:
    whole = diffusion_schedule(CUMPROD, [8, 6, 4, 2, 0], 1.0, "epsilon")
    short = whole.shortened(before=4, calls=2)
    assert [step.timestep for step in short.steps] == [8, 4, 0]
    # Each begins at a level of the whole chain and ends at the next one's beginning.
    for step, start, last in zip(short.steps[:2], (0, 2), (1, 3), strict=True):
        assert (step.alpha, step.sigma) == (whole.steps[start].alpha, whole.steps[start].sigma)
        assert step.alpha_next == whole.steps[last].alpha_next
        assert step.sigma_next == whole.steps[last].sigma_next
    assert short.steps[2] == whole.steps[4]


def test_as_many_steps_as_before_are_the_same_schedule() -> None:
    whole = diffusion_schedule(CUMPROD, [8, 6, 4, 2, 0], 1.0, "v_prediction")
    for before in range(1, 6):
        assert whole.shortened(before, before) == whole


@given(st.integers(1, 10), st.data())
def test_a_shortened_schedule_is_a_chain(steps: int, data: st.DataObject) -> None:
    timesteps = [10 // steps * i for i in reversed(range(steps))]
    whole = diffusion_schedule(CUMPROD, timesteps, 1.0, "epsilon")
    before = data.draw(st.integers(1, steps))
    calls = data.draw(st.integers(1, before))
    short = whole.shortened(before, calls)
    assert len(short) == steps - before + calls
    assert short.steps[0].timestep == whole.steps[0].timestep
    for step, following in itertools.pairwise(short.steps):
        assert step.timestep > following.timestep
        assert step.alpha_next == pytest.approx(following.alpha, abs=1e-12)


@pytest.mark.parametrize(("before", "calls"), [(0, 0), (3, 0), (2, 3), (6, 2)])
def test_steps_that_are_not_there_cannot_be_replaced(before: int, calls: int) -> None:
    whole = diffusion_schedule(CUMPROD, [8, 6, 4, 2, 0], 1.0, "epsilon")
    with pytest.raises(ValueError, match="expected 1 <= calls <= before <= 5"):
        whole.shortened(before, calls)


# --- Euler's method and consistency models; parity with diffusers is in tests/models ---


def test_eulers_steps_have_the_levels_of_the_variance_exploding_form() -> None:
    schedule = euler_schedule([9.0, 4.5], [3.0, 1.0, 0.0], "epsilon", eta=1.0, unit_noise=False)
    first, last = schedule.steps
    # x0 + 3 epsilon, divided by sqrt(1 + 3^2).
    assert (first.alpha, first.sigma) == pytest.approx((1 / 10**0.5, 3 / 10**0.5))
    assert (first.alpha_next, first.sigma_next) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert (last.alpha_next, last.sigma_next) == (1.0, 0.0)
    assert [step.timestep for step in schedule.steps] == [9.0, 4.5]
    # 3 times the noise is 3 / sqrt(10) times it after the division; sqrt(10) times it is all of it.
    assert schedule.initial_scale == pytest.approx(3 / 10**0.5)
    whole = euler_schedule([9.0], [3.0, 0.0], "epsilon", eta=0.0, unit_noise=True)
    assert (whole.initial_scale, whole.eta, schedule.eta) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("sigmas", [[0.1, 0.5, 10.0, 0.0], [3.0, 1.0, 0.5, 0.75]])
def test_eulers_levels_that_rise_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"the noise levels rise from 0\.\d to 0\.\d+; see"):
        euler_schedule([3, 2, 1], sigmas, "epsilon", eta=0.0, unit_noise=False)


def test_a_level_that_is_left_at_the_end_stays_in_the_variance_exploding_form() -> None:
    (step,) = euler_schedule([5.0], [2.0, 0.25], "epsilon", eta=0.0, unit_noise=True).steps
    # What is decoded is x0 + 0.25 epsilon.
    assert (step.alpha_next, step.sigma_next) == (1.0, 0.25)


def test_a_consistency_models_clean_sample_is_its_input_where_no_noise_is() -> None:
    cumprod = torch.tensor([1.0, 0.8, 0.5])
    first, last = consistency_schedule(cumprod, [2, 0], "epsilon", timestep_scaling=0.25).steps
    # u = 0.25 x 2 = 0.5 = d: c_skip = 1/2, c_out = 1 / sqrt(2).
    assert (first.c_skip, first.c_out) == pytest.approx((0.5, 0.5**0.5))
    assert (last.c_skip, last.c_out) == (1.0, 0.0)
    assert (first.alpha_next, first.sigma_next) == (last.alpha, last.sigma)
    assert first.renoises
    assert (last.alpha_next, last.sigma_next) == (1.0, 0.0)


def test_a_shortened_schedule_keeps_what_the_scheduler_says() -> None:
    whole = euler_schedule([3, 2, 1], [3.0, 2.0, 1.0, 0.0], "epsilon", eta=1.0, unit_noise=False)
    short = whole.shortened(2, 1)
    assert (short.eta, short.initial_scale) == (whole.eta, whole.initial_scale)
    assert len(short) == 2
    cumprod = torch.tensor([0.9, 0.8, 0.5])
    lcm = consistency_schedule(cumprod, [2, 1, 0], "epsilon", timestep_scaling=1.0)
    assert all(step.renoises for step in lcm.shortened(2, 1).steps)


def test_a_rectified_flow_has_alpha_one_minus_sigma_and_refuses_levels_that_rise() -> None:
    schedule = flow_schedule([1.0, 0.75, 0.25, 0.0], [1000.0, 750.0, 250.0])
    assert schedule.prediction_type == "flow"
    assert schedule.steps[1] == Step(750.0, 0.25, 0.75, 0.75, 0.25)
    for levels in ([1.0, 0.5, 0.6, 0.0], [1.1, 0.5, 0.2, 0.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match=r"do not decrease from 1 to 0: 1"):
            flow_schedule(levels, [3.0, 2.0, 1.0])


def test_the_share_of_the_path_is_what_the_steps_take_off_sigma() -> None:
    schedule = flow_schedule([0.8, 0.6, 0.2, 0.0], [3.0, 2.0, 1.0])
    assert schedule.path_share(range(3)) == pytest.approx(1.0)
    assert schedule.path_share([2]) == pytest.approx(0.25)
    assert schedule.path_share([0, 2]) == pytest.approx(0.5)
    assert schedule.path_share([]) == 0.0
