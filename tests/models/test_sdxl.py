"""Stable Diffusion XL: loading, sampling like diffusers, and what is wrong with model files."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import scheduling_lcm
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.cli import main
from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.estimators import full
from alignprop_cli.guidance import Embeds, guided
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import sdxl
from alignprop_cli.models.base import Model, Parts, Source
from alignprop_cli.models.families import find, open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.sampling import rollout, sample
from tests.factories import (
    SD1_BETAS,
    KeepsFloat64,
    fill_lora_b,
    generator,
    randn,
    small_pipeline,
    small_xl_pipeline,
)
from tests.models.original import original_unet, original_vae

CPU = torch.device("cpu")
# Of different length; the last is longer than what the encoders read.
PROMPTS = ["a cat", "dog", "the dog and the cat sat on a mat in the sun"]


def load(path: Path | str, prompts: Sequence[str] = (*PROMPTS, ""), **options: Any) -> Model:
    config = ModelConfig(id=str(path), **({"dtype": "float32"} | options))
    return open_model(config, prompts, CPU)


@torch.no_grad()
def ours(model: Model, size: tuple[int, int] = (16, 16), **options: Any) -> tuple[Tensor, Tensor]:
    """Return clean latents and images for the noise that `theirs` has."""
    config = SampleConfig(height=size[0], width=size[1], **options)
    chain = sampler(config, model.family, model.network)
    negative = chain.negative_prompt if chain.guidance.enabled else None
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, negative), chain.guidance)
    shape = (3, *model.network.latent_shape(*size))
    # The pipeline draws the noise of the steps one after another, from one generator.
    draws, source = list[Tensor](), generator(5)

    def draw_noise(i: int) -> Tensor:
        while len(draws) <= i:
            draws.append(torch.randn(shape, generator=source))
        return draws[i]

    latents = rollout(
        denoise,
        randn(3, *shape, dtype=torch.float32),
        chain.schedule(model.network, shape[1:]),
        eta=chain.eta,
        draw_noise=draw_noise,
    )
    return latents, model.decoder.decode(latents)


@torch.no_grad()
def theirs(
    pipeline: Any,
    size: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return clean latents and images of plain diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    shape = (3, 4, size[0] // 2, size[1] // 2)
    ends = list[Tensor]()

    def keep(_: Any, i: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(values["latents"])
        return values

    images = pipeline(
        PROMPTS,
        height=size[0],
        width=size[1],
        latents=randn(3, *shape, dtype=torch.float32).to(dtype),
        generator=generator(5),
        output_type="pt",
        callback_on_step_end=keep,
        **options,
    ).images
    return ends[-1], images


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0.0, atol=1e-4)
    assert float(expected[1].std()) > 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_xl_pipeline(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


# --- Sampling ---


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_equal_those_of_plain_diffusers(
    model: Model, pipeline: StableDiffusionXLPipeline, guidance: float, size: tuple[int, int]
) -> None:
    asked = {"num_inference_steps": 4, "guidance_scale": guidance}
    check(ours(model, size, **asked), theirs(pipeline, size, **asked))


# The model's own scheduler, and the settings that lead to it.
SCHEDULERS: dict[str, Any] = {
    "euler trailing": EulerDiscreteScheduler(**SD1_BETAS, timestep_spacing="trailing"),
    "euler linspace": EulerDiscreteScheduler(**SD1_BETAS, timestep_spacing="linspace"),
    "euler karras": EulerDiscreteScheduler(**SD1_BETAS, use_karras_sigmas=True),
    "euler sigma_min": EulerDiscreteScheduler(**SD1_BETAS, final_sigmas_type="sigma_min"),
    "euler zero snr v": EulerDiscreteScheduler(
        **SD1_BETAS,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    ),
    "euler v": EulerDiscreteScheduler(
        **SD1_BETAS, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1
    ),
    "ancestral trailing": EulerAncestralDiscreteScheduler(**SD1_BETAS, timestep_spacing="trailing"),
    "ancestral leading": EulerAncestralDiscreteScheduler(
        **SD1_BETAS, timestep_spacing="leading", steps_offset=1
    ),
    "ancestral v": EulerAncestralDiscreteScheduler(**SD1_BETAS, prediction_type="v_prediction"),
    "lcm": LCMScheduler(**SD1_BETAS),
    # So small a scaling that c_skip and c_out are not 0 and 1.
    "lcm scaled": LCMScheduler(**SD1_BETAS, timestep_scaling=1e-3, original_inference_steps=100),
    "lcm v": LCMScheduler(**SD1_BETAS, prediction_type="v_prediction"),
    "ddim": DDIMScheduler(**SD1_BETAS, clip_sample=False, timestep_spacing="trailing"),
}


def with_scheduler(model: Model, scheduler: Any) -> Model:
    """Return the model as if its folder had this scheduler."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    network = sdxl.XlUNet(model.network.module, config, 2, "small")
    return replace(model, network=network)


