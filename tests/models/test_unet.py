"""Stable Diffusion: loading, sampling like diffusers, and what is wrong with model files."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.device import resolve_dtype
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.guidance import Guidance, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import loading, unet
from alignprop_cli.models.base import Decoder, Model, Parts, Source
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.unet import ClipText, VaeDecoder, load_text_encoders
from alignprop_cli.planning import meter as memory
from alignprop_cli.sampling import sample
from alignprop_cli.schedule import NoiseSchedule
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline
from tests.models.original import original_unet, original_vae

CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PROMPTS = ["a cat", "dogs"]


def load(path: Path | str, prompts: Sequence[str] = (*PROMPTS, ""), **options: str) -> Model:
    config = ModelConfig(id=str(path), **({"dtype": "float32"} | options))
    return open_model(config, prompts, CPU)


def load_encoders(path: Path, dtype: torch.dtype = torch.float32, **options: str) -> ClipText:
    return load_text_encoders(Source(ModelConfig(id=str(path), **options), path, dtype), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Model:
    return load(folder)


@pytest.fixture
def model(loaded: Model) -> Model:
    """Return a copy that the test may change, without the time of loading."""
    return deepcopy(loaded)


def noise(*shape: int) -> Tensor:
    return randn(3, *shape, dtype=torch.float32)


def schedule(model: Model, steps: int) -> NoiseSchedule:
    return model.network.schedule(steps, model.network.latent_shape(None, None))


@torch.no_grad()
def draw(model: Model, guidance: float = 4.0) -> Tensor:
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, ""), Guidance(guidance))
    return model.decoder.decode(sample(denoise, noise(2, 4, 8, 8), schedule(model, 3)))


@torch.no_grad()
def draw_with_diffusers(
    pipeline: StableDiffusionPipeline, guidance: float = 4.0, **options: object
) -> Tensor:
    """Return pictures of plain diffusers for the same noise, in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=noise(2, 4, 8, 8),
        output_type="pt",
        **options,
    ).images
    assert isinstance(pictures, Tensor)
    return pictures


# Whole chains in float32, batched differently: rounding of 1e-7 per operation adds up to 1e-5.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


# --- Drawing ---


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_equal_those_of_plain_diffusers(
    tmp_path: Path, prediction: str, guidance: float
) -> None:
    folder = small_pipeline(tmp_path, prediction_type=prediction, seed=1)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(
        draw(load(folder), guidance), draw_with_diffusers(pipeline, guidance), **CLOSE
    )


def test_a_folder_of_a_pndm_model_is_drawn_with_ddim(folder: Path, tmp_path: Path) -> None:
    # As Stable Diffusion 1.5 is published.
    copy = Path(shutil.copytree(folder, tmp_path / "pndm"))
    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    file.write_text(json.dumps(config))
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    assert schedule(load(copy), 5) == schedule(load(folder), 5)


def test_the_negative_prompt_goes_to_the_unconditional_branch(folder: Path) -> None:
    model = load(folder, [*PROMPTS, "a boat"])
    conditioning = model.conditioning(PROMPTS, "a boat")
    expected = model.embeds["a boat"].tensors["hidden"]
    assert conditioning.negative is not None
    text, negative = conditioning.text.tensors["hidden"], conditioning.negative.tensors["hidden"]
    assert text.shape == negative.shape == (2, 16, TEXT_WIDTH)
    assert torch.equal(negative[0], expected)
    assert torch.equal(negative[1], expected)
    assert not torch.equal(text[0], expected)
    assert model.conditioning(PROMPTS, None).negative is None


def test_outside_of_its_interval_guidance_is_off_and_costs_nothing(model: Model) -> None:
    conditioning = model.conditioning(PROMPTS, "")
    predict, module = model.network.predict, model.network.module
    latents, batches = noise(2, 4, 8, 8), list[int]()
    module.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    interval = guided(predict, conditioning, Guidance(4.0, (0.2, 0.7)))
    always = guided(predict, conditioning, Guidance(4.0))
    never = guided(predict, conditioning, Guidance(1.0))
    seen = set[bool]()
    for step in schedule(model, 10).steps:
        inside = 0.2 <= step.sigma <= 0.7
        expected = (always if inside else never)(latents, step)
        batches.clear()
        assert torch.equal(interval(latents, step), expected)
        assert batches == [4 if inside else 2]
        assert not torch.equal(always(latents, step), never(latents, step))
        seen.add(inside)
    assert seen == {True, False}


