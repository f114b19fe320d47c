"""The outside oracle: reward and gradient against a plain loop over diffusers' own parts.

The oracle shares no code with the package. It loads U-Net, VAE, text encoder and scheduler with
diffusers and transformers, puts W + (alpha / rank) B A in the place of each weight W, calls the
network once per guidance branch, and steps with `DDIMScheduler.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.estimators import GradPath, window
from alignprop_cli.guidance import Denoise, Guidance, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model, Source
from alignprop_cli.models.families import TINY, find
from alignprop_cli.sampling import sample
from tests.factories import PICTURE_PX, fill_lora_b, generator, randn, small_pipeline

# float64 rounds to 1e-16; a chain of a few hundred layers loses three to four digits of that.
# What the oracle is to find (scaling factor, order of guidance, stride) is 1e-3 and more.
RELATIVE = 1e-9
STEPS = 4
PROMPTS = ("a cat", "two dogs on a boat")
RANK, ALPHA = 2, 3.0
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

Adapter = dict[str, Tensor]
"""Name of a layer plus `.lora_A.weight` or `.lora_B.weight` to its values."""


@dataclass
class OracleParts:
    """What diffusers and transformers load from the folder, in float64."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


@dataclass
class Case:
    """A model with an adapter, and everything random of one chain."""

    folder: Path
    model: Model
    adapter: Adapter
    latents: Tensor
    noises: list[Tensor]
    oracle: OracleParts


def double_model(folder: Path, prompts: Sequence[str]) -> Model:
    """Load a folder through the package, in float64."""
    config = ModelConfig(id=str(folder), dtype="float32")
    family, path = find(config)
    source, cpu = Source(config, path, torch.float64), torch.device("cpu")
    encoded = family.load_text_encoders(source, cpu).encode([*prompts, ""])
    parts = family.load_parts(source, cpu)
    embeds = dict(zip([*prompts, ""], encoded, strict=True))
    return Model(str(folder), family, parts.network, parts.decoder, embeds)


def denoiser(model: Model, prompts: Sequence[str], guidance: float) -> Denoise:
    return guided(model.network.predict, model.conditioning(prompts, ""), Guidance(guidance))


def with_adapter(model: Model, scale: float = 0.3) -> Adapter:
    lora.inject(model.network.module, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=5)
    fill_lora_b(model.network.module, seed=100, scale=scale)
    model.network.module.to(torch.float64)
    return lora.weights(model.network.module)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("oracle"), "epsilon")


@pytest.fixture(scope="module")
def velocity_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("oracle"), "v_prediction")


def make_case(folder: Path, prediction_type: str) -> Case:
    small_pipeline(folder, prediction_type=prediction_type)
    model = double_model(folder, PROMPTS)
    shape = (len(PROMPTS), *model.network.latent_shape(None, None))
    return Case(
        folder,
        model,
        with_adapter(model),
        randn(1, *shape),
        [randn(10 + i, *shape) for i in range(STEPS)],
        OracleParts(
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet").double(),
            AutoencoderKL.from_pretrained(folder, subfolder="vae").double(),
            CLIPTextModel.from_pretrained(folder / "text_encoder").double(),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        ),
    )


def picture_reward(images: Tensor) -> Tensor:
    """A reward whose gradient differs at every pixel, shape (B,)."""
    weights = randn(7, 1, *images.shape[1:])
    return (images * weights).mean(dim=(1, 2, 3)) + (3.0 * images).sin().mean(dim=(1, 2, 3))


def package_run(
    case: Case, path: GradPath, guidance: float, eta: float, *, use_checkpoint: bool = False
) -> tuple[Tensor, Adapter]:
    """Reward and gradient as the package computes them."""
    case.model.network.module.zero_grad()
    latents = sample(
        denoiser(case.model, PROMPTS, guidance),
        case.latents,
        case.model.network.schedule(STEPS, tuple(case.latents.shape[1:])),
        eta=eta,
        path=path,
        draw_noise=lambda i: case.noises[i],
        recomputed=path.calls if use_checkpoint else (),
    )
    rewards = picture_reward(case.model.decoder.decode(latents, recompute=use_checkpoint))
    rewards.sum().backward()
    named = dict(case.model.network.module.named_parameters())
    gradients = {
        name: named[name.replace(".weight", f".{lora.ADAPTER}.weight")].grad
        for name in case.adapter
    }
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing
    return rewards.detach(), {n: g.clone() for n, g in gradients.items() if g is not None}