def float32_noise(shape: Any, *, dtype: torch.dtype, **options: Any) -> Tensor:
    return randn_tensor(shape, dtype=torch.float32, **options).to(dtype)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_models_own_scheduler_is_followed(
    model: Model, pipeline: StableDiffusionXLPipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rounds = torch.float32
    if "zero snr" in name or name == "lcm":
        # Without any signal at the start, diffusers' latents are 4096 times the noise there, which
        # float32 rounds to 2e-4. Ours are as large as the noise: they stay in float32. LCM's end at
        # 32, where the roundings of both sides add up to 1.03e-4 without AVX-512.
        rounds, pipeline = torch.float64, deepcopy(pipeline).to(torch.float64)
        # The noise of float32, which is another one than that of float64.
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", float32_noise)
    monkeypatch.setattr(pipeline, "scheduler", SCHEDULERS[name])
    model = with_scheduler(model, SCHEDULERS[name])
    for steps, guidance in ((4, 3.0), (1, 1.0)):
        asked = {"num_inference_steps": steps, "guidance_scale": guidance}
        with KeepsFloat64() if rounds == torch.float64 else nullcontext():
            expected = theirs(pipeline, dtype=rounds, **asked)
        check(ours(model, **asked), expected)


def test_the_scheduler_is_read_from_the_folder(folder: Path, tmp_path: Path, model: Model) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    SCHEDULERS["ancestral trailing"].save_pretrained(copy / "scheduler")
    edit(copy, INDEX, scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    expected = with_scheduler(model, SCHEDULERS["ancestral trailing"]).network
    found = open_model(ModelConfig(id=str(copy)), [], CPU).network
    planned = meta_model(ModelConfig(id=str(copy)), torch.float32).parts.network
    for network in (found, planned):
        assert network.schedule(4, (4, 8, 8)) == expected.schedule(4, (4, 8, 8))
    assert expected.schedule(4, (4, 8, 8)).eta == 1.0


# The settings that lead to a scheduler of SCHEDULERS, from a model with Stable Diffusion XL's own.
CHOSEN: dict[str, dict[str, Any]] = {
    "euler trailing": {"spacing": "trailing"},
    "ancestral trailing": {"scheduler": "euler_ancestral", "spacing": "trailing"},
    "lcm": {"scheduler": "lcm"},
    "ddim": {"scheduler": "ddim", "spacing": "trailing"},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_scheduler_can_be_chosen_as_diffusers_from_config_does(
    model: Model, pipeline: StableDiffusionXLPipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = {"timestep_spacing": "trailing"} if "spacing" in CHOSEN[name] else {}
    if name == "ddim":
        options["clip_sample"] = False
    made = type(SCHEDULERS[name]).from_config(pipeline.scheduler.config, **options)
    monkeypatch.setattr(pipeline, "scheduler", made)
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0}
    check(ours(model, **asked, **CHOSEN[name]), theirs(pipeline, **asked))


def test_eta_replaces_the_share_of_fresh_noise(model: Model) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 3, "scheduler": "euler_ancestral"}
    without, own = ours(model, **asked, eta=0.0)[0], ours(model, **asked)[0]
    torch.testing.assert_close(own, ours(model, **asked, eta=1.0)[0], rtol=0.0, atol=0.0)
    # Without fresh noise it is Euler's method.
    torch.testing.assert_close(
        without, ours(model, num_inference_steps=3, scheduler="euler")[0], rtol=0.0, atol=0.0
    )
    assert not torch.allclose(own, without, atol=1e-2)


def test_what_a_schedule_cannot_have_is_refused(model: Model) -> None:
    network, shape = model.network, (4, 8, 8)
    schedule: Any = network.schedule
    with pytest.raises(ConfigError, match=r"sample\.spacing: leading cannot be obeyed.*LCM"):
        schedule(4, shape, scheduler="lcm", spacing="leading")
    with pytest.raises(
        ConfigError, match=r"steps: 51 is more than the 50 steps of the consistency"
    ):
        schedule(51, shape, scheduler="lcm")
    with pytest.raises(ConfigError, match=r"num_inference_steps: 1001 is more than the 1000"):
        schedule(1001, shape)


# --- Prompts ---


def test_embeddings_are_those_of_plain_diffusers(
    model: Model, pipeline: StableDiffusionXLPipeline
) -> None:
    conditioning = model.conditioning(PROMPTS, "")
    expected = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    text, negative = conditioning.text.tensors, conditioning.negative
    assert negative is not None
    found = (text["hidden"], negative.tensors["hidden"], text["pooled"], negative.tensors["pooled"])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(t.device == CPU for e in model.embeds.values() for t in e.tensors.values())
    # Prompts that differ have embeddings that differ.
    assert not torch.allclose(text["pooled"][0], text["pooled"][1], atol=1e-2)


@pytest.mark.parametrize("forced", [True, False])
def test_an_empty_negative_prompt_is_zeros_where_the_model_says_so(
    tmp_path: Path, forced: bool
) -> None:
    folder = small_xl_pipeline(tmp_path, pipeline_force_zeros_for_empty_prompt=forced)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    model = load(folder, [*PROMPTS, "", " ", "dogs"])
    _, zeros, _, pooled = pipeline.encode_prompt("a")
    _, encoded, _, _ = pipeline.encode_prompt("a", negative_prompt="")
    _, dogs, _, _ = pipeline.encode_prompt("a", negative_prompt="dogs")
    empty = model.embeds[""].tensors
    torch.testing.assert_close(empty["hidden"], zeros[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(empty["pooled"], pooled[0], rtol=1e-5, atol=1e-5)
    assert bool(empty["hidden"].any()) is not forced
    # A blank is encoded in any case.
    torch.testing.assert_close(model.embeds[" "].tensors["hidden"], encoded[0])
    torch.testing.assert_close(model.embeds["dogs"].tensors["hidden"], dogs[0])


def test_the_encoders_say_what_they_cut(folder: Path) -> None:
    source = Source(ModelConfig(id="x"), folder, torch.float32)
    encoders = sdxl.load_text_encoders(source, CPU)
    assert [encoders.cuts(prompt) for prompt in PROMPTS] == [False, False, True]


def test_the_text_encoders_are_gone_before_the_network_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders, alive = list[weakref.ref[Any]](), list[bool]()
    load_text_encoders, load_parts = sdxl.load_text_encoders, sdxl.load_parts

    def spy_on_encoders(source: Source, device: torch.device) -> sdxl.TwoClipTexts:
        made = load_text_encoders(source, device)
        encoders.extend(weakref.ref(p) for e in made.encoders for p in e.parameters())
        return made

    def spy_on_parts(source: Source, device: torch.device) -> Parts:
        alive.append(any(encoder() is not None for encoder in encoders))
        return load_parts(source, device)

    monkeypatch.setattr(sdxl, "load_text_encoders", spy_on_encoders)
    monkeypatch.setattr(sdxl, "load_parts", spy_on_parts)
    load(folder)
    assert len(encoders) > 50
    assert alive == [False]


# --- Precision ---


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_decoder_is_kept_out_of_float16(tmp_path: Path, dtype: str, upcast: bool) -> None:
    folder = small_xl_pipeline(tmp_path, vae_force_upcast=upcast)
    model = load(folder, dtype=dtype)
    half: torch.dtype = getattr(torch, dtype)
    own = torch.float32 if dtype == "float16" and upcast else half
    assert {p.dtype for p in model.network.module.parameters()} == {half}
    assert {p.dtype for p in model.decoder.module.parameters()} == {own}
    if own is torch.float32:
        # Not rounded on the way.
        weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        found = model.decoder.module.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    planned = meta_model(ModelConfig(id=str(folder)), half).parts.decoder.module
    assert {p.dtype for p in planned.parameters()} == {own}
    images = model.decoder.decode(randn(0, 1, 4, 8, 8, dtype=torch.float32))
    assert images.dtype == torch.float32
    assert bool(torch.isfinite(images).all())


@pytest.mark.parametrize("upcast", [True, False])
def test_a_step_in_float16_has_no_nan_though_the_decoder_leaves_its_range(
    tmp_path: Path, upcast: bool
) -> None:
    """As the published autoencoder: activations beyond 65504, the largest number of float16."""
    folder = small_xl_pipeline(tmp_path, vae_force_upcast=upcast)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= 1e6  # the norms after it make images of it all the same
    save_file(weights, file, {"format": "pt"})
    model = load(folder, dtype="float16")
    parameters = lora.inject(model.network.module, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    fill_lora_b(model.network.module, seed=1)
    chain = sampler(SampleConfig(num_inference_steps=3), model.family, model.network)
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, ""), chain.guidance)
    shape = model.network.latent_shape(16, 24)
    noise = randn(3, 3, *shape, dtype=torch.float32)
    schedule = chain.schedule(model.network, shape)
    images = model.decoder.decode(sample(denoise, noise, schedule, path=full().path((0, 1, 2))))
    (2.0**10 * images.mean()).backward()  # as training scales a loss in float16
    found = [images, *(p.grad for p in parameters if p.grad is not None)]
    assert all(bool(tensor.isfinite().all()) for tensor in found) is upcast
    if upcast:
        assert max(float(gradient.norm()) for gradient in found[1:]) > 1e-3


def test_saturated_pixels_have_the_gradient_that_leads_back(folder: Path) -> None:
    decoder = load(folder, []).decoder
    # Colours far out of range.
    decoder.module.decoder.conv_out.weight.data.mul_(50.0)
    latents = randn(1, 2, 4, 8, 8, dtype=torch.float32).requires_grad_()
    images = decoder.decode(latents)
    for value, inward in ((1.0, 1.0), (0.0, -1.0)):
        saturated = images[images == value]
        assert 10 < len(saturated) < images.numel()
        # Descent on the loss moves these pixels back into the range, or further out of it.
        (back,) = torch.autograd.grad(inward * saturated.sum(), [latents], retain_graph=True)
        (out,) = torch.autograd.grad(-inward * saturated.sum(), [latents], retain_graph=True)
        assert float(back.norm()) > 1e-3
        assert float(out.norm()) == 0.0


# --- LoRA ---

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# A central difference of fourth order: its error is about STEP^4, that of rounding 1e-16 / STEP.
STEP, CENTRAL = 1e-5, {1: 2 / 3, -1: -2 / 3, 2: -1 / 12, -2: 1 / 12}


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 4.0},
        {"guidance_scale": 0.0, "scheduler": "euler_ancestral", "spacing": "trailing"},
        {"guidance_scale": 1.0, "scheduler": "lcm"},
    ],
)
def test_the_gradient_of_the_lora_equals_central_differences(
    model: Model, options: dict[str, Any]
) -> None:
    model = deepcopy(model)
    module = model.network.module
    lora.inject(module, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    fill_lora_b(module, seed=1)
    module.double()
    model.decoder.module.double()
    embeds = {
        name: Embeds({k: v.double() for k, v in e.tensors.items()})
        for name, e in model.embeds.items()
    }
    model = replace(model, embeds=embeds)
    chain = sampler(SampleConfig(num_inference_steps=3, **options), model.family, model.network)
    schedule = chain.schedule(model.network, (4, 8, 8))
    denoise = guided(
        model.network.predict,
        model.conditioning(PROMPTS[:2], "" if chain.guidance.enabled else None),
        chain.guidance,
    )
    parameters = [p for p in lora.trainable(module) if p.requires_grad]

    def reward() -> Tensor:
        latents = sample(
            denoise,
            randn(2, 2, 4, 8, 8),
            schedule,
            path=full().path((0, 1, 2)),
            draw_noise=lambda i: randn(20 + i, 2, 4, 8, 8),
        )
        vae = model.decoder.module
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (decoded * randn(7, *decoded.shape)).sum()

    gradients = torch.autograd.grad(reward(), parameters)
    direction = [randn(50 + n, *p.shape) for n, p in enumerate(parameters)]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    found = 0.0
    with torch.no_grad():
        for place, weight in CENTRAL.items():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(place * STEP * d)
            found += weight * float(reward()) / STEP
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(place * STEP * d)
    assert abs(expected) > 1e-3
    assert abs(found - expected) <= 1e-6 * abs(expected)


@pytest.mark.long
def test_two_steps_resumed_give_the_image_of_plain_diffusers(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        "sample.num_inference_steps": 3,
        "sample.guidance_scale": 3.0,
        "gradient.k_max": 3,
        "train.batch_size": 2,
        "train.micro_batch": 2,
        "train.learning_rate": 0.05,
        "eval.images": 2,
        "eval.every": 0,
        "model.dtype": "float32",
    }
    named = ["--model", str(folder), "--quiet"]
    first = ["train", "--preset", "tiny", "--reward", "brightness", "--steps", "1", *named]
    first += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    again = ["train", "--resume", str(run), "--steps", "2", *named]
    for asked in ([*first, "--output", str(run)], again):
        with pytest.raises(SystemExit) as ended:
            main(asked)
        assert ended.value.code in (0, None)
    # With the LoRA our images are others than the base model's, and those of plain diffusers.
    place = run / "checkpoints" / "step-000002"
    model = load(folder)
    before = ours(model, num_inference_steps=3, guidance_scale=3.0)
    lora.load(model.network.module, files.read(place / files.LORA_FILE), "xl")
    after = ours(model, num_inference_steps=3, guidance_scale=3.0)
    assert float((after[1] - before[1]).abs().max()) > 1e-3
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(place)
    check(after, theirs(pipeline, num_inference_steps=3, guidance_scale=3.0))


def test_a_lora_of_another_family_is_refused(model: Model, tmp_path: Path) -> None:
    # Nothing is changed in the network that refuses.
    small = open_model(ModelConfig(id=str(small_pipeline(tmp_path / "sd"))), [], CPU)
    module = small.network.module
    lora.inject(module, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    file = files.save(
        tmp_path,
        lora.weights(module),
        {},
        prefix="unet.",
        adapter_metadata=lora.adapter_metadata(module),
    )
    with pytest.raises(ConfigError, match="this LoRA does not belong to model XL: it has a layer"):
        lora.load(model.network.module, files.read(file), "XL")


# --- Single files in the layout of the original code ---


def to_original_layout(folder: Path) -> dict[str, Tensor]:
    """Rename the weights of `small_xl_pipeline` as the code of Stability AI names them.

    The first text encoder has the names of transformers, the second those of open_clip, with the
    three projections of attention in one tensor.
    """
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    blocks = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        # Level 1 has attention, level 0 has none.
        "down_blocks.0.resnets.0.": "input_blocks.1.0.",
        "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
        "down_blocks.1.resnets.0.": "input_blocks.3.0.",
        "down_blocks.1.attentions.0.": "input_blocks.3.1.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "up_blocks.0.resnets.0.": "output_blocks.0.0.",
        "up_blocks.0.attentions.0.": "output_blocks.0.1.",
        "up_blocks.0.resnets.1.": "output_blocks.1.0.",
        "up_blocks.0.attentions.1.": "output_blocks.1.1.",
        "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.2.conv.",
        "up_blocks.1.resnets.0.": "output_blocks.2.0.",
        "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    }
    state = original_unet(unet, blocks) | original_vae(vae)
    first = load_file(folder / "text_encoder" / "model.safetensors")
    for name, value in first.items():
        new = name.removeprefix("text_model.")
        state[f"conditioner.embedders.0.transformer.text_model.{new}"] = value
    return state | open_clip_text(load_file(folder / "text_encoder_2" / "model.safetensors"))


def open_clip_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' text encoder by the names of open_clip."""
    prefix, found = "conditioner.embedders.1.model.", dict[str, Tensor]()
    whole = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for name, value in state.items():
        if name in whole:
            found[prefix + whole[name]] = value
        elif name == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T.contiguous()
        elif "self_attn.q_proj" in name:
            three = [state[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            layer, kind = name.split(".")[3], name.rpartition(".")[2]
            new = f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"
            found[new] = torch.cat(three)
        elif "k_proj" not in name and "v_proj" not in name:
            _, _, _, layer, *rest = name.split(".")
            part, kind = ".".join(rest[:-1]), rest[-1]
            found[f"{prefix}transformer.resblocks.{layer}.{parts[part]}.{kind}"] = value
    return found


@pytest.fixture(scope="module")
def single_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(to_original_layout(folder), path, metadata={"format": "pt"})
    return path


def test_a_single_file_loads_to_the_numbers_of_its_folder(
    folder: Path, single_file: Path, model: Model
) -> None:
    single = load(single_file, config=str(folder))
    assert single.family.pipeline_class == "StableDiffusionXLPipeline"
    assert single.fingerprint == model.fingerprint
    for prompt in (*PROMPTS, ""):
        for name, value in model.embeds[prompt].tensors.items():
            torch.testing.assert_close(single.embeds[prompt].tensors[name], value)
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0}
    for one, other in zip(ours(single, **asked), ours(model, **asked), strict=True):
        # The projections of the second encoder lie in another order in memory: rounding.
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-4)


def test_the_family_of_a_single_file_shows_in_its_tensors(
    single_file: Path, tmp_path: Path
) -> None:
    found, path = find(ModelConfig(id=str(single_file)))
    assert (found.pipeline_class, path) == ("StableDiffusionXLPipeline", single_file)
    # The plan needs no more than that.
    made = meta_model(ModelConfig(id=str(single_file)), torch.bfloat16)
    assert sum(p.numel() for p in made.parts.network.module.parameters()) == 2_567_463_684
    refiner = tmp_path / "refiner.safetensors"
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3)}
    save_file({"conditioner.embedders.0.model.ln_final.weight": torch.ones(2), **first}, refiner)
    with pytest.raises(ConfigError, match="is a refiner of Stable Diffusion XL"):
        find(ModelConfig(id=str(refiner)))


