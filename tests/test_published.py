"""The published estimators: each against a loop written from its paper, and in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from alignprop_cli.calls import calls_in
from alignprop_cli.estimators import (
    Endpoint,
    Estimator,
    GradPath,
    draft_lv,
    drtune,
    full,
    last_k,
    leap,
    refl,
    sparse,
    window,
)
from alignprop_cli.planning.chain import Chain
from alignprop_cli.sampling import ddim_step, sample
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step
from tests.factories import generator, randn

STEPS = 6
SHAPE = (2, 3)
COPIES = 2
PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "flow")
# Each with values of its own, so that none is right by its default.
PUBLISHED = {
    "draft_lv": draft_lv(COPIES),
    "draft_lv copies": draft_lv(COPIES, own_end=False),
    "refl": refl((0.5, 1.0)),
    "drtune": drtune(2, (0.5, 1.0)),
    "leap": leap(0.3, 0.02),
    "sparse": sparse(3, 1.0, 0.5),
}


def schedule(prediction: PredictionType, steps: int = STEPS) -> NoiseSchedule:
    """Levels that end a little above the clean one, as Stable Diffusion's do."""
    if prediction == "flow":
        sigmas = [1.0 - 0.99 * i / steps for i in range(steps + 1)]
        levels = [(1.0 - sigma, sigma) for sigma in sigmas]
    else:
        angles = [1.4 - 1.35 * i / steps for i in range(steps + 1)]
        levels = [(math.cos(angle), math.sin(angle)) for angle in angles]
    pairs = enumerate(itertools.pairwise(levels))
    return NoiseSchedule(tuple(Step(float(i), *a, *b) for i, (a, b) in pairs), prediction)


class Network:
    """A small smooth network that notes under which gradient mode it was called."""

    def __init__(self) -> None:
        self.weight = randn(1, 3, 3).requires_grad_()
        self.calls: list[bool] = []

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return torch.tanh(latents @ self.weight + 0.2 * step.timestep)


def noise(i: int) -> Tensor:
    return randn(10 + i, *SHAPE)


def reward(latents: Tensor) -> Tensor:
    """One number an image, not linear: the value at which its gradient is taken matters."""
    return (latents.sin() + latents.square()).sum(dim=-1)


