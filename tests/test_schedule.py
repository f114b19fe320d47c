"""Noise levels: DDIM's rule for the next one, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from alignprop_cli.schedule import NoiseSchedule, Step, diffusion_schedule
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