def test_the_interval_is_in_sigma_ends_included_and_comes_from_the_configuration(
    model: Model,
) -> None:
    config = SampleConfig(
        guidance_scale=3.0, guidance_interval=(0.25, 0.75), eta=0.5, negative_prompt="n", width=24
    )
    made = sampler(config, model.family, model.network)
    assert (made.num_inference_steps, made.eta, made.negative_prompt) == (50, 0.5, "n")
    assert (made.height, made.width) == (None, 24)
    for sigma, inside in ((0.2, False), (0.25, True), (0.75, True), (0.8, False)):
        assert made.guidance.applies(sigma) is inside
    # Sigma is not the share of the timesteps: it passes 0.75 long before timestep 750.
    steps = schedule(model, 500).steps
    above = min(step.timestep for step in steps if step.sigma > 0.75)
    assert above in (first_timestep_above(0.75), first_timestep_above(0.75) + 1)
    assert above < 500


def first_timestep_above(sigma: float) -> int:
    """Return the first timestep whose noise exceeds sigma, from the betas of SD 1.x."""
    kept = 1.0
    for timestep in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * timestep / 999
        kept *= 1.0 - root**2
        if (1.0 - kept) ** 0.5 > sigma:
            return timestep
    raise AssertionError


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(folder: Path) -> None:
    encoders = load_encoders(folder)
    both = [embeds.tensors["hidden"] for embeds in encoders.encode(PROMPTS)]
    (again,) = encoders.encode([PROMPTS[1]])
    assert not both[1].requires_grad
    assert torch.equal(both[1], again.tensors["hidden"])


def test_predict_calls_the_network_in_its_precision_and_answers_in_that_of_the_latents(
    model: Model,
) -> None:
    conditioning = model.conditioning(PROMPTS, "")
    latents = noise(2, 4, 8, 8)
    expected = model.network.module(
        latents, torch.tensor([441, 441]), conditioning.text.tensors["hidden"]
    ).sample
    got = model.network.predict(latents.double(), 441, conditioning.text)
    assert got.dtype == torch.float64
    assert torch.equal(got.float(), expected)


def test_everything_is_frozen_and_in_evaluation_mode(model: Model, folder: Path) -> None:
    for module in (model.network.module, model.decoder.module, load_encoders(folder).encoder):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_recomputed_blocks_give_the_same_numbers(model: Model, guidance: float) -> None:
    parameters = lora.inject(model.network.module, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    fill_lora_b(model.network.module, seed=1)
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, ""), Guidance(guidance))
    step = schedule(model, 5).steps[2]

    def gradients(on: bool, has_grad: bool) -> list[Tensor]:
        model.network.recompute_blocks(on)
        latents = noise(2, 4, 8, 8).requires_grad_(has_grad)
        for tensor in parameters:
            tensor.grad = None
        # backward(): reentrant recomputation knows no torch.autograd.grad.
        denoise(latents, step).square().sum().backward()
        model.network.recompute_blocks(False)
        found = [tensor.grad for tensor in (*parameters, latents) if tensor.grad is not None]
        assert len(found) == len(parameters) + has_grad
        return found

    for has_grad in (False, True):
        plain, again = gradients(False, has_grad), gradients(True, has_grad)
        # The same products; gradients that meet at a skip connection are added in another order.
        for a, b in zip(plain, again, strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm())
        assert max(float(gradient.norm()) for gradient in plain) > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_the_decoder_gives_float32_and_its_gradient_does_not_depend_on_recomputation(
    model: Model, recompute: bool
) -> None:
    latents = noise(2, 4, 8, 8).requires_grad_()
    decoder = model.decoder
    pictures = decoder.decode(latents, recompute=recompute)
    assert pictures.dtype == torch.float32
    assert 0.0 <= pictures.min().item() <= pictures.max().item() <= 1.0
    (gradient,) = torch.autograd.grad(pictures.square().sum(), [latents])
    (expected,) = torch.autograd.grad(decoder.decode(latents).square().sum(), [latents])
    assert torch.equal(gradient, expected)
    assert float(gradient.norm()) > 1e-3