Call = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class Loop:
    """What the loops below share: the formulas of a step, written out for each kind of network."""

    prediction: PredictionType
    eta: float
    endpoint: Endpoint | None

    @property
    def steps(self) -> Sequence[Step]:
        return schedule(self.prediction).steps

    def start(self) -> Tensor:
        return randn(2, *SHAPE)

    def noise(self, i: int) -> Tensor:
        return noise(i)

    def reward(self, latents: Tensor) -> Tensor:
        return reward(latents)

    def clean(self, output: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """x0 and epsilon."""
        alpha, sigma = self.steps[i].alpha, self.steps[i].sigma
        if self.prediction == "epsilon":
            return (x - sigma * output) / alpha, output
        if self.prediction == "flow":
            return x - sigma * output, x + (1.0 - sigma) * output
        return alpha * x - sigma * output, alpha * output + sigma * x

    def to(self, level: tuple[float, float], output: Tensor, x: Tensor, i: int) -> Tensor:
        """The deterministic step from call i to a level (alpha, sigma)."""
        x0, epsilon = self.clean(output, x, i)
        return level[0] * x0 + level[1] * epsilon

    def step(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        fresh = self.noise(i) if self.eta else None
        return ddim_step(output, x, self.steps[i], self.prediction, eta=self.eta, noise=fresh)

    def level(self, call: int) -> tuple[float, float]:
        """The level before a call; T is the end of the chain."""
        if call < len(self.steps):
            return self.steps[call].alpha, self.steps[call].sigma
        return self.steps[-1].alpha_next, self.steps[-1].sigma_next

    def chain(self, network: Call) -> list[Tensor]:
        """The latents before every call and at the end, without gradient."""
        states = [self.start()]
        with torch.no_grad():
            for i in range(len(self.steps)):
                states.append(self.step(network(states[-1], self.steps[i]), states[-1], i))
        return states


def onto(value: Tensor, gradient: Tensor) -> Tensor:
    """Straight-through: the values of one, the gradient of the other."""
    return gradient + (value - gradient).detach()


def plain_draft_lv(loop: Loop, path: GradPath, network: Call) -> Tensor:
    """DRaFT-LV: the last step, then n steps from the end noised back; the mean of all."""
    states, last, steps = loop.chain(network), loop.steps[-1], len(loop.steps)

    def end(x: Tensor, *, own: bool) -> Tensor:
        output = network(x, last)
        if loop.endpoint == "predicted":
            return loop.clean(output, x, steps - 1)[0]
        return loop.step(output, x, steps - 1) if own else loop.to(loop.level(steps), output, x, -1)

    ends = [end(states[-2], own=True)] if path.own_end else []
    base = ends[0].detach() if ends else states[-1]
    ends += [
        end(last.alpha * base + last.sigma * loop.noise(steps + j), own=False)
        for j in range(COPIES)
    ]
    return torch.stack([loop.reward(x).sum() for x in ends]).sum()


def plain_refl(loop: Loop, path: GradPath, network: Call) -> Tensor:
    """ReFL: no gradient up to call m, one call, the clean sample that it predicts."""
    states, (m,) = loop.chain(network), path.calls
    x0, _ = loop.clean(network(states[m], loop.steps[m]), states[m], m)
    return loop.reward(onto(states[-1], x0) if loop.endpoint == "chain" else x0).sum()


def plain_drtune(loop: Loop, path: GradPath, network: Call) -> Tensor:
    """DRTune: every input detached, some outputs too; x0 at the stop."""
    states, x = loop.chain(network), loop.start()
    for i in range(len(loop.steps)):
        output = network(x.detach(), loop.steps[i])
        output = output if i in path.calls else output.detach()
        if i == path.stop:
            x0, _ = loop.clean(output, x, i)
            return loop.reward(onto(states[-1], x0) if loop.endpoint == "chain" else x0).sum()
        x = loop.step(output, x, i)
    raise AssertionError


def plain_leap(loop: Loop, path: GradPath, network: Call) -> Tensor:
    """LeapAlign: two jumps onto the true chain, the second input mixed, images weighted."""
    states, (k, j) = loop.chain(network), path.calls
    jump = loop.to(loop.level(j), network(states[k], loop.steps[k]), states[k], k)
    x_j = onto(states[j], jump)
    mixed = 0.3 * x_j + 0.7 * x_j.detach()
    output = network(mixed, loop.steps[j])
    d_j = (jump - states[j]).abs().flatten(1).mean(dim=1).detach()
    if loop.endpoint == "predicted":
        end, _ = loop.clean(output, x_j, j)
        d_0 = torch.zeros_like(d_j)
    else:
        landed = loop.to(loop.level(len(loop.steps)), output, x_j, j)
        end, gap = onto(states[-1], landed), landed - states[-1]
        d_0 = gap.abs().flatten(1).mean(dim=1).detach()
    return (loop.reward(end) / (d_j.clamp(min=0.02) + d_0.clamp(min=0.02))).sum()


def plain_sparse(loop: Loop, path: GradPath, network: Call) -> Tensor:
    """FlowBP-Sparse: calls repeated at stored latents, the chain composed of stored outputs."""
    states, steps = loop.chain(network), loop.steps
    with torch.no_grad():
        outputs = {i: network(states[i], steps[i]) for i in range(len(steps))}
    outputs |= {i: network(states[i], steps[i]) for i in path.calls}
    covered = sum(steps[i].sigma - steps[i].sigma_next for i in path.calls)
    factor = 1.0 + 0.5 * ((steps[0].sigma - steps[-1].sigma_next) / covered - 1.0)
    x = states[0]
    for i in range(len(steps)):
        if loop.endpoint == "predicted" and i == path.calls[-1]:
            return factor * loop.reward(loop.clean(outputs[i], x, i)[0]).sum()
        x = loop.step(outputs[i], x, i)
    return factor * loop.reward(onto(states[-1], x)).sum()


PLAIN: dict[str, Callable[[Loop, GradPath, Call], Tensor]] = {
    "draft_lv": plain_draft_lv,
    "draft_lv copies": plain_draft_lv,
    "refl": plain_refl,
    "drtune": plain_drtune,
    "leap": plain_leap,
    "sparse": plain_sparse,
}


def run(
    loop: Loop, path: GradPath, *, use_checkpoint: bool = False
) -> tuple[Tensor, Tensor, Network]:
    """Return the ends, the gradient of the sum of their rewards, and the network."""
    network = Network()
    latents = sample(
        network,
        randn(2, *SHAPE),
        schedule(loop.prediction),
        eta=loop.eta,
        path=path,
        draw_noise=noise,
        recomputed=path.calls if use_checkpoint else (),
    )
    reward(latents).sum().backward()
    assert network.weight.grad is not None
    return latents.detach(), network.weight.grad, network


@pytest.mark.parametrize("endpoint", [None, "chain", "predicted"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_gradient_equals_that_of_a_loop_written_from_the_paper(
    name: str, prediction: PredictionType, eta: float, endpoint: Endpoint | None
) -> None:
    loop = Loop(prediction, eta, endpoint)
    for path in replace(PUBLISHED[name], endpoint=endpoint).draw(STEPS, generator(16), 5):
        ends, gradient, network = run(loop, path)
        assert sum(network.calls) == len(path), path
        theirs = Network()
        (expected,) = torch.autograd.grad(PLAIN[name](loop, path, theirs), [theirs.weight])
        assert float(expected.norm()) > 1e-6
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)
        # With its calls recomputed it is the same, bit for bit.
        again, recomputed, _ = run(loop, path, use_checkpoint=True)
        assert torch.equal(again, ends)
        assert torch.equal(recomputed, gradient)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("name", PUBLISHED)
def test_with_the_endpoint_chain_the_reward_sees_the_end_of_the_true_chain(
    name: str, eta: float
) -> None:
    loop = Loop("v_prediction", eta, "chain")
    expected = loop.chain(Network())[-1]
    for path in replace(PUBLISHED[name], endpoint="chain").draw(STEPS, generator(17), 3):
        ends, _, _ = run(loop, path)
        if path.own_end:
            torch.testing.assert_close(ends[: len(expected)], expected, rtol=1e-13, atol=1e-14)
        assert len(ends) == path.ends * len(expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_chain_makes_the_calls_that_are_planned(name: str) -> None:
    """Counted by a stub, over every path that can be drawn."""
    for endpoint in (None, "chain", "predicted"):
        estimator = replace(PUBLISHED[name], endpoint=endpoint)
        paths = estimator.paths(STEPS)
        assert sum(p for _, p in paths) == pytest.approx(1.0, abs=1e-12)
        for path, _ in paths:
            _, _, network = run(Loop("flow", 0.0, endpoint), path)
            chain = path.chain_calls(STEPS)
            assert len(network.calls) == chain + path.copies
            before = path.rollout_calls(STEPS)
            assert not any(network.calls[:before])
            assert before == chain or network.calls[before]
            assert sum(network.calls) == len(path)
            assert len(path) <= estimator.longest(STEPS)


@pytest.mark.parametrize("rollout_steps", [None, 1, 3])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_planner_counts_the_calls_of_the_chain(name: str, rollout_steps: int | None) -> None:
    """The mean over all paths of the calls that a stub sees, those of the roll-out replaced."""
    estimator, levels = PUBLISHED[name], schedule("flow")
    expected = dict.fromkeys(("rolled_out", "between", "mean"), 0.0)
    for path, probability in estimator.paths(STEPS):
        before, chain = path.calls[0], levels
        if rollout_steps is not None and rollout_steps < before:
            chain, path = (
                levels.shortened(before, rollout_steps),
                path.earlier(before - rollout_steps),
            )
        network = Network()
        sample(network, randn(2, *SHAPE), chain, path=path, draw_noise=noise)
        rolled = path.rollout_calls(len(chain))
        expected["rolled_out"] += probability * rolled
        expected["mean"] += probability * sum(network.calls)
        expected["between"] += probability * network.calls[rolled:].count(False)
    planned = Chain(num_inference_steps=STEPS, estimator=estimator, rollout_steps=rollout_steps)
    for part, calls in expected.items():
        assert getattr(planned, part) == pytest.approx(calls, abs=1e-9), part
    assert planned.calls == pytest.approx(sum(expected.values()))


# --- Special cases that are another estimator ---


def gradient_of(estimator: Estimator, prediction: PredictionType = "v_prediction") -> Tensor:
    (path,) = estimator.draw(STEPS, generator(18))
    return run(Loop(prediction, 0.0, None), path)[1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sparse_with_all_calls_is_full_with_detached_inputs(prediction: PredictionType) -> None:
    expected = gradient_of(replace(full(), input_grad=0.0), prediction)
    torch.testing.assert_close(gradient_of(sparse(STEPS), prediction), expected)
    # All calls cover the whole path, so there is nothing to scale up for.
    torch.testing.assert_close(gradient_of(sparse(STEPS, rescale=1.0), prediction), expected)
    stopped = drtune(STEPS, (1.0 - 0.5 / STEPS, 1.0))
    ends_there = replace(full(), input_grad=0.0, endpoint="predicted")
    torch.testing.assert_close(
        gradient_of(stopped, prediction), gradient_of(ends_there, prediction)
    )


def test_two_attached_leaps_over_one_step_each_are_the_last_two_calls() -> None:
    neighbours = GradPath((STEPS - 2, STEPS - 1), leaps=True)
    loop = Loop("v_prediction", 0.0, None)
    expected = run(loop, window(STEPS - 2, STEPS))[1]
    torch.testing.assert_close(run(loop, neighbours)[1], expected, rtol=1e-12, atol=1e-14)


def test_refl_of_the_last_call_is_last_k_one_where_the_chain_ends_clean() -> None:
    levels = schedule("v_prediction").steps
    clean = NoiseSchedule(
        (*levels[:-1], replace(levels[-1], alpha_next=1.0, sigma_next=0.0)), "v_prediction"
    )
    gradients: list[Tensor] = []
    for estimator in (refl((0.999, 1.0)), last_k(1)):
        network, (path,) = Network(), estimator.draw(STEPS, generator(0))
        reward(sample(network, randn(2, *SHAPE), clean, path=path)).sum().backward()
        assert network.weight.grad is not None
        gradients.append(network.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "estimator",
    [
        drtune(0),
        drtune(STEPS + 1),
        sparse(0),
        sparse(STEPS + 1),
        sparse(4, span=(0.5, 1.0)),
        leap(span=(0.0, 0.1)),
        refl((0.5, 0.5)),
        refl((0.7, 0.2)),
        refl((-0.1, 0.5)),
    ],
)
def test_what_has_no_call_or_too_many_is_refused(estimator: Estimator) -> None:
    with pytest.raises(ValueError, match="expected"):
        estimator.draw(STEPS, generator(0))


# --- What they store ---


def stored_bytes(estimator: Estimator, steps: int, seed: int) -> int:
    """Bytes that the graph of a draw keeps, each tensor counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # A parameter is there anyway.
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    weight = torch.nn.Parameter(randn(1, 64, 64))
    (path,) = estimator.draw(steps, generator(seed))

    def network(latents: Tensor, step: Step) -> Tensor:
        x = latents
        for _ in range(8):
            x = torch.tanh(x @ weight)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents = sample(
            network,
            randn(2, 4, 64),
            schedule("flow", steps),
            path=path,
            draw_noise=lambda i: randn(10 + i, 4, 64),
        )
    assert latents.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("estimator", "calls"),
    [(leap(), 2), (drtune(3), 3), (sparse(4), 4), (refl(), 1), (draft_lv(2), 3)],
    ids=["leap", "drtune", "sparse", "refl", "draft_lv"],
)
def test_as_many_calls_are_stored_however_long_the_chain_is(
    estimator: Estimator, calls: int
) -> None:
    # One number for each image and jump of `leap` comes on top: its weight.
    one = stored_bytes(last_k(1), 10, 0)
    for steps in (10, 40):
        for seed in range(3):
            assert stored_bytes(estimator, steps, seed) <= calls * one + 8 * 4


# --- Closed forms on Gaussian data ---

MEAN, SPREAD = 0.7, 0.4


def optimal(levels: NoiseSchedule, mean: Tensor) -> Callable[[Tensor, Step], Tensor]:
    """The best network for data x0 ~ N(mean, SPREAD^2), affine in the latents.

    E[x0 | x] = m + (c^2 alpha / d) (x - alpha m) and E[eps | x] = (sigma / d) (x - alpha m), with
    d = alpha^2 c^2 + sigma^2.
    """

    def denoise(latents: Tensor, step: Step) -> Tensor:
        deviation = (latents - step.alpha * mean) / ((step.alpha * SPREAD) ** 2 + step.sigma**2)
        x0, epsilon = mean + SPREAD**2 * step.alpha * deviation, step.sigma * deviation
        return {
            "epsilon": epsilon,
            "v_prediction": step.alpha * epsilon - step.sigma * x0,
            "flow": epsilon - x0,
        }[levels.prediction_type]

    return denoise


@dataclass(frozen=True)
class Gaussian:
    """The chain on Gaussian data: x' - alpha' m = g (x - alpha m) from any level to any other."""

    levels: NoiseSchedule

    def level(self, call: int) -> tuple[float, float]:
        steps = self.levels.steps
        if call < len(steps):
            return steps[call].alpha, steps[call].sigma
        return steps[-1].alpha_next, steps[-1].sigma_next

    def shrink(self, call: int, to: tuple[float, float]) -> float:
        """g = (alpha alpha' c^2 + sigma sigma') / d."""
        alpha, sigma = self.level(call)
        return (alpha * to[0] * SPREAD**2 + sigma * to[1]) / (alpha**2 * SPREAD**2 + sigma**2)

    def by_mean(self, call: int, to: tuple[float, float]) -> float:
        """dx'/dm of a call whose input is a constant: alpha' - g alpha."""
        return to[0] - self.shrink(call, to) * self.level(call)[0]

    def linear(self, call: int, to: tuple[float, float]) -> float:
        """dx'/dx where the network's output is held fixed."""
        alpha, sigma = self.level(call)
        return {
            "epsilon": to[0] / alpha,
            "v_prediction": alpha * to[0] + sigma * to[1],
            "flow": to[0] + to[1],
        }[self.levels.prediction_type]

    def carried(self, first: int, stop: int) -> float:
        """dx_stop/dx_first where all outputs between are held fixed."""
        return math.prod(self.linear(i, self.level(i + 1)) for i in range(first, stop))

    def product(self, first: int, stop: int) -> float:
        """G: the true chain from one call to another."""
        return math.prod(self.shrink(i, self.level(i + 1)) for i in range(first, stop))


CLEAN = (1.0, 0.0)


def closed_form(form: Gaussian, path: GradPath, x: float) -> float:
    """d end / dm of a path for an image that starts at x; derived for each in turn.

    refl: the input is a constant, so d x0 / dm = 1 - g alpha, g to the clean level.
    drtune and sparse: all inputs are constants. Call i adds alpha' - g alpha, and the arithmetic of
    later steps carries it on; drtune's last step goes to the clean level.
    leap: dx_j/dm = alpha_j - g_kj alpha_k =: X. The second jump passes X on by its arithmetic (a)
    and a share alpha of it through the network (g - a), and adds its own alpha_T - g alpha_j. With
    y = x_k - alpha_k m the jumps land |g_kj - G| |y| and |g_jT - G| |G y| from the true latents.
    """
    steps = len(form.levels)
    end = form.level(steps)
    if path.leaps:
        k, j = path.calls
        to_j, to_end = form.shrink(k, form.level(j)), form.shrink(j, end)
        passed = form.by_mean(k, form.level(j))
        a = form.linear(j, end)
        total = (a + path.input_grad * (to_end - a)) * passed + form.by_mean(j, end)
        y = form.product(0, k) * (x - form.level(0)[0] * MEAN)
        d_j = abs(to_j - form.product(k, j)) * abs(y)
        d_0 = abs(to_end - form.product(j, steps)) * abs(form.product(k, j) * y)
        assert path.tau is not None
        return total / (max(d_j, path.tau) + max(d_0, path.tau))
    total = 0.0
    for i in path.calls:
        if i == path.stop:
            total += form.by_mean(i, CLEAN)
        elif path.stop is not None:
            there = form.by_mean(i, form.level(i + 1)) * form.carried(i + 1, path.stop)
            total += there * form.linear(path.stop, CLEAN)
        else:
            total += form.by_mean(i, form.level(i + 1)) * form.carried(i + 1, steps)
    return total * (1.0 + path.rescale * (1.0 / form.levels.path_share(path.calls) - 1.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["refl", "drtune", "leap", "sparse"])
def test_the_gradient_has_its_closed_form_on_gaussian_data(
    name: str, prediction: PredictionType
) -> None:
    levels = schedule(prediction)
    start = randn(5, 4, 1)
    for path in PUBLISHED[name].draw(STEPS, generator(20), 8):
        mean = torch.full((4, 1), MEAN, dtype=torch.float64, requires_grad=True)
        sample(optimal(levels, mean), start, levels, path=path).sum().backward()
        assert mean.grad is not None
        for image in range(4):
            expected = closed_form(Gaussian(levels), path, float(start[image]))
            # float64, six steps; divided by distances of 0.02 and more.
            assert float(mean.grad[image]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_copies_have_their_expectation_on_gaussian_data(prediction: PredictionType) -> None:
    """R = x_T^2 / 2, so its gradient in m is x' dx'/dm, with dx'/dm = alpha' - g alpha.

    A copy starts at x = alpha x_T + sigma n and ends at x' = alpha' m + g (x - alpha m), hence
    E x' = alpha' m + g alpha (x_T - m).
    """
    levels, images = schedule(prediction), 4000
    form, (path,) = Gaussian(levels), draft_lv(2, own_end=False).draw(STEPS, generator(0))
    mean = torch.full((images, 1), MEAN, dtype=torch.float64, requires_grad=True)
    start = randn(5, 1, 1).expand(images, 1)
    ends = sample(
        optimal(levels, mean),
        start,
        levels,
        path=path,
        draw_noise=lambda i: randn(30 + i, images, 1),
    )
    (0.5 * ends.square().sum() / path.ends).backward()
    assert mean.grad is not None
    (alpha, _), end = form.level(STEPS - 1), form.level(STEPS)
    x_end = end[0] * MEAN + form.product(0, STEPS) * (float(start[0]) - form.level(0)[0] * MEAN)
    shrink = form.shrink(STEPS - 1, end)
    landed = end[0] * MEAN + shrink * alpha * (x_end - MEAN)
    expected = landed * form.by_mean(STEPS - 1, end)
    error = float(mean.grad.std()) / math.sqrt(images)
    assert float(mean.grad.mean()) == pytest.approx(expected, abs=4.0 * error)
    # The check can fail: from the true last call the gradient is another one.
    real = x_end * form.by_mean(STEPS - 1, end)
    assert abs(real - expected) > 8.0 * error


def late_biased(steps: int, calls: int, bias: float, source: torch.Generator) -> tuple[int, ...]:
    """As FlowBP draws: torch.multinomial without replacement, weights (i + 1)^bias."""
    weights = torch.arange(1, steps + 1, dtype=torch.float64) ** bias
    return tuple(sorted(torch.multinomial(weights, calls, generator=source).tolist()))


def spaced(steps: int, calls: int, tail: int, source: torch.Generator) -> GradPath:
    """As DRTune draws: a stop among the last calls, then equally spaced ones up to it."""
    stop = steps - 1 - int(torch.randint(0, tail, (1,), generator=source))
    stride = (stop + 1) // calls
    most = stop - (calls - 1) * stride
    offset = int(torch.randint(0, most + 1, (1,), generator=source))
    return GradPath(tuple(offset + i * stride for i in range(calls)), stop)


def test_the_expected_gradient_is_that_of_draws_made_otherwise() -> None:
    """The mean over all paths and their probabilities, within 4 errors of a Monte Carlo."""
    form, source, x = Gaussian(schedule("flow")), generator(21), 0.3

    def two() -> GradPath:
        k, j = sorted(torch.randperm(STEPS, generator=source)[:2].tolist())
        return replace(PUBLISHED["leap"].path((k, j)))

    others: dict[str, Callable[[], GradPath]] = {
        "refl": lambda: PUBLISHED["refl"].path(
            *[(m := 3 + int(torch.randint(0, 3, (1,), generator=source)),)], stop=m
        ),
        "drtune": lambda: spaced(STEPS, 2, 3, source),
        "leap": two,
        "sparse": lambda: PUBLISHED["sparse"].path(late_biased(STEPS, 3, 1.0, source)),
    }
    for name, draw in others.items():
        estimator = PUBLISHED[name]
        paths = estimator.paths(STEPS)
        expected = sum(p * closed_form(form, path, x) for path, p in paths)
        drawn = torch.tensor(
            [closed_form(form, draw(), x) for _ in range(3000)], dtype=torch.float64
        )
        error = float(drawn.std()) / math.sqrt(len(drawn))
        # `sparse` is told to the planner as a tally of 2,000 draws, which errs a little itself.
        error *= 1.6 if name == "sparse" else 1.0
        assert float(drawn.mean()) == pytest.approx(expected, abs=4.0 * error), name
        ours = torch.tensor(
            [closed_form(form, path, x) for path in estimator.draw(STEPS, source, 500)],
            dtype=torch.float64,
        )
        assert float(ours.mean()) == pytest.approx(expected, abs=4.0 * error), name


# --- What they draw ---


def test_refl_draws_the_published_calls() -> None:
    paths = refl().draw(40, generator(22), 100)
    assert {path.calls[0] for path in paths} == set(range(30, 40))
    assert all(path.stop == path.calls[0] and path.endpoint == "predicted" for path in paths)


@pytest.mark.parametrize(("steps", "stops"), [(25, range(15, 25)), (5, range(3, 5)), (1, range(1))])
def test_drtune_stops_in_the_last_two_fifths(steps: int, stops: range) -> None:
    paths = [path for path, _ in drtune(min(3, steps)).paths(steps)]
    assert {path.stop for path in paths} == set(stops)
    for path in paths:
        gaps = {b - a for a, b in itertools.pairwise(path.calls)}
        assert len(gaps) <= 1
        assert path.stop is not None
        assert path.calls[0] >= 0
        assert path.calls[-1] <= path.stop


def test_where_there_are_fewer_calls_up_to_the_stop_all_of_them_carry_gradient() -> None:
    paths = {path.stop: path.calls for path, _ in drtune(4, (0.0, 1.0)).paths(4)}
    assert {stop: calls for stop, calls in paths.items() if stop is not None and stop < 3} == {
        0: (0,),
        1: (0, 1),
        2: (0, 1, 2),
    }
    assert drtune(4, (0.0, 1.0)).longest(4) == 4


def test_leap_draws_every_pair_alike() -> None:
    paths = leap().paths(5)
    assert [path.calls for path, _ in paths] == list(itertools.combinations(range(5), 2))
    assert {p for _, p in paths} == {0.1}
    assert {path.calls for path in leap().draw(5, generator(23), 10)} == {
        path.calls for path, _ in paths
    }


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.0])
def test_sparse_draws_with_a_late_bias_without_replacement(bias: float) -> None:
    """P(set) is the sum over its orders of the products of w / (what is left)."""
    steps, calls = 5, 2
    weights = [(i + 1.0) ** bias for i in range(steps)]
    whole = sum(weights)
    expected = dict.fromkeys(itertools.combinations(range(steps), calls), 0.0)
    for a, b in itertools.permutations(range(steps), 2):
        first, second = min(a, b), max(a, b)
        expected[first, second] += weights[a] / whole * weights[b] / (whole - weights[a])
    draws = {path.calls: p for path, p in sparse(calls, bias).paths(steps)}
    for found, probability in expected.items():
        # Of 2,000 draws; stratified, so it is less.
        spread = math.sqrt(probability * (1.0 - probability) / 2000)
        assert draws[found] == pytest.approx(probability, abs=4.0 * spread)


@pytest.mark.parametrize(
    ("span", "steps", "calls"),
    [
        ((0.75, 1.0), 40, range(30, 40)),
        ((0.6, 1.0), 25, range(15, 25)),
        ((0.6, 1.0), 5, range(3, 5)),
        ((0.0, 1.0), 7, range(7)),
        ((0.3, 0.31), 10, range(3, 4)),
        ((0.1, 0.3), 10, range(1, 3)),
        ((0.99, 1.0), 3, range(2, 3)),
    ],
)
def test_a_span_has_the_calls_that_lie_in_it(
    span: tuple[float, float], steps: int, calls: range
) -> None:
    assert calls_in(span, steps) == calls
