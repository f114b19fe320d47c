"""The chain against three schedulers of diffusers, and against closed forms on Gaussian data."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from alignprop_cli.estimators import window
from alignprop_cli.guidance import Conditioning, Embeds, Guidance, guide, guided
from alignprop_cli.sampling import ddim_step, predict_x0_epsilon, rollout, sample
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step, diffusion_schedule
from tests.factories import SD1_BETAS, randn

PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow")
SHAPE = (2, 4, 3, 3)


def ddim(num_inference_steps: int, **options: Any) -> tuple[DDIMScheduler, NoiseSchedule]:
    """Return diffusers' scheduler in float64, and our schedule made from it."""
    scheduler = DDIMScheduler(**SD1_BETAS, clip_sample=False, steps_offset=1, **options)
    scheduler.set_timesteps(num_inference_steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    schedule = diffusion_schedule(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        float(scheduler.final_alpha_cumprod),
        scheduler.config.prediction_type,
    )
    return scheduler, schedule


DDIM_GRID = [
    *itertools.product(
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (True, False),
        (False,),
    ),
    *itertools.product(
        ("v_prediction",), ("leading", "trailing", "linspace"), (True, False), (True,)
    ),
]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("prediction", "spacing", "alpha_one", "zero_snr"), DDIM_GRID)
def test_every_step_equals_the_ddim_scheduler_of_diffusers(
    prediction: str, spacing: str, alpha_one: bool, zero_snr: bool, eta: float
) -> None:
    # 7 does not divide 1000: DDIM's previous timestep is then not the next one in the list.
    scheduler, schedule = ddim(
        7,
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=alpha_one,
        rescale_betas_zero_snr=zero_snr,
    )
    assert [step.timestep for step in schedule.steps] == scheduler.timesteps.tolist()
    assert len(schedule) == 7
    for i, (t, step) in enumerate(zip(scheduler.timesteps, schedule.steps, strict=True)):
        noise_pred, latents, noise = (randn(100 * i + j, *SHAPE) for j in range(3))
        expected = scheduler.step(
            noise_pred, t, latents, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
        actual = ddim_step(
            noise_pred, latents, step, schedule.prediction_type, eta=eta, noise=noise
        )
        # Both are float64; 1e-10 leaves room for the cancellation in 1 - alphas_cumprod.
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_step_in_float32_equals_the_ddim_scheduler_of_diffusers() -> None:
    scheduler = DDIMScheduler(**SD1_BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(5)
    schedule = diffusion_schedule(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        float(scheduler.final_alpha_cumprod),
        "epsilon",
    )
    for i, (t, step) in enumerate(zip(scheduler.timesteps, schedule.steps, strict=True)):
        noise_pred, latents = (randn(10 * i + j, *SHAPE, dtype=torch.float32) for j in range(2))
        expected = scheduler.step(noise_pred, t, latents).prev_sample
        actual = ddim_step(noise_pred, latents, step, "epsilon")
        assert actual.dtype == torch.float32
        # float32 rounds to 6e-8; x0 = (latents - sigma eps) / alpha is up to 20 at the first step.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=4e-6)


def wavy(latents: Tensor, timestep: float) -> Tensor:
    """A stand-in for the network: smooth, not linear, different at every timestep."""
    return torch.tanh(1.3 * latents + 0.1) * (0.5 + timestep / 1000.0)


def wavy_network(latents: Tensor, step: Step) -> Tensor:
    return wavy(latents, step.timestep)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_deterministic_chain_equals_euler_in_the_variance_exploding_notation(
    prediction: PredictionType, spacing: str
) -> None:
    """Euler works on x / alpha with noise level sigma / alpha.

    Dividing DDIM's step at eta = 0 by alpha' gives
    x'/alpha' = x0 + (sigma'/alpha') eps = x/alpha + (sigma'/alpha' - sigma/alpha) eps,
    which is Euler's step, wherever both go to the same next level: so where the number of steps
    divides 1000 and the last level is clean.
    """
    steps = 10
    euler = EulerDiscreteScheduler(
        **SD1_BETAS, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
    )
    euler.set_timesteps(steps)
    _, schedule = ddim(
        steps, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=True
    )
    noise = randn(3, *SHAPE, dtype=torch.float32)
    exploding = noise * euler.init_noise_sigma
    latents = exploding * schedule.steps[0].alpha
    if spacing == "leading":
        # Here Euler's initial scale sqrt(1 + sigma^2) is 1 / alpha: both start from the noise.
        torch.testing.assert_close(latents, noise, rtol=1e-5, atol=1e-5)
    for t, step in zip(euler.timesteps, schedule.steps, strict=True):
        assert float(t) == step.timestep
        noise_pred = wavy(latents, step.timestep)
        scaled = euler.scale_model_input(exploding, t)
        # Euler keeps float32 sigmas and states of size 15: a relative 1e-6 of that.
        torch.testing.assert_close(scaled, latents, rtol=2e-5, atol=2e-5)
        exploding = euler.step(wavy(scaled, float(t)), t, exploding).prev_sample
        latents = ddim_step(noise_pred, latents, step, prediction)
        torch.testing.assert_close(latents, exploding * step.alpha_next, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_step_equals_the_flow_matching_scheduler_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.tolist()
    steps = tuple(
        Step(float(t), 1.0 - now, now, 1.0 - after, after)
        for t, now, after in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True)
    )
    expected = randn(4, *SHAPE, dtype=torch.float32)
    actual = sample(wavy_network, expected, NoiseSchedule(steps, "flow"))
    for t in scheduler.timesteps:
        expected = scheduler.step(wavy(expected, float(t)), t, expected).prev_sample
    # 6 steps in float32, states of order 1.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)


# --- Closed forms on Gaussian data ---


MEAN, SPREAD = 0.7, 0.4


def toy_schedule(prediction: PredictionType, num_inference_steps: int = 6) -> NoiseSchedule:
    """Levels that chain (each step starts where the last one ended), down to a clean sample."""
    if prediction == "flow":
        sigmas = [1.0 - i / num_inference_steps for i in range(num_inference_steps + 1)]
        levels = [(1.0 - sigma, sigma) for sigma in sigmas]
    else:
        angles = [1.5 * (1.0 - i / num_inference_steps) for i in range(num_inference_steps + 1)]
        levels = [(math.cos(angle), math.sin(angle)) for angle in angles]
    steps = tuple(
        Step(float(i), *now, *after) for i, (now, after) in enumerate(itertools.pairwise(levels))
    )
    return NoiseSchedule(steps, prediction)


def optimal_denoiser(schedule: NoiseSchedule, mean: Tensor):
    """The best network for data x0 ~ N(mean, SPREAD^2), affine in the latents."""

    def denoise(latents: Tensor, step: Step) -> Tensor:
        variance = (step.alpha * SPREAD) ** 2 + step.sigma**2
        deviation = latents - step.alpha * mean
        x0 = mean + SPREAD**2 * step.alpha / variance * deviation
        epsilon = step.sigma / variance * deviation
        return {
            "epsilon": epsilon,
            "v_prediction": step.alpha * epsilon - step.sigma * x0,
            "sample": x0,
            "flow": epsilon - x0,
        }[schedule.prediction_type]

    return denoise


def shrink(step: Step) -> float:
    """g = (alpha alpha' c^2 + sigma sigma') / (alpha^2 c^2 + sigma^2), see below."""
    variance = (step.alpha * SPREAD) ** 2 + step.sigma**2
    return (step.alpha * step.alpha_next * SPREAD**2 + step.sigma * step.sigma_next) / variance


def linear_path(step: Step, prediction: PredictionType) -> float:
    """d latents' / d latents where the network's output is held fixed."""
    return {
        # x' = alpha' (x - sigma eps) / alpha + sigma' eps
        "epsilon": step.alpha_next / step.alpha if step.alpha else math.nan,
        # x' = alpha' (alpha x - sigma v) + sigma' (alpha v + sigma x)
        "v_prediction": step.alpha * step.alpha_next + step.sigma * step.sigma_next,
        # x' = alpha' x0 + sigma' (x - alpha x0) / sigma
        "sample": step.sigma_next / step.sigma,
        # x' = x + (sigma' - sigma) v
        "flow": 1.0,
    }[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_chain_has_its_closed_form_on_gaussian_data(prediction: PredictionType) -> None:
    """Forward and gradient of the whole chain for data x0 ~ N(m, c^2).

    Then x = alpha x0 + sigma eps is Gaussian with mean alpha m and variance
    d = alpha^2 c^2 + sigma^2, and the optimal predictor is the conditional mean, which is affine:

        E[x0 | x] = m + (c^2 alpha / d) (x - alpha m),   E[eps | x] = (sigma / d) (x - alpha m).

    A deterministic step gives x' = alpha' E[x0|x] + sigma' E[eps|x], so that

        x' - alpha' m = g (x - alpha m),   g = (alpha alpha' c^2 + sigma sigma') / d,

    and over a chain with G the product of all g

        x_T = alpha_T m + G (x_0 - alpha_0 m),   dx_T/dm = alpha_T - G alpha_0,   dx_T/dx_0 = G.
    """
    schedule = toy_schedule(prediction)
    mean = torch.tensor(MEAN, dtype=torch.float64, requires_grad=True)
    noise = randn(5, 16).requires_grad_()
    whole = window(0, len(schedule))
    latents = sample(optimal_denoiser(schedule, mean), noise, schedule, path=whole)

    first, last = schedule.steps[0], schedule.steps[-1]
    product = math.prod(shrink(step) for step in schedule.steps)
    expected = last.alpha_next * MEAN + product * (noise.detach() - first.alpha * MEAN)
    # float64: 6 steps of about 10 operations, each rounding to 1e-16, times 1 / alpha_0 = 14.
    torch.testing.assert_close(latents.detach(), expected, rtol=0.0, atol=1e-12)
    by_mean, by_noise = torch.autograd.grad(latents.sum(), [mean, noise])
    assert float(by_mean) == pytest.approx(
        16 * (last.alpha_next - product * first.alpha), abs=1e-12
    )
    torch.testing.assert_close(by_noise, torch.full_like(noise, product), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_window_has_its_closed_gradient_on_gaussian_data(prediction: PredictionType) -> None:
    """The truncated gradient with respect to the mean m, for all windows [s, e).

    Before s nothing depends on m. Inside, x_e = alpha_e m + G (x_s - alpha_s m) with G the product
    of g over the window, hence dx_e/dm = alpha_e - G alpha_s. After e the network's outputs are
    constants and dx'/dx = a, the coefficient of x in the step (`linear_path`):

        dx_T/dm = (alpha_e - G alpha_s) prod_{i >= e} a_i.
    """
    schedule = toy_schedule(prediction)
    steps = schedule.steps
    mean = torch.tensor(MEAN, dtype=torch.float64, requires_grad=True)
    for start, stop in itertools.combinations(range(len(steps) + 1), 2):
        latents = sample(
            optimal_denoiser(schedule, mean),
            randn(6, 1),
            schedule,
            path=window(start, stop),
        )
        (actual,) = torch.autograd.grad(latents.sum(), [mean])
        product = math.prod(shrink(step) for step in steps[start:stop])
        carried = math.prod(linear_path(step, prediction) for step in steps[stop:])
        expected = (steps[stop - 1].alpha_next - product * steps[start].alpha) * carried
        assert float(actual) == pytest.approx(expected, abs=1e-12), (start, stop)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_with_the_true_noise_lands_on_the_next_noise_level(
    prediction: PredictionType, eta: float
) -> None:
    """Given the true x0 and eps, x' = alpha' x0 + d eps + s z with d^2 + s^2 = sigma'^2.

    So for independent eps and z, x' has the noise level sigma' whatever eta is.
    """
    for step in toy_schedule(prediction).steps:
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

        def land(x0: Tensor, epsilon: Tensor, noise: Tensor, step: Step = step) -> float:
            network = {
                "epsilon": epsilon,
                "v_prediction": step.alpha * epsilon - step.sigma * x0,
                "sample": x0,
                "flow": epsilon - x0,
            }[prediction]
            latents = step.alpha * x0 + step.sigma * epsilon
            return float(ddim_step(network, latents, step, prediction, eta=eta, noise=noise))

        if prediction == "epsilon" and step.alpha == 0.0:
            continue
        assert land(one, zero, zero) == pytest.approx(step.alpha_next, abs=1e-12)
        direction, spread = land(zero, one, zero), land(zero, zero, one)
        assert math.hypot(direction, spread) == pytest.approx(step.sigma_next, abs=1e-12)
        assert (spread > 0.0) == (eta > 0.0 and step.sigma_next > 0.0)


def test_eta_one_keeps_no_part_of_the_old_noise_beyond_the_posterior() -> None:
    """At eta = 1 the step is DDPM's: given x0, x' ~ q(x' | x, x0), a Gaussian posterior.

    For variance preserving levels with b = 1 - alpha^2/alpha'^2 its variance is
    (sigma'^2 / sigma^2) b (Ho et al. 2020, arXiv:2006.11239, eq. 7).
    """
    step = Step(0.0, math.cos(1.2), math.sin(1.2), math.cos(0.9), math.sin(0.9))
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    spread = float(ddim_step(zero, zero, step, "epsilon", eta=1.0, noise=one))
    beta = 1.0 - (step.alpha / step.alpha_next) ** 2
    assert spread**2 == pytest.approx((step.sigma_next / step.sigma) ** 2 * beta, rel=1e-12)


# --- Parts ---


def test_guidance_mixes_the_branches_with_the_unconditional_one_first() -> None:
    uncond, text = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 4.0])
    assert guide(uncond, text, 0.0).tolist() == [1.0, -2.0]
    assert guide(uncond, text, 1.0).tolist() == [2.0, 4.0]
    assert guide(uncond, text, 7.5).tolist() == [1.0 + 7.5 * 1.0, -2.0 + 7.5 * 6.0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_sample_and_noise_make_up_the_latents(prediction: PredictionType) -> None:
    noise_pred, latents = randn(1, *SHAPE), randn(2, *SHAPE)
    for step in toy_schedule(prediction).steps:
        if prediction == "epsilon" and step.alpha == 0.0:
            continue
        x0, epsilon = predict_x0_epsilon(noise_pred, latents, step, prediction)
        torch.testing.assert_close(step.alpha * x0 + step.sigma * epsilon, latents)
        network = {
            "epsilon": epsilon,
            "v_prediction": step.alpha * epsilon - step.sigma * x0,
            "sample": x0,
            "flow": epsilon - x0,
        }[prediction]
        torch.testing.assert_close(network, noise_pred)


def test_guidance_passes_gradcheck() -> None:
    inputs = [randn(i, 2, 3).requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: guide(a, b, 7.5), inputs)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_passes_gradcheck(prediction: PredictionType, eta: float) -> None:
    inputs = [randn(i, 2, 3).requires_grad_() for i in range(2)]
    step, noise = toy_schedule(prediction).steps[2], randn(3, 2, 3)
    assert torch.autograd.gradcheck(
        lambda output, latents: ddim_step(output, latents, step, prediction, eta=eta, noise=noise),
        inputs,
    )


def test_the_chain_asks_for_the_noise_of_each_step_once_and_in_order() -> None:
    schedule = toy_schedule("epsilon", 4)
    asked: list[int] = []

    def draw_noise(i: int) -> Tensor:
        asked.append(i)
        return randn(i, *SHAPE)

    latents = randn(9, *SHAPE)
    actual = sample(wavy_network, latents, schedule, eta=0.5, draw_noise=draw_noise)
    assert asked == [0, 1, 2, 3]
    for i, step in enumerate(schedule.steps):
        latents = ddim_step(
            wavy(latents, step.timestep), latents, step, "epsilon", eta=0.5, noise=randn(i, *SHAPE)
        )
    assert torch.equal(actual, latents)


def test_without_eta_no_noise_is_asked_for() -> None:
    def refuse(i: int) -> Tensor:
        raise AssertionError(f"noise of step {i} was asked for")

    sample(wavy_network, randn(9, *SHAPE), toy_schedule("epsilon", 3), draw_noise=refuse)


def test_eta_without_noise_is_refused() -> None:
    schedule = toy_schedule("epsilon", 3)
    latents = randn(1, *SHAPE)
    with pytest.raises(ValueError, match="noise"):
        ddim_step(latents, latents, schedule.steps[0], "epsilon", eta=0.5)
    with pytest.raises(ValueError, match="draw_noise"):
        sample(wavy_network, latents, schedule, eta=0.5)


def test_images_that_stop_earlier_leave_the_batch() -> None:
    schedule, noise, stops = toy_schedule("v_prediction", 5), randn(9, 4, *SHAPE), [5, 3, 3, 0]
    rows: list[int] = []

    def network(latents: Tensor, step: Step) -> Tensor:
        rows.append(len(latents))
        return wavy(latents, step.timestep)

    def draw_noise(i: int) -> Tensor:
        return randn(i, *noise.shape)

    latents = rollout(network, noise, schedule, stops=stops, eta=0.5, draw_noise=draw_noise)
    assert rows == [3, 3, 3, 1, 1]
    for image, stop in enumerate(stops):
        expected = noise[image]
        for i, step in enumerate(schedule.steps[:stop]):
            output = wavy(expected, step.timestep)
            fresh = draw_noise(i)[image]
            expected = ddim_step(output, expected, step, "v_prediction", eta=0.5, noise=fresh)
        assert torch.equal(latents[image], expected)


@pytest.mark.parametrize("stops", [[1, 2], [2]])
def test_stops_that_do_not_fit_the_batch_are_refused(stops: list[int]) -> None:
    with pytest.raises(ValueError, match="descending stops"):
        rollout(wavy_network, randn(1, 2, *SHAPE), toy_schedule("epsilon", 3), stops=stops)


def embeds(*rows: float) -> Embeds:
    return Embeds({"hidden": torch.tensor(rows, dtype=torch.float64).reshape(-1, 1, 1, 1)})


def predict_embeds(latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
    """A network whose answer says which branch it was asked for."""
    return latents + embeds.tensors["hidden"]


STEP = Step(500.0, math.sqrt(1 - 0.6**2), 0.6, 0.9, math.sqrt(1 - 0.9**2))


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(1.0), 3.0),
        (Guidance(7.5), 1.0 + 7.5 * 2.0),
        # At most 1 is no guidance, as in diffusers.
        (Guidance(0.0), 3.0),
        (Guidance(0.5), 3.0),
        (Guidance(1.01), 1.0 + 1.01 * 2.0),
        (Guidance(7.5, interval=(0.5, 0.7)), 16.0),
        (Guidance(7.5, interval=(0.7, 1.0)), 3.0),
        (Guidance(7.5, interval=(0.0, 0.5)), 3.0),
        (Guidance(0.0, origin="text"), 3.0),
        (Guidance(4.0, origin="text"), 3.0 + 4.0 * 2.0),
        (Guidance(7.5, rescale=lambda guided, text: guided * text), 16.0 * 3.0),
    ],
)
def test_guidance_combines_the_branches_as_its_family_counts(
    guidance: Guidance, expected: float
) -> None:
    conditioning = Conditioning(embeds(3.0, 3.0), embeds(1.0, 1.0))
    denoise = guided(predict_embeds, conditioning, guidance)
    assert denoise(torch.zeros(2, 1, 1, 1, dtype=torch.float64), STEP).flatten().tolist() == [
        pytest.approx(expected),
        pytest.approx(expected),
    ]


def test_both_branches_go_through_the_network_in_one_batch_and_one_branch_alone_elsewhere() -> None:
    rows: list[list[float]] = []

    def predict(latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        rows.append(embeds.tensors["hidden"].flatten().tolist())
        return latents

    conditioning = Conditioning(embeds(3.0, 4.0), embeds(1.0, 2.0))
    latents = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    guided(predict, conditioning, Guidance(7.5))(latents, STEP)
    guided(predict, conditioning, Guidance(7.5))(latents[:1], STEP)
    guided(predict, conditioning, Guidance(1.0))(latents, STEP)
    guided(predict, Conditioning(conditioning.text), Guidance(7.5))(latents, STEP)
    assert rows == [[1.0, 2.0, 3.0, 4.0], [1.0, 3.0], [3.0, 4.0], [3.0, 4.0]]


@dataclass
class BranchNetwork:
    """A network with a weight, smooth in it and the latents, that notes how it was called."""

    weight: Tensor = field(default_factory=lambda: randn(41, 1).requires_grad_())
    called: list[tuple[int, bool]] = field(default_factory=list)

    def __call__(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        self.called.append((len(latents), torch.is_grad_enabled()))
        return torch.tanh(self.weight * latents + embeds.tensors["hidden"])


def test_a_detached_branch_is_a_constant_for_the_gradient_and_changes_no_value() -> None:
    """Against the formula u + w (c - u) with u detached, over three calls."""
    conditioning = Conditioning(embeds(0.3, 0.4), embeds(-0.1, 0.2))
    schedule, noise = toy_schedule("flow", 3), randn(42, 2, 1, 2, 2)
    network = BranchNetwork()
    denoise = guided(network, conditioning, Guidance(4.0), detach_uncond=True)
    latents = sample(denoise, noise, schedule, path=window(0, 3))
    (actual,) = torch.autograd.grad(latents.sin().sum(), [network.weight])
    # Each branch by itself, the unconditional one without gradient.
    assert network.called == [(2, False), (2, True)] * 3

    x = noise
    for step in schedule.steps:
        branches = [
            torch.tanh(network.weight * x + e.tensors["hidden"])
            for e in (embeds(-0.1, 0.2), embeds(0.3, 0.4))
        ]
        uncond = branches[0].detach()
        output = uncond + 4.0 * (branches[1] - uncond)
        x = x + (step.sigma_next - step.sigma) * output
    (expected,) = torch.autograd.grad(x.sin().sum(), [network.weight])
    torch.testing.assert_close(latents.detach(), x.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)
    whole = guided(network, conditioning, Guidance(4.0))
    both = sample(whole, noise, schedule, path=window(0, 3))
    torch.testing.assert_close(both.detach(), x.detach(), rtol=1e-13, atol=1e-14)
    (other,) = torch.autograd.grad(both.sin().sum(), [network.weight])
    assert float(other) != pytest.approx(float(expected), rel=0.01)


def test_a_recomputed_call_with_a_detached_branch_repeats_itself_bit_for_bit() -> None:
    conditioning = Conditioning(embeds(0.3, 0.4), embeds(-0.1, 0.2))
    schedule, noise = toy_schedule("flow", 3), randn(42, 2, 1, 2, 2)
    found: list[tuple[Tensor, Tensor | None]] = []
    for recomputed in ((), (0, 1, 2)):
        network = BranchNetwork()
        denoise = guided(network, conditioning, Guidance(4.0), detach_uncond=True)
        latents = sample(denoise, noise, schedule, path=window(0, 3), recomputed=recomputed)
        latents.sin().sum().backward()
        found.append((latents.detach(), network.weight.grad))
    (values, gradient), (again, repeated) = found
    assert torch.equal(values, again)
    assert gradient is not None
    assert repeated is not None
    assert torch.equal(gradient, repeated)


def test_where_there_is_no_guidance_nothing_is_detached() -> None:
    conditioning = Conditioning(embeds(0.3, 0.4), embeds(-0.1, 0.2))
    latents = randn(42, 2, 1, 2, 2)
    for guidance in (Guidance(1.0), Guidance(4.0, interval=(0.9, 1.0))):
        network = BranchNetwork()
        guided(network, conditioning, guidance, detach_uncond=True)(latents, STEP)
        assert network.called == [(2, True)]