def test_the_decoders_parameters_are_those_that_get_a_gradient(model: Model) -> None:
    decoder = model.decoder
    decoder.module.requires_grad_(True)
    decoder.decode(noise(1, 4, 8, 8)).sum().backward()
    used = {id(p) for p in decoder.module.parameters() if p.grad is not None}
    assert {id(p) for p in decoder.parameters()} == used


def test_a_decoder_in_tiles_needs_less_and_draws_nearly_the_same(model: Model) -> None:
    latents = noise(2, 4, 12, 12).requires_grad_()
    weight = noise(2, 3, 24, 24)
    vae = model.decoder.module

    def gradient(decoder: Decoder, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        pictures = decoder.decode(latents, recompute=recompute)
        return pictures.detach(), torch.autograd.grad((pictures * weight).sum(), [latents])[0]

    def peak(decoder: Decoder) -> int:
        exclude = [*decoder.parameters(), latents]
        return memory.count(
            lambda: decoder.decode(latents, recompute=True), exclude=exclude
        ).backward

    whole, whole_gradient = gradient(model.decoder)
    whole_peak = peak(model.decoder)
    single_tile = VaeDecoder(vae, 2, 32, "name")
    assert torch.equal(gradient(single_tile)[0], whole)
    decoder = VaeDecoder(vae, 2, 8, "name")
    tiled, tiled_gradient = gradient(decoder)
    again, again_gradient = gradient(decoder, recompute=True)
    assert peak(decoder) < 0.7 * whole_peak
    with pytest.raises(ConfigError, match="vae_tile_size: 12 is not a multiple of 8, which name"):
        VaeDecoder(vae, 2, 12, "name")
    assert torch.equal(gradient(VaeDecoder(vae, 2, None, "name"))[0], whole)
    assert torch.equal(tiled, again)
    assert torch.equal(tiled_gradient, again_gradient)
    assert tiled.shape == whole.shape
    # Norms see one tile at a time: other pictures, but not quite others.
    assert 1e-4 < float((tiled - whole).abs().mean()) < 0.3
    cosine = torch.nn.functional.cosine_similarity(
        tiled_gradient.flatten(), whole_gradient.flatten(), dim=0
    )
    assert float(cosine) > 0.3


def test_the_size_of_tiles_is_an_option_of_the_model(folder: Path) -> None:
    config = ModelConfig(id=str(folder), vae_tile_size=8)
    decoders = (
        open_model(config, [], CPU).decoder,
        meta_model(config, torch.float32).parts.decoder,
    )
    for decoder in decoders:
        assert decoder.module.use_tiling
        assert decoder.module.tile_latent_min_size == 4
    for refused in (
        lambda config: open_model(config, [], CPU),
        lambda config: meta_model(config, torch.float32),
    ):
        with pytest.raises(ConfigError, match="vae_tile_size: 12 is not a multiple of 8"):
            refused(ModelConfig(id=str(folder), vae_tile_size=12))


def test_sizes_default_to_the_models_own_and_follow_the_units_of_the_network(
    model: Model,
) -> None:
    latent_shape = model.network.latent_shape
    assert latent_shape(None, None) == (4, 8, 8)
    assert latent_shape(32, None) == (4, 16, 8)
    assert latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(ConfigError, match=r"sample\.width: 23 is not a multiple of 4.*nearest: 24"):
        latent_shape(16, 23)
    with pytest.raises(ConfigError, match=r"sample\.height"):
        latent_shape(18, 16)


def test_more_steps_than_timesteps_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="num_inference_steps: 1001"):
        schedule(model, 1001)
    # This model's first timestep is 1, so the last of a thousand is one that it does not know.
    with pytest.raises(ConfigError, match="num_inference_steps: 1000 reaches timestep 1000"):
        schedule(model, 1000)
    assert len(schedule(model, 999)) == 999


