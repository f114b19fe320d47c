"""Where the gradient flows: the laws of the window, and what the estimators draw."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from alignprop_cli.estimators import (
    Estimator,
    GradPath,
    full,
    gaussian_k,
    last_k,
    random_k,
    window,
    window_group,
)
from alignprop_cli.sampling import ddim_step, sample
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step
from tests.factories import generator, randn

STEPS = 5
SHAPE = (2, 3)


def schedule(prediction: PredictionType) -> NoiseSchedule:
    angles = [1.4 * (1.0 - i / STEPS) for i in range(STEPS + 1)]
    levels = [(math.cos(angle), math.sin(angle)) for angle in angles]
    steps = (Step(float(i), *a, *b) for i, (a, b) in enumerate(itertools.pairwise(levels)))
    return NoiseSchedule(tuple(steps), prediction)


class CountingNetwork:
    """A small smooth network that notes under which gradient mode it was called."""

    def __init__(self) -> None:
        self.weight = randn(1, 3, 3).requires_grad_()
        self.calls: list[bool] = []
        self.inputs_attached: list[bool] = []

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        self.inputs_attached.append(latents.requires_grad)
        return torch.tanh(latents @ self.weight + 0.2 * step.timestep)


def chain_gradient(
    prediction: PredictionType, path: GradPath, eta: float, *, use_checkpoint: bool = False
) -> tuple[Tensor, Tensor]:
    """Return value and gradient of a loss at the end of the chain."""
    network = CountingNetwork()
    latents = sample(
        network,
        randn(2, *SHAPE),
        schedule(prediction),
        eta=eta,
        path=path,
        draw_noise=lambda i: randn(10 + i, *SHAPE),
        recomputed=path.calls if use_checkpoint else (),
    )
    loss = latents.sin().sum()
    loss.backward()  # not autograd.grad: `recomputed` calls give their gradient to this alone
    assert network.weight.grad is not None
    return loss.detach(), network.weight.grad


def detached_gradient(
    prediction: PredictionType, path: GradPath, eta: float
) -> tuple[Tensor, Tensor]:
    """The same by running every step with gradient, and detaching outputs outside the window."""
    network = CountingNetwork()
    latents = randn(2, *SHAPE)
    for i, step in enumerate(schedule(prediction).steps):
        noise_pred = network(latents, step)
        if i not in path:
            noise_pred = noise_pred.detach()
        noise = randn(10 + i, *SHAPE)
        latents = ddim_step(noise_pred, latents, step, prediction, eta=eta, noise=noise)
    loss = latents.sin().sum()
    (gradient,) = torch.autograd.grad(loss, [network.weight])
    return loss.detach(), gradient


ALL_WINDOWS = [window(a, b) for a, b in itertools.combinations(range(STEPS + 1), 2)]


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_window_equals_detaching_the_outputs_outside_it(
    prediction: PredictionType, eta: float, use_checkpoint: bool
) -> None:
    for path in ALL_WINDOWS:
        value, gradient = chain_gradient(prediction, path, eta, use_checkpoint=use_checkpoint)
        expected_value, expected = detached_gradient(prediction, path, eta)
        # The same operations in the same order: equal up to the order of sums in backward.
        torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)
        if not (prediction == "sample" and path.calls[-1] + 1 < STEPS):
            # With clean-sample prediction the last step forgets its input: sigma' / sigma = 0.
            assert float(gradient.norm()) > 1e-6, path


def test_last_k_window_equals_full_backprop_when_k_is_num_steps() -> None:
    last = last_k(STEPS).draw(STEPS, generator(0))[0]
    whole = full().draw(STEPS, generator(0))[0]
    assert last == whole == window(0, STEPS)
    value, gradient = chain_gradient("epsilon", last, 0.0)
    network = CountingNetwork()
    latents = randn(2, *SHAPE)
    for step in schedule("epsilon").steps:
        latents = ddim_step(network(latents, step), latents, step, "epsilon")
    loss = latents.sin().sum()
    (expected,) = torch.autograd.grad(loss, [network.weight])
    assert float(value) == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=0.0)


def test_truncation_is_biased() -> None:
    # Documented, not wanted: fewer calls give another direction, not a noisy version of the same.
    whole = chain_gradient("epsilon", window(0, STEPS), 0.0)[1]
    last = chain_gradient("epsilon", window(STEPS - 1, STEPS), 0.0)[1]
    assert float((whole - last).norm() / whole.norm()) > 0.05


@pytest.mark.parametrize("path", ALL_WINDOWS)
def test_only_the_calls_inside_the_window_carry_gradient(path: GradPath) -> None:
    network = CountingNetwork()
    sample(network, randn(2, *SHAPE), schedule("epsilon"), path=path)
    assert network.calls == [i in path for i in range(STEPS)]
    assert sum(network.calls) == len(path)
    # Before the window nothing is attached, so nothing is stored; the first call inside has a
    # constant as its input.
    assert network.inputs_attached == [i > path.calls[0] for i in range(STEPS)]


@pytest.mark.parametrize("recomputed", [window(1, 4), window(1, 3), window(1, 1)])
def test_backward_repeats_exactly_the_calls_that_are_not_stored(recomputed: GradPath) -> None:
    network = CountingNetwork()
    latents = sample(
        network,
        randn(2, *SHAPE),
        schedule("epsilon"),
        path=window(1, 4),
        recomputed=recomputed.calls,
    )
    # The first call of the window has no gradient to its latents, and its graph is kept; the graphs
    # of the others are not.
    kept = [i in (1, 2, 3) and (i == 1 or i not in recomputed) for i in range(STEPS)]
    assert network.calls == kept
    latents.sum().backward()
    assert network.calls[STEPS:] == [True] * len(recomputed)


@pytest.mark.parametrize("path", ALL_WINDOWS)
def test_checkpointing_changes_no_bit(path: GradPath) -> None:
    stored = chain_gradient("v_prediction", path, 1.0)
    recomputed = chain_gradient("v_prediction", path, 1.0, use_checkpoint=True)
    assert torch.equal(stored[0], recomputed[0])
    assert torch.equal(stored[1], recomputed[1])


def test_the_values_do_not_depend_on_the_window() -> None:
    values = {float(chain_gradient("epsilon", path, 1.0)[0]) for path in ALL_WINDOWS}
    assert len(values) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_a_roll_out_keeps_no_graph(grad: bool) -> None:
    network = CountingNetwork()
    with torch.set_grad_enabled(grad):
        path = None if grad else window(0, STEPS)
        noise = randn(2, *SHAPE).requires_grad_()
        latents = sample(network, noise, schedule("epsilon"), path=path)
        assert torch.is_grad_enabled() is grad
    assert not latents.requires_grad
    assert network.calls == [False] * STEPS


def test_the_gradient_mode_of_the_caller_is_put_back_when_the_network_fails() -> None:
    def fail(latents: Tensor, step: Step) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        sample(fail, randn(2, *SHAPE), schedule("epsilon"), path=window(3, 4))
    assert torch.is_grad_enabled()


def test_a_window_knows_its_calls() -> None:
    path = window(2, 4)
    assert [i in path for i in range(6)] == [False, False, True, True, False, False]
    assert len(path) == 2
    assert len(window(3, 2)) == 0


# --- What the estimators draw ---


@pytest.mark.parametrize("k", [0, -1, STEPS + 1])
def test_a_window_of_no_call_or_of_too_many_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"got k={k}"):
        last_k(k).draw(STEPS, generator(0))[0]


@pytest.mark.parametrize(("k_min", "k_max"), [(0, 3), (3, 2), (1, STEPS + 1), (STEPS + 1, None)])
def test_random_k_refuses_an_impossible_range(k_min: int, k_max: int | None) -> None:
    with pytest.raises(ValueError, match="expected 1 to num_inference_steps"):
        random_k(k_min, k_max).draw(STEPS, generator(0))[0]


@pytest.mark.parametrize(
    ("estimator", "steps"),
    [
        (gaussian_k(), 1),
        (gaussian_k(mean=0.0), 5),
        (gaussian_k(mean=1.0), 5),
        (gaussian_k(std=-0.1), 5),
    ],
)
def test_gaussian_k_refuses_what_would_never_end(estimator: Estimator, steps: int) -> None:
    with pytest.raises(ValueError, match="gaussian_k"):
        estimator.draw(steps, generator(0))


@pytest.mark.parametrize("k", range(1, STEPS + 1))
def test_last_k_ends_at_the_image(k: int) -> None:
    assert last_k(k).draw(STEPS, generator(0))[0] == window(STEPS - k, STEPS)


@pytest.mark.parametrize("estimator", [full(), last_k(2)])
def test_deterministic_estimators_leave_the_generator_untouched(estimator: Estimator) -> None:
    source = generator(4)
    before = source.get_state()
    estimator.draw(STEPS, source)
    assert torch.equal(before, source.get_state())


@pytest.mark.parametrize("estimator", [random_k(), random_k(2, 4), gaussian_k()])
def test_a_draw_is_a_function_of_the_generator_alone(estimator: Estimator) -> None:
    state = torch.get_rng_state()
    first = [estimator.draw(50, generator(seed))[0] for seed in range(20)]
    again = [estimator.draw(50, generator(seed))[0] for seed in range(20)]
    assert first == again
    assert len(set(first)) > 1
    assert torch.equal(state, torch.get_rng_state())


def check_frequencies(counts: Counter[int], probabilities: dict[int, float]) -> None:
    """Every count within 5 standard deviations of its binomial law: fails once in a million."""
    total = sum(counts.values())
    assert counts.keys() <= probabilities.keys()
    for value, probability in probabilities.items():
        spread = math.sqrt(total * probability * (1.0 - probability))
        assert abs(counts[value] - total * probability) <= 5.0 * spread + 1.0, value


@pytest.mark.parametrize(("k_min", "k_max"), [(1, None), (2, 5), (3, 3)])
def test_random_k_is_uniform_on_its_range(k_min: int, k_max: int | None) -> None:
    source, steps = generator(11), 8
    windows = [random_k(k_min, k_max).draw(steps, source)[0] for _ in range(4000)]
    assert all(path.calls[-1] == steps - 1 for path in windows)
    values = range(k_min, (k_max or steps) + 1)
    check_frequencies(
        Counter(len(path) for path in windows), {k: 1.0 / len(values) for k in values}
    )


@pytest.mark.parametrize(
    ("mean", "std", "steps"), [(0.84, 0.1, 50), (0.84, 0.1, 10), (0.5, 0.4, 6)]
)
def test_gaussian_k_starts_at_a_rounded_normal_cut_off_at_the_ends(
    mean: float, std: float, steps: int
) -> None:
    """P(s = j) is the normal mass of [j - 1/2, j + 1/2] for 1 <= j < T, divided by their sum."""

    def cdf(x: float) -> float:
        return 0.5 * (1.0 + math.erf((x - mean * steps) / (std * steps * math.sqrt(2.0))))

    masses = {j: cdf(j + 0.5) - cdf(j - 0.5) for j in range(1, steps)}
    total = sum(masses.values())
    source = generator(12)
    windows = [gaussian_k(mean, std).draw(steps, source)[0] for _ in range(4000)]
    assert all(path.calls[-1] == steps - 1 for path in windows)
    check_frequencies(
        Counter(path.calls[0] for path in windows), {j: m / total for j, m in masses.items()}
    )


def test_gaussian_k_without_spread_is_its_mean_and_always_ends() -> None:
    assert gaussian_k(0.84, 0.0).draw(50, generator(0))[0] == window(42, 50)
    assert gaussian_k(0.99, 0.0).draw(4, generator(0))[0] == window(3, 4)
    assert gaussian_k(0.01, 0.0).draw(4, generator(0))[0] == window(1, 4)


def test_the_draws_of_a_step_are_stratified_over_its_groups() -> None:
    """With G groups and G values of k, every value comes once a step; each group sees them all."""
    source, groups = generator(13), 8
    steps = [random_k(1, 8).draw(8, source, groups) for _ in range(3000)]
    assert all(sorted(map(len, paths)) == list(range(1, 9)) for paths in steps)
    for group in range(groups):
        check_frequencies(
            Counter(len(paths[group]) for paths in steps), {k: 1 / 8 for k in range(1, 9)}
        )


def test_stratified_draws_vary_less_and_have_the_same_mean() -> None:
    source, estimator = generator(14), gaussian_k(0.5, 0.2)
    means = {
        groups: torch.tensor(
            [
                sum(map(len, estimator.draw(40, source, groups))) / groups
                for _ in range(2000 // groups)
            ],
            dtype=torch.float64,
        )
        for groups in (1, 4)
    }
    variance = means[1].var()
    # The mean of 4 independent draws would have a quarter of the variance.
    assert means[4].var() < 0.5 * variance / 4
    for mean in means.values():
        deviation = float(variance / len(mean)) ** 0.5
        assert float(mean.mean()) == pytest.approx(estimator.mean(40), abs=5 * deviation)


@pytest.mark.parametrize(
    "estimator", [full(), last_k(3), random_k(2, 7), random_k(), gaussian_k(), gaussian_k(0.5, 0.3)]
)
def test_what_the_planner_is_told_are_the_sizes_that_are_drawn(estimator: Estimator) -> None:
    steps, source = 10, generator(15)
    sizes = [len(estimator.draw(steps, source)[0]) for _ in range(4000)]
    assert max(sizes) <= estimator.longest(steps)
    assert sum(estimator.sizes(steps).values()) == pytest.approx(1.0, abs=1e-12)
    for beyond in (0, 2, 5):
        mean = estimator.mean_beyond(steps, beyond)
        chances = estimator.sizes(steps).items()
        variance = sum(p * (max(k - beyond, 0) - mean) ** 2 for k, p in chances)
        seen = sum(max(k - beyond, 0) for k in sizes) / len(sizes)
        assert seen == pytest.approx(mean, abs=5.0 * math.sqrt(variance / len(sizes)) + 1e-9)


@pytest.mark.parametrize(
    ("batch_size", "group"),
    [(128, 32), (32, 8), (30, 10), (24, 8), (16, 8), (27, 9), (25, 25), (9, 9), (8, 8), (1, 1)],
)
def test_the_default_group_depends_on_the_batch_alone(batch_size: int, group: int) -> None:
    assert window_group(batch_size) == group