@pytest.mark.parametrize(("how", "zero_snr"), [("tensor", True), ("header", False)])
def test_a_single_file_that_says_that_it_predicts_v_is_sampled_so(
    folder: Path, single_file: Path, tmp_path: Path, monkeypatch: Any, how: str, zero_snr: bool
) -> None:
    # As NoobAI's v-prediction file, and as sd-scripts' header. The configuration that diffusers
    # downloads for it says epsilon, as this folder does.
    place = "diffusers.loaders.single_file.fetch_diffusers_config"
    monkeypatch.setattr(place, lambda _: {"pretrained_model_name_or_path": str(folder)})
    state = load_file(single_file) | ({"v_pred": torch.empty(0)} if how == "tensor" else {})
    state |= {"ztsnr": torch.empty(0)} if zero_snr else {}
    header = {"modelspec.prediction_type": "v"} if how == "header" else {}
    save_file(state, tmp_path / "v.safetensors", {"format": "pt", **header})
    config = ModelConfig(id=str(tmp_path / "v.safetensors"), dtype="float32")
    copy = shutil.copytree(folder, tmp_path / "folder")
    asked = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    edit(copy, "scheduler/scheduler_config.json", **asked)
    models = open_model(config, [], CPU), load(copy, prompts=[])
    found, wanted = (model.network.schedule(3, (4, 8, 8)) for model in models)
    assert found == wanted
    assert found.prediction_type == "v_prediction"
    # A folder that says something else is no guess, but a contradiction.
    with pytest.raises(ConfigError, match=r"prediction_type: epsilon, but .* v_prediction"):
        find(config.model_copy(update={"config": str(folder)}))
    find(config.model_copy(update={"config": str(copy)}))
    if zero_snr:
        edit(copy, "scheduler/scheduler_config.json", rescale_betas_zero_snr=False)
        with pytest.raises(ConfigError, match=r"rescale_betas_zero_snr: False, but .* True"):
            find(config.model_copy(update={"config": str(copy)}))


