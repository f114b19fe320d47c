"""Stable Diffusion pipelines: loading, drawing like diffusers, and LoRAs in and out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.device import resolve_dtype
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import load_model
from alignprop_cli.models.meta import outline
from alignprop_cli.models.unet import StableDiffusion
from alignprop_cli.planning import meter as memory
from alignprop_cli.sampling import sample
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline

CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PROMPTS = ["a cat", "dogs"]


def load(path: Path | str, **options: str) -> StableDiffusion:
    model = load_model(ModelConfig(id=str(path), **({"dtype": "float32"} | options)), CPU)
    assert isinstance(model, StableDiffusion)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture
def model(folder: Path) -> StableDiffusion:
    return load(folder)


def noise(*shape: int) -> Tensor:
    return randn(3, *shape, dtype=torch.float32)


@torch.no_grad()
def draw(model: StableDiffusion, guidance: float = 4.0) -> Tensor:
    denoise = model.denoiser(model.encode_prompts(PROMPTS), guidance)
    return model.decode(sample(denoise, noise(2, 4, 8, 8), model.schedule(3)))


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
    assert load(copy).schedule(5) == load(folder).schedule(5)


def test_the_negative_prompt_goes_to_the_unconditional_branch(model: StableDiffusion) -> None:
    conditioning = model.encode_prompts(PROMPTS, "a boat")
    expected = model.encode_prompts(["a boat"]).prompt_embeds
    assert conditioning.prompt_embeds.shape == (2, 16, TEXT_WIDTH)
    assert torch.equal(conditioning.negative_prompt_embeds[1:], expected)
    assert not torch.equal(conditioning.prompt_embeds[:1], expected)


def test_outside_of_its_interval_guidance_is_off_and_costs_nothing(model: StableDiffusion) -> None:
    conditioning = model.encode_prompts(PROMPTS)
    latents, batches = noise(2, 4, 8, 8), []
    model.network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    interval = model.denoiser(conditioning, 4.0, (0.2, 0.7))
    guided, plain = model.denoiser(conditioning, 4.0), model.denoiser(conditioning, 1.0)
    # Of 1000 timesteps, numbered from 0.
    for timestep, inside in ((100, False), (199, False), (200, True), (699, True), (700, False)):
        expected = (guided if inside else plain)(latents, timestep)
        batches.clear()
        assert torch.equal(interval(latents, timestep), expected)
        assert batches == [4 if inside else 2]
    assert not torch.equal(guided(latents, 100), plain(latents, 100))


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(model: StableDiffusion) -> None:
    both = model.encode_prompts(PROMPTS).prompt_embeds
    assert not both.requires_grad
    again = model.encode_prompts([PROMPTS[1]]).prompt_embeds
    assert torch.equal(both[1:], again)


def test_kept_prompts_need_no_encoder_and_others_still_can_be_encoded(
    model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.encode_prompts(PROMPTS, "blurry")
    model.keep_prompts([*PROMPTS, "a cat", "blurry"])
    assert model.pipeline.text_encoder.device == CPU
    other = model.encode_prompts(["a house"]).prompt_embeds
    assert other.isfinite().all()
    assert not torch.equal(other[0], before.prompt_embeds[0])

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a kept prompt was encoded again")

    monkeypatch.setattr(model.pipeline.text_encoder, "forward", refuse)
    after = model.encode_prompts(PROMPTS, "blurry")
    assert torch.equal(before.prompt_embeds, after.prompt_embeds)
    assert torch.equal(before.negative_prompt_embeds, after.negative_prompt_embeds)


def test_everything_is_frozen_and_in_evaluation_mode(model: StableDiffusion) -> None:
    for module in (model.network, model.pipeline.vae, model.pipeline.text_encoder):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_decoder_gives_float32_and_its_gradient_does_not_depend_on_checkpointing(
    model: StableDiffusion, checkpointed: bool
) -> None:
    latents = noise(2, 4, 8, 8).requires_grad_()
    pictures = model.decode(latents, use_checkpoint=checkpointed)
    assert pictures.dtype == torch.float32
    assert 0.0 <= pictures.min().item() <= pictures.max().item() <= 1.0
    (gradient,) = torch.autograd.grad(pictures.square().sum(), [latents])
    (expected,) = torch.autograd.grad(model.decode(latents).square().sum(), [latents])
    assert torch.equal(gradient, expected)
    assert float(gradient.norm()) > 1e-3


def test_a_decoder_in_tiles_needs_less_and_draws_nearly_the_same(
    model: StableDiffusion,
) -> None:
    latents = noise(2, 4, 16, 16).requires_grad_()
    weight = noise(2, 3, 32, 32)

    def gradient(**options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = model.decode(latents, **options)
        return pictures.detach(), torch.autograd.grad((pictures * weight).sum(), [latents])[0]

    def peak() -> int:
        weights = model.decoder_parameters()
        return memory.count(
            lambda: model.decode(latents, use_checkpoint=True), exclude=[*weights, latents]
        ).backward

    whole, whole_gradient = gradient()
    whole_peak = peak()
    try:
        model.tile_decoder(32)  # a single tile
        assert torch.equal(gradient()[0], whole)
        model.tile_decoder(8)
        tiled, tiled_gradient = gradient()
        again, again_gradient = gradient(use_checkpoint=True)
        assert peak() < 0.7 * whole_peak
        with pytest.raises(ConfigError, match="vae_tile_size: 12 is not a multiple of 8"):
            model.tile_decoder(12)
    finally:
        model.tile_decoder(None)
    assert torch.equal(gradient()[0], whole)
    assert torch.equal(tiled, again)
    assert torch.equal(tiled_gradient, again_gradient)
    assert tiled.shape == whole.shape
    # Norms see one tile at a time: other pictures, but not quite others.
    assert 1e-4 < float((tiled - whole).abs().mean()) < 0.3
    cosine = torch.nn.functional.cosine_similarity(
        tiled_gradient.flatten(), whole_gradient.flatten(), dim=0
    )
    assert float(cosine) > 0.3


def test_the_size_of_tiles_is_an_option_of_the_model(tmp_path: Path) -> None:
    path = small_pipeline(tmp_path / "model")
    config = ModelConfig(id=str(path), vae_tile_size=8)
    for made in (load_model(config, CPU), outline(config, torch.float32, "cpu")):
        assert made.pipeline.vae.use_tiling  # type: ignore[attr-defined]
        assert made.pipeline.vae.tile_latent_min_size == 4  # type: ignore[attr-defined]


def test_sizes_default_to_the_models_own_and_follow_the_units_of_the_network(
    model: StableDiffusion,
) -> None:
    assert model.latent_shape(None, None) == (4, 8, 8)
    assert model.latent_shape(32, None) == (4, 16, 8)
    assert model.latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(ConfigError, match=r"sample\.width: 23 is not a multiple of 4.*nearest: 24"):
        model.latent_shape(16, 23)
    with pytest.raises(ConfigError, match=r"sample\.height"):
        model.latent_shape(18, 16)


def test_more_steps_than_timesteps_are_refused(model: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match="num_inference_steps: 1001"):
        model.schedule(1001)


def test_noise_prediction_at_zero_terminal_snr_is_refused(tmp_path: Path) -> None:
    folder = small_pipeline(
        tmp_path, scheduler_rescale_betas_zero_snr=True, scheduler_timestep_spacing="trailing"
    )
    with pytest.raises(ConfigError, match="alpha = 0"):
        load(folder).schedule(10)


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
    for module in (model.network, model.pipeline.vae, model.pipeline.text_encoder):
        assert {p.dtype for p in module.parameters()} == {dtype}


def test_latents_stay_in_float32_around_a_network_in_half_precision(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    parameters = lora.inject(model.network, rank=2, alpha=2, target_modules=TARGETS, seed=0)
    fill_lora_b(model.network, seed=1)
    assert {p.dtype for p in parameters} == {torch.float32}
    denoise = model.denoiser(model.encode_prompts(PROMPTS), 3.0)
    noise_pred = denoise(noise(2, 4, 8, 8), 501)
    assert noise_pred.dtype == torch.float32
    pictures = model.decode(noise_pred)
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
    lora.inject(own.network, rank=2, alpha=2, target_modules=TARGETS, seed=0)
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
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
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
    state: dict[str, Tensor] = {}
    for name, value in unet.items():
        (old,) = [prefix for prefix in blocks if name.startswith(prefix)]
        rest = name.removeprefix(old)
        if ".resnets." in f".{old}":
            part, _, kind = rest.rpartition(".")
            rest = f"{resnet[part]}.{kind}"
        state[f"model.diffusion_model.{blocks[old]}{rest}"] = value
    for name, value in vae.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        # On the way up the original counts levels from the picture, diffusers from the latents.
        new = re.sub(
            r"up_blocks\.(\d)\.resnets\.(\d)",
            lambda m: f"up.{1 - int(m[1])}.block.{m[2]}",
            new,
        )
        new = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", new
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])\.", r"\1.", new)
            # The original writes attention as convolutions of one pixel.
            value = value if value.ndim == 1 else value[:, :, None, None]
        state[f"first_stage_model.{new}"] = value.contiguous()
    for name, value in text.items():
        new = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{new}"] = value
    return state


@pytest.fixture(scope="module")
def single_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(to_original_layout(folder), path, metadata={"format": "pt"})
    return path


def check_equal_weights(model: StableDiffusion, expected: StableDiffusion) -> None:
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(model.pipeline, part).state_dict()
        for name, value in getattr(expected.pipeline, part).state_dict().items():
            assert torch.equal(state[name], value), f"{part}.{name}"


def test_a_single_safetensors_file_loads_to_the_numbers_of_its_folder(
    folder: Path, single_file: Path
) -> None:
    model, expected = load(single_file, config=str(folder)), load(folder)
    check_equal_weights(model, expected)
    assert model.fingerprint == expected.fingerprint
    assert torch.equal(draw(model), draw(expected))


def test_a_single_ckpt_file_loads_to_the_numbers_of_its_folder(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": to_original_layout(folder)}, path)
    check_equal_weights(load(path, config=str(folder)), load(folder))


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


# --- What is missing, damaged or of another kind ---


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere.safetensors", "a/b.ckpt"])
def test_a_path_to_nothing_is_reported_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", refuse)
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
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    index = copy / "model_index.json"
    text = index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionXLPipeline"')
    index.write_text(text)
    with pytest.raises(ConfigError, match="StableDiffusionXLPipeline"):
        load(copy)


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
    with pytest.raises(ConfigError, match="takes 9 channels, its latents have 4"):
        load(small_pipeline(tmp_path, in_channels=9))


# What the hub's errors read of a response; its class depends on the version of the hub's client.
RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=RESPONSE), "a/b is gated"),
        (RepositoryNotFoundError("none", response=RESPONSE), "the hub has no model a/b"),
        (RevisionNotFoundError("none", response=RESPONSE), "has no revision 'old'"),
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (HfHubHTTPError("500 broken", response=RESPONSE), "cannot load a/b from the hub"),
        (OSError("no space left\nsecond line"), "cannot load a/b from the hub: no space left"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_hub_refuses_is_explained(
    error: Exception, message: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        if wrapped:
            # diffusers raises its own OSError from the hub's error.
            raise OSError(str(error)) from error
        raise error

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(AssetError) as caught:
        load("a/b", revision="old")
    assert message in caught.value.message
    assert "second line" not in caught.value.message
    assert caught.value.exit_code == 3