def test_noise_prediction_at_zero_terminal_snr_is_refused(tmp_path: Path) -> None:
    folder = small_pipeline(
        tmp_path, scheduler_rescale_betas_zero_snr=True, scheduler_timestep_spacing="trailing"
    )
    with pytest.raises(ConfigError, match="alpha = 0"):
        schedule(load(folder), 10)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_the_precision_is_the_one_asked_for(folder: Path, name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == dtype
    model = load(folder, dtype=name)
    modules = (model.network.module, model.decoder.module, load_encoders(folder, dtype).encoder)
    for module in modules:
        assert {p.dtype for p in module.parameters()} == {dtype}
    assert {e.tensors["hidden"].dtype for e in model.embeds.values()} == {dtype}


def test_latents_stay_in_float32_around_a_network_in_half_precision(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    module = model.network.module
    parameters = lora.inject(module, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    fill_lora_b(module, seed=1)
    assert {p.dtype for p in parameters} == {torch.float32}
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, ""), Guidance(3.0))
    noise_pred = denoise(noise(2, 4, 8, 8), schedule(model, 2).steps[1])
    assert noise_pred.dtype == torch.float32
    pictures = model.decoder.decode(noise_pred)
    assert pictures.dtype == torch.float32
    pictures.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)


def test_the_fingerprint_tells_architectures_apart_and_not_weights(
    folder: Path, tmp_path: Path
) -> None:
    same = load(small_pipeline(tmp_path / "same", seed=7))
    other = load(small_pipeline(tmp_path / "other", block_out_channels=(32, 64)))
    own = load(folder)
    assert own.fingerprint == same.fingerprint
    assert own.fingerprint != other.fingerprint
    before = own.fingerprint
    lora.inject(own.network.module, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    assert own.fingerprint == before


# --- Single files in the layout of the original Latent Diffusion code ---


def to_original_layout(folder: Path) -> dict[str, Tensor]:
    """Rename the weights of `small_pipeline` as the original code names them.

    The names are those of CompVis/latent-diffusion: numbered blocks of modules. Written for one
    resnet a block (two on the way up) and two levels.
    """
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    blocks = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        # Level 0 has attention, level 1 has none.
        "down_blocks.0.resnets.0.": "input_blocks.1.0.",
        "down_blocks.0.attentions.0.": "input_blocks.1.1.",
        "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
        "down_blocks.1.resnets.0.": "input_blocks.3.0.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "up_blocks.0.resnets.0.": "output_blocks.0.0.",
        "up_blocks.0.resnets.1.": "output_blocks.1.0.",
        "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.1.conv.",
        "up_blocks.1.resnets.0.": "output_blocks.2.0.",
        "up_blocks.1.attentions.0.": "output_blocks.2.1.",
        "up_blocks.1.resnets.1.": "output_blocks.3.0.",
        "up_blocks.1.attentions.1.": "output_blocks.3.1.",
    }
    state = original_unet(unet, blocks) | original_vae(vae)
    for name, value in text.items():
        new = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{new}"] = value
    return state


@pytest.fixture(scope="module")
def single_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(to_original_layout(folder), path, metadata={"format": "pt"})
    return path


def check_equal_weights(path: Path, folder: Path) -> tuple[Model, Model]:
    """Return the models of a single file and of its folder, whose weights are the same."""
    models = load(path, config=str(folder)), load(folder)
    encoders = load_encoders(path, config=str(folder)), load_encoders(folder)
    pairs = {
        "unet": [model.network.module for model in models],
        "vae": [model.decoder.module for model in models],
        "text_encoder": [both.encoder for both in encoders],
    }
    for part, (made, expected) in pairs.items():
        state = made.state_dict()
        for name, value in expected.state_dict().items():
            assert torch.equal(state[name], value), f"{part}.{name}"
    return models


def test_a_single_safetensors_file_loads_to_the_numbers_of_its_folder(
    folder: Path, single_file: Path
) -> None:
    model, expected = check_equal_weights(single_file, folder)
    assert model.fingerprint == expected.fingerprint
    assert torch.equal(draw(model), draw(expected))


