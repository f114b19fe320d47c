"""LoRA files on a Stable Diffusion: ours, those of diffusers, and those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import LORA_FILE
from alignprop_cli.models.families import load_model
from alignprop_cli.models.unet import StableDiffusion
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


def with_lora(model: StableDiffusion, **options: int) -> dict[str, Tensor]:
    settings = {"rank": 3, "alpha": 5, "seed": 2} | options
    lora.inject(model.network, target_modules=TARGETS, **settings)
    fill_lora_b(model.network, seed=50)
    return lora.weights(model.network)


def save(model: StableDiffusion, directory: Path, metadata: Mapping[str, str] = {}) -> Path:
    return model.save_lora(directory, lora.weights(model.network), metadata)


def test_a_saved_lora_loads_to_the_same_weights_and_pictures(
    model: StableDiffusion, folder: Path, tmp_path: Path
) -> None:
    base = draw(model)
    weights = with_lora(model)
    tuned = draw(model)
    assert float((tuned - base).abs().max()) > 1e-3
    file = save(model, tmp_path)
    assert file == tmp_path / LORA_FILE
    for path in (file, tmp_path):
        again = load(folder)
        again.load_lora(path)
        loaded = lora.weights(again.network)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
        assert torch.equal(draw(again), tuned)


def test_a_saved_lora_gives_equal_pictures_in_plain_diffusers(
    model: StableDiffusion, folder: Path, tmp_path: Path
) -> None:
    # alpha differs from rank, so a reader that ignores it draws something else.
    with_lora(model)
    save(model, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    base = draw_with_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path)
    tuned = draw_with_diffusers(pipeline)
    assert float((tuned - base).abs().max()) > 1e-3
    torch.testing.assert_close(draw(model), tuned, **CLOSE)


def test_a_lora_saved_by_plain_diffusers_is_read(
    model: StableDiffusion, folder: Path, tmp_path: Path
) -> None:
    with_lora(model)
    expected = draw(model)
    (tmp_path / "ours").mkdir()
    save(model, tmp_path / "ours")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "ours")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="default_0"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default_0"].to_dict(),
    )
    again = load(folder)
    again.load_lora(tmp_path / "theirs")
    torch.testing.assert_close(draw(again), expected, **CLOSE)


def test_metadata_goes_to_the_header_of_the_file(model: StableDiffusion, tmp_path: Path) -> None:
    with_lora(model)
    file = save(model, tmp_path, {"alignprop_model": "tiny"})
    with safe_open(file, framework="pt") as reader:
        header = reader.metadata()
    assert header["alignprop_model"] == "tiny"
    assert header["format"] == "pt"
    settings = json.loads(header["lora_adapter_metadata"])
    assert settings["unet.r"] == 3
    assert settings["unet.lora_alpha"] == 5


def test_a_loaded_lora_can_be_trained_on(
    model: StableDiffusion, folder: Path, tmp_path: Path
) -> None:
    with_lora(model)
    save(model, tmp_path)
    again = load(folder, dtype="bfloat16")
    again.load_lora(tmp_path)
    parameters = lora.make_trainable(again.network)
    trained = {name for name, p in again.network.named_parameters() if p.requires_grad}
    assert len(trained) == len(parameters) > 0
    assert all(".lora_" in name for name in trained)
    assert {p.dtype for p in parameters} == {torch.float32}


def check_refused_unchanged(
    model: StableDiffusion, path: Path, kind: type[AlignPropError], match: str
) -> None:
    before = draw(model)
    with pytest.raises(kind, match=match):
        model.load_lora(path)
    assert not lora.is_present(model.network)
    assert torch.equal(draw(model), before)


def test_a_lora_of_another_width_is_refused(model: StableDiffusion, tmp_path: Path) -> None:
    other = load(small_pipeline(tmp_path / "other", block_out_channels=(64, 64)))
    with_lora(other)
    file = save(other, tmp_path)
    check_refused_unchanged(model, file, ConfigError, "does not belong to model")


def test_a_lora_with_layers_this_model_lacks_is_refused(
    model: StableDiffusion, tmp_path: Path
) -> None:
    other = load(
        small_pipeline(
            tmp_path / "other",
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    with_lora(other)
    file = save(other, tmp_path)
    check_refused_unchanged(model, file, ConfigError, "which this model lacks")


def test_a_lora_of_a_text_encoder_alone_is_refused(model: StableDiffusion, tmp_path: Path) -> None:
    file = tmp_path / LORA_FILE
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    state = {
        f"{layer}.down.weight": torch.ones(2, TEXT_WIDTH),
        f"{layer}.up.weight": torch.ones(TEXT_WIDTH, 2),
    }
    save_file(state, file)
    check_refused_unchanged(model, file, ConfigError, "does not belong to model")


def test_files_that_are_no_lora_are_reported(
    model: StableDiffusion, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssetError, match="no LoRA at"):
        model.load_lora(tmp_path)
    with pytest.raises(AssetError, match=r"nothing\.safetensors is missing"):
        model.load_lora(tmp_path / "nothing.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\x00\x00\x00")
    check_refused_unchanged(model, damaged, AssetError, "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    check_refused_unchanged(model, weights, AssetError, "LoRA")
