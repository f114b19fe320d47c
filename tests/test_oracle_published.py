"""The published estimators against loops from their papers over diffusers' own parts.

The loops are those of test_published.py. Here they call diffusers' U-Net once for each branch of
guidance and decode with its VAE; the noise levels come from its schedulers, and so do the steps of
the chain where the scheduler works in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from alignprop_cli.estimators import GradPath
from alignprop_cli.guidance import Guidance, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.sampling import sample
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step, flow_schedule
from tests.factories import generator, randn
from tests.test_oracle import (
    ALPHA,
    PROMPTS,
    RANK,
    RELATIVE,
    Adapter,
    Case,
    central_difference,
    flat,
    make_case,
    picture_reward,
)
from tests.test_published import PLAIN, PUBLISHED, Loop

STEPS = 4
FLOW_TIMESTEPS = (900, 600, 350, 90)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("published"), "epsilon")


@dataclass(frozen=True)
class DiffusersLoop(Loop):
    """The loops' formulas with the levels and steps of a scheduler of diffusers."""

    case: Case

    @cached_property
    def ddim(self) -> DDIMScheduler:
        scheduler = DDIMScheduler.from_pretrained(self.case.folder, subfolder="scheduler")
        scheduler.set_timesteps(STEPS)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        return scheduler

    @cached_property
    def levels(self) -> list[tuple[float, float]]:
        if self.prediction == "flow":
            return [(1.0 - float(s), float(s)) for s in flow_sigmas()]
        kept = [float(self.ddim.alphas_cumprod[t]) for t in self.ddim.timesteps]
        kept.append(float(self.ddim.final_alpha_cumprod))
        return [(a**0.5, (1.0 - a) ** 0.5) for a in kept]

    @cached_property
    def steps(self) -> Sequence[Step]:  # type: ignore[override]
        times = FLOW_TIMESTEPS if self.prediction == "flow" else self.ddim.timesteps.tolist()
        pairs = zip(times, self.levels[:-1], self.levels[1:], strict=True)
        return [Step(t, *now, *after) for t, now, after in pairs]

    def start(self) -> Tensor:
        return self.case.latents

    def noise(self, i: int) -> Tensor:
        return randn(40 + i, *self.case.latents.shape)

    def reward(self, latents: Tensor) -> Tensor:
        vae = self.case.oracle.vae
        return picture_reward(vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5)

    def step(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        if self.prediction == "flow":
            # `FlowMatchEulerDiscreteScheduler.step`, which itself works in float32.
            return x + (self.levels[i + 1][1] - self.levels[i][1]) * output
        noise = self.noise(i) if self.eta else None
        given = {"eta": self.eta, "variance_noise": noise}
        return self.ddim.step(output, self.ddim.timesteps[i], x, **given).prev_sample


def flow_sigmas() -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas.double().tolist()


def oracle_network(
    case: Case, adapter: Adapter, guidance: float, *, detach: bool
) -> Callable[[Tensor, Step], Tensor]:
    """The guided call of diffusers' network, with W + (alpha / rank) B A for each weight W."""
    unet, encoder, tokenizer = case.oracle.unet, case.oracle.encoder, case.oracle.tokenizer
    weights: dict[str, Tensor] = {name: p.detach() for name, p in unet.named_parameters()}
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = adapter[name], adapter[f"{layer}.lora_B.weight"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + ALPHA / RANK * up @ down
    options = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    embeds = [
        encoder(
            tokenizer(list(texts), truncation=True, **options).input_ids
        ).last_hidden_state.detach()
        for texts in ([""] * len(PROMPTS), PROMPTS)
    ]

    def predict(latents: Tensor, step: Step, hidden: Tensor) -> Tensor:
        arguments = (latents, torch.tensor(step.timestep), hidden)
        return torch.func.functional_call(unet, weights, arguments).sample

    def denoise(latents: Tensor, step: Step) -> Tensor:
        uncond, text = (predict(latents, step, hidden) for hidden in embeds)
        uncond = uncond.detach() if detach else uncond
        return uncond + guidance * (text - uncond)

    return denoise


def package_gradient(
    case: Case, loop: DiffusersLoop, path: GradPath, guidance: float, *, detach: bool
) -> tuple[Tensor, Adapter]:
    """The sum of rewards and its gradient as the package computes them."""
    network = case.model.network
    network.module.zero_grad()
    shape = (int(case.latents.shape[1]), *map(int, case.latents.shape[2:]))
    levels = network.schedule(STEPS, (shape[0], shape[1], shape[2]))
    if loop.prediction == "flow":
        levels = flow_schedule(flow_sigmas(), FLOW_TIMESTEPS)
    denoise = guided(
        network.predict,
        case.model.conditioning(PROMPTS, ""),
        Guidance(guidance),
        detach_uncond=detach,
    )
    ends = sample(denoise, case.latents, levels, eta=loop.eta, path=path, draw_noise=loop.noise)
    total = picture_reward(case.model.decoder.decode(ends)).sum()
    total.backward()
    named = dict(network.module.named_parameters())
    gradients = {
        name: named[name.replace(".weight", f".{lora.ADAPTER}.weight")].grad
        for name in case.adapter
    }
    return total.detach(), {n: g.clone() for n, g in gradients.items() if g is not None}


@pytest.mark.parametrize(
    ("prediction", "guidance", "eta", "detach"),
    [
        ("epsilon", 7.5, 0.0, False),
        ("epsilon", 3.0, 1.0, True),
        ("flow", 3.0, 0.0, False),
    ],
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_gradient_equals_that_of_a_loop_over_diffusers(
    case: Case,
    name: str,
    prediction: PredictionType,
    guidance: float,
    eta: float,
    detach: bool,
) -> None:
    loop = DiffusersLoop(prediction, eta, None, case)
    for path in PUBLISHED[name].draw(STEPS, generator(31), 1):
        total, gradients = package_gradient(case, loop, path, guidance, detach=detach)
        adapter = {n: value.clone().requires_grad_() for n, value in case.adapter.items()}
        network = oracle_network(case, adapter, guidance, detach=detach)
        value = PLAIN[name](loop, path, network)
        found = torch.autograd.grad(value, list(adapter.values()))
        expected = dict(zip(adapter, found, strict=True))
        assert float(flat(expected).norm()) > 1e-6
        assert gradients.keys() == expected.keys()
        error = (flat(gradients) - flat(expected)).norm() / flat(expected).norm()
        assert float(error) < RELATIVE
        if path.tau is None and not path.rescale:
            torch.testing.assert_close(total, value.detach(), rtol=RELATIVE, atol=0.0)


def test_a_detached_branch_gives_the_derivative_with_that_branch_held_fixed(case: Case) -> None:
    """Central differences of one call whose unconditional prediction is a constant."""
    network = case.model.network
    levels: NoiseSchedule = network.schedule(STEPS, (4, *map(int, case.latents.shape[2:])))  # type: ignore[arg-type]
    step, conditioning = levels.steps[2], case.model.conditioning(PROMPTS, "")
    parameters = lora.trainable(network.module)
    with torch.no_grad():
        negative = conditioning.negative
        assert negative is not None
        fixed = network.predict(case.latents, step.timestep, negative)

    def value() -> Tensor:
        text = network.predict(case.latents, step.timestep, conditioning.text)
        return (fixed + 7.5 * (text - fixed)).square().mean()

    network.module.zero_grad()
    denoise = guided(network.predict, conditioning, Guidance(7.5), detach_uncond=True)
    gradients = torch.autograd.grad(denoise(case.latents, step).square().mean(), parameters)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    direction = [g / norm for g in gradients]
    expected = central_difference(value, parameters, direction)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    # It is another gradient than that of both branches.
    whole = guided(network.predict, conditioning, Guidance(7.5))
    both = torch.autograd.grad(whole(case.latents, step).square().mean(), parameters)
    assert float(torch.cat([g.flatten() for g in both]).norm()) != pytest.approx(expected, rel=0.01)