def oracle_run(case: Case, k: int, guidance: float, eta: float) -> tuple[Tensor, Adapter]:
    """Reward and gradient of the last k calls, from diffusers' parts alone."""
    unet, vae = case.oracle.unet, case.oracle.vae
    encoder, tokenizer = case.oracle.encoder, case.oracle.tokenizer
    scheduler = DDIMScheduler.from_pretrained(case.folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()

    adapter = {name: value.clone().requires_grad_() for name, value in case.adapter.items()}
    weights: dict[str, Tensor] = {name: p.detach() for name, p in unet.named_parameters()}
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = adapter[name], adapter[f"{layer}.lora_B.weight"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + ALPHA / RANK * up @ down

    def embed(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts), padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            return encoder(tokens.input_ids).last_hidden_state

    def predict(latents: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        arguments = (latents, t, embeds)
        return torch.func.functional_call(unet, weights, arguments).sample

    text, empty = embed(PROMPTS), embed([""] * len(PROMPTS))
    latents = case.latents
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= STEPS - k):
            prediction = predict(latents, t, text)
            if guidance != 1.0:
                unconditional = predict(latents, t, empty)
                prediction = unconditional + guidance * (prediction - unconditional)
            latents = scheduler.step(
                prediction, t, latents, eta=eta, variance_noise=case.noises[i] if eta else None
            ).prev_sample
    images = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    # Inside the range clamping does nothing, so the oracle need not know how the package clamps.
    assert images.min().item() > 0.0
    assert images.max().item() < 1.0
    rewards = picture_reward(images)
    gradients = torch.autograd.grad(rewards.sum(), list(adapter.values()))
    return rewards.detach(), dict(zip(adapter, gradients, strict=True))


def flat(values: Adapter) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("k", [1, 3, STEPS])
def test_reward_and_gradient_equal_a_plain_loop_over_diffusers(
    case: Case, k: int, guidance: float, eta: float
) -> None:
    check_against_oracle(case, k, guidance, eta)


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (7.5, 1.0)])
def test_velocity_prediction_equals_a_plain_loop_over_diffusers(
    velocity_case: Case, guidance: float, eta: float
) -> None:
    check_against_oracle(velocity_case, 3, guidance, eta)


def check_against_oracle(case: Case, k: int, guidance: float, eta: float) -> None:
    expected_rewards, expected = oracle_run(case, k, guidance, eta)
    assert float(flat(expected).norm()) > 1e-6
    for use_checkpoint in (False, True):
        rewards, gradients = package_run(
            case, window(STEPS - k, STEPS), guidance, eta, use_checkpoint=use_checkpoint
        )
        torch.testing.assert_close(rewards, expected_rewards, rtol=RELATIVE, atol=0.0)
        assert gradients.keys() == expected.keys()
        error = (flat(gradients) - flat(expected)).norm() / flat(expected).norm()
        assert float(error) < RELATIVE


def test_the_adapter_and_the_guidance_change_the_reward(case: Case) -> None:
    # Otherwise the oracle could not see an adapter or a guidance that is ignored.
    whole = window(0, STEPS)
    rewards, _ = package_run(case, whole, 7.5, 0.0)
    unguided, _ = package_run(case, whole, 1.0, 0.0)
    with lora.disabled(case.model.network.module):
        latents = sample(
            denoiser(case.model, PROMPTS, 7.5),
            case.latents,
            case.model.network.schedule(STEPS, tuple(case.latents.shape[1:])),
        )
        base = picture_reward(case.model.decoder.decode(latents))
    assert float((rewards - unguided).abs().min()) > 1e-4
    assert float((rewards - base).abs().min()) > 1e-4


