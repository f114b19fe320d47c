"""Noise levels: DDIM's rule for the next one, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from alignprop_cli.schedule import NoiseSchedule, Step, diffusion_schedule, flow_schedule
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
    assert all(type(value) in (int, float) for value in vars(step).values())


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