def test_a_single_file_of_edms_own_noise_is_refused(single_file: Path, tmp_path: Path) -> None:
    state = load_file(single_file) | {"edm_vpred.sigma_max": torch.tensor(80.0)}
    save_file(state, tmp_path / "cos.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"edm_vpred\.sigma_max: .* CosXL"):
        find(ModelConfig(id=str(tmp_path / "cos.safetensors")))


# --- What is missing, damaged or of another kind ---


def edit(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


def refused(path: Path) -> AlignPropError:
    """Return the error of a real run, which must be that of a dry run."""
    with pytest.raises(AlignPropError) as real:
        load(path)
    with pytest.raises(AlignPropError) as dry:
        meta_model(ModelConfig(id=str(path)), torch.float32)
    assert dry.value.message == real.value.message
    return real.value


INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WRONG: list[tuple[str, str, Any, str]] = [
    (INDEX, "text_encoder_2", [None, None], "text_encoder_2: the model comes without it"),
    (INDEX, "text_encoder", [None, None], "as refiners do"),
    (INDEX, "text_encoder_2", ["transformers", "CLIPTextModel"], "CLIPTextModel is not supported"),
    (
        INDEX,
        "_class_name",
        "StableDiffusionXLInpaintPipeline",
        "supported: StableDiffusionPipeline",
    ),
    (
        INDEX,
        "_class_name",
        "StableDiffusionXLControlNetPipeline",
        "is a StableDiffusionXLControlNet",
    ),
    (INDEX, "_class_name", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline (Stable"),
    (INDEX, "_class_name", "KolorsPipeline", "is a KolorsPipeline; supported"),
    (UNET, "cross_attention_dim", 32, "width 32, the two text encoders' have 32 + 48"),
    (UNET, "addition_embed_type", None, "addition_embed_type: expected text_time, got nothing"),
    (UNET, "addition_embed_type", "text", "addition_embed_type: expected text_time, got text"),
    (UNET, "addition_time_embed_dim", None, "expected a whole number"),
    (UNET, "projection_class_embeddings_input_dim", 80, "expected 6 x 8 + 24"),
    (SCHEDULER, "_class_name", "TCDScheduler", "TCDScheduler is not supported"),
    ("vae/config.json", "latents_mean", [1.0], "a mean of the latents"),
    ("tokenizer_2/tokenizer_config.json", "model_max_length", 17, "at most 16"),
    ("text_encoder_2/config.json", "vocab_size", 5, "vocab_size: 5 is less than"),
]


@pytest.mark.parametrize(("file", "key", "value", "words"), WRONG)
def test_wrong_models_are_refused_with_what_is_wrong(
    folder: Path, tmp_path: Path, file: str, key: str, value: Any, words: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy, file, **{key: value})
    error = refused(copy)
    assert type(error) is ConfigError
    assert words in error.message
    assert str(copy) in error.message


def test_latents_that_would_be_clipped_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy, SCHEDULER, clip_sample=True)
    load(copy)  # Euler's method clips nothing
    edit(copy, SCHEDULER, _class_name="DDIMScheduler")
    edit(copy, INDEX, scheduler=["diffusers", "DDIMScheduler"])
    assert "clip_sample: expected false" in refused(copy).message


def test_an_inpainting_network_is_refused(tmp_path: Path) -> None:
    folder = small_xl_pipeline(tmp_path, in_channels=9)
    assert "takes 9 channels, its latents have 4" in refused(folder).message


@pytest.mark.parametrize(
    "gone", ["text_encoder_2", "tokenizer_2", "unet/diffusion_pytorch_model.safetensors"]
)
def test_half_a_download_is_reported(folder: Path, tmp_path: Path, gone: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if (copy / gone).is_dir():
        shutil.rmtree(copy / gone)
    else:
        (copy / gone).unlink()
    with pytest.raises(AssetError, match=r"model\.id: cannot load") as caught:
        load(copy)
    assert caught.value.exit_code == 3


def test_a_size_between_the_units_of_the_network_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"sample\.width: 23 is not a multiple of 4.*nearest: 24"):
        model.network.latent_shape(16, 23)