@pytest.mark.parametrize("path", [window(3, 4), window(1, 4), window(0, 2)])
def test_checkpointing_changes_no_bit_of_the_gradient(case: Case, path: GradPath) -> None:
    rewards, stored = package_run(case, path, 7.5, 1.0)
    again, recomputed = package_run(case, path, 7.5, 1.0, use_checkpoint=True)
    assert torch.equal(rewards, again)
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)
    assert float(flat(stored).norm()) > 1e-6


@pytest.mark.parametrize(
    ("guidance", "images"), [(1.0, len(PROMPTS)), (7.5, 2 * len(PROMPTS)), (0.0, len(PROMPTS))]
)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_network_is_called_once_per_step_and_again_only_inside_the_window(
    case: Case, guidance: float, images: int, use_checkpoint: bool
) -> None:
    calls: list[tuple[bool, int, int]] = []

    def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((torch.is_grad_enabled(), len(inputs[0]), int(inputs[1][0])))

    handle = case.model.network.module.register_forward_pre_hook(note)
    try:
        package_run(case, window(2, 4), guidance, 0.0, use_checkpoint=use_checkpoint)
    finally:
        handle.remove()
    # 1000 timesteps in 4 steps, `leading` spacing with an offset of 1.
    timesteps = [751, 501, 251, 1]
    # Of the recomputed calls the first keeps a graph without activations, later ones none.
    with_graph = [2] if use_checkpoint else [2, 3]
    expected = [(i in with_graph, images, timesteps[i]) for i in range(STEPS)]
    recomputed = [(True, images, 1), (True, images, 251)] if use_checkpoint else []
    assert calls == expected + recomputed


def central_difference(
    value: Callable[[], Tensor], parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> float:
    """The derivative along a direction, from a five point stencil (error of fourth order)."""
    width = 1e-4
    original = [p.detach().clone() for p in parameters]
    values: dict[int, float] = {}
    for multiple in (-2, -1, 1, 2):
        with torch.no_grad():
            for p, start, d in zip(parameters, original, direction, strict=True):
                p.copy_(start + multiple * width * d)
            values[multiple] = float(value())
    with torch.no_grad():
        for p, start in zip(parameters, original, strict=True):
            p.copy_(start)
    near, far = values[1] - values[-1], values[2] - values[-2]
    return (8.0 * near - far) / (12.0 * width)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradient_through_three_steps_equals_central_differences(
    tmp_path: Path, eta: float
) -> None:
    # On the embedded model where it is there: trained weights, v prediction, zero terminal SNR.
    embedded = (TINY / "model_index.json").is_file()
    prompts = ["two small red circles on a black background"]
    model = double_model(TINY if embedded else small_pipeline(tmp_path), prompts)
    # Small, so that the stencil's own error is: a large adapter makes the chain nearly chaotic.
    with_adapter(model, scale=0.05)
    shape = (1, *model.network.latent_shape(None, None))
    noise, weights = randn(1, *shape), randn(9, *shape)
    noises = [randn(2 + i, *shape) for i in range(3)]
    denoise = denoiser(model, prompts, 3.0)

    def value(path: GradPath | None = None) -> Tensor:
        latents = sample(
            denoise,
            noise,
            model.network.schedule(3, tuple(noise.shape[1:])),
            eta=eta,
            path=path,
            draw_noise=lambda i: noises[i],
        )
        return (latents * weights).mean() + latents.square().mean()

    parameters = lora.trainable(model.network.module)
    gradients = torch.autograd.grad(value(window(0, 3)), parameters)
    # A direction near the gradient's own, so that the derivative is large, with all parts in it.
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    draws = generator(3)
    direction = [
        g / norm + 0.01 * torch.randn(g.shape, generator=draws, dtype=g.dtype) for g in gradients
    ]
    expected = central_difference(value, parameters, direction)
    actual = float(sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)))
    assert abs(expected) > 1e-4
    # The stencil's own error is 1e-9 and less here.
    assert actual == pytest.approx(expected, rel=1e-6)


def test_pictures_of_the_small_pipeline_have_the_size_the_tests_count_on(case: Case) -> None:
    decoded = case.model.decoder.decode(case.latents)
    assert decoded.shape == (len(PROMPTS), 3, PICTURE_PX, PICTURE_PX)