def test_a_single_file_is_quantised_as_its_folder_is(folder: Path, single_file: Path) -> None:
    found, expected = (
        load(path, config=parts, quantize="int8").network.module.state_dict()
        for path, parts in ((single_file, str(folder)), (folder, None))
    )
    assert any(value.dtype == torch.int8 for value in expected.values())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_single_ckpt_file_loads_to_the_numbers_of_its_folder(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": to_original_layout(folder)}, path)
    check_equal_weights(path, folder)


def test_a_damaged_single_file_is_reported_as_missing_weights(
    folder: Path, single_file: Path, tmp_path: Path
) -> None:
    for name, content in (
        ("cut.safetensors", single_file.read_bytes()[:2000]),
        ("empty.safetensors", b""),
        ("text.ckpt", b"this is no checkpoint"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(AssetError) as caught:
            load(path, config=str(folder))
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "single_file"])
def test_text_encoders_are_gone_before_the_network_is_loaded(
    kind: str, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[Any]] = []
    loaded: list[bool] = []
    load_text_encoders, load_parts = unet.load_text_encoders, unet.load_parts

    def spy_on_encoders(source: Source, device: torch.device) -> unet.ClipText:
        made = load_text_encoders(source, device)
        encoders.extend([weakref.ref(made), weakref.ref(made.encoder)])
        encoders.extend(weakref.ref(p) for p in made.encoder.parameters())
        assert not loaded
        return made

    def spy_on_parts(source: Source, device: torch.device) -> Parts:
        assert encoders
        loaded.append(any(encoder() is not None for encoder in encoders))
        return load_parts(source, device)

    monkeypatch.setattr(unet, "load_text_encoders", spy_on_encoders)
    monkeypatch.setattr(unet, "load_parts", spy_on_parts)
    parts = str(folder) if kind == "single_file" else None
    config = ModelConfig(id=str(request.getfixturevalue(kind)), config=parts)
    model = open_model(config, ["a cat"], CPU)
    assert loaded == [False]
    assert model.embeds["a cat"].tensors["hidden"].device == CPU


# --- What is missing, damaged or of another kind ---


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere.safetensors", "a/b.ckpt"])
def test_a_path_to_nothing_is_reported_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(loading, "hf_hub_download", refuse)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(AssetError, match="no such file or folder") as caught:
        load(name)
    assert name in caught.value.message
    assert "--preset tiny" in (caught.value.hint or "")


def test_a_folder_that_is_no_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(AssetError, match=r"model_index\.json"):
        load(tmp_path)


def test_another_family_of_models_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "inpainting"))
    index = copy / "model_index.json"
    other = "StableDiffusionInpaintPipeline"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', f'"{other}"'))
    with pytest.raises(ConfigError, match=f"is a {other}; supported: ") as caught:
        load(copy)
    assert "supported: StableDiffusionPipeline (Stable Diffusion 1.x" in caught.value.message


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "text_encoder"]
)
def test_a_missing_part_of_a_folder_is_reported(folder: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if (copy / file).is_dir():
        shutil.rmtree(copy / file)
    else:
        (copy / file).unlink()
    with pytest.raises(AssetError, match=r"model\.id: cannot load"):
        load(copy)


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_damaged_part_of_a_folder_is_reported(folder: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / file).write_bytes((copy / file).read_bytes()[:100])
    with pytest.raises(AssetError, match=r"model\.id: cannot load"):
        load(copy)


def test_an_inpainting_model_is_refused(tmp_path: Path) -> None:
    path = small_pipeline(tmp_path, in_channels=9)
    with pytest.raises(ConfigError, match="takes 9 channels, its latents have 4"):
        load(path)
    with pytest.raises(ConfigError, match="takes 9 channels, its latents have 4"):
        meta_model(ModelConfig(id=str(path)), torch.float32)


# What the hub's errors read of a response; its class depends on the version of the hub's client.
RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=RESPONSE), "a/b is gated"),
        (RepositoryNotFoundError("none", response=RESPONSE), "the hub has no model a/b"),
        (RevisionNotFoundError("none", response=RESPONSE), "has no revision 'old'"),
        (RemoteEntryNotFoundError("none", response=RESPONSE), "it has no model_index.json"),
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (HfHubHTTPError("500 broken", response=RESPONSE), "cannot load a/b from the hub"),
        (OSError("no space left\nsecond line"), "cannot load a/b from the hub: no space left"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("at", ["index", "weights"])
def test_what_the_hub_refuses_is_explained(
    error: Exception,
    message: str,
    wrapped: bool,
    at: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        if wrapped:
            # diffusers raises its own OSError from the hub's error.
            raise OSError(str(error)) from error
        raise error

    index = folder / "model_index.json"
    monkeypatch.setattr(
        loading, "hf_hub_download", fail if at == "index" else lambda *_, **__: index
    )
    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    with pytest.raises(AssetError) as caught:
        load("a/b", revision="old")
    assert message in caught.value.message
    assert "second line" not in caught.value.message
    assert caught.value.exit_code == 3
