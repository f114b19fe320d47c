"""Merged models: the weights are base + LoRA, and diffusers' own loaders find all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    FluxPipeline,
    Krea2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.lora import files, formats
from alignprop_cli.lora.factors import Factors, Layers
from alignprop_cli.lora.files import Adapter
from alignprop_cli.models import merged, original_layout, single_files
from alignprop_cli.models.families import find
from tests.factories import randn, small_pipeline, small_xl_pipeline
from tests.flow_models import (
    as_given,
    randn_like_latents,
    scale_of,
    small_flux1,
    small_klein,
    small_krea2,
    small_qwen_image,
    small_sd3,
    small_zimage,
)

ORIGINAL: dict[str, tuple[Callable[..., Path], Any, dict[str, Any]]] = {
    "sd1": (small_pipeline, StableDiffusionPipeline, {}),
    # Stable Diffusion 2 has open_clip's text encoder and linear projections.
    "sd2": (
        small_pipeline,
        StableDiffusionPipeline,
        {"text_hidden_act": "gelu", "use_linear_projection": True, "layers_per_block": 2},
    ),
    "sdxl": (small_xl_pipeline, StableDiffusionXLPipeline, {}),
}
FLOWS: dict[str, tuple[Callable[..., Path], Any, tuple[int, ...]]] = {
    "sd3": (small_sd3, StableDiffusion3Pipeline, (1, 8, 8, 8)),
    "flux1": (small_flux1, FluxPipeline, (1, 8, 8, 8)),
    "klein": (small_klein, Flux2KleinPipeline, (1, 16, 8, 8)),
    "zimage": (small_zimage, ZImagePipeline, (1, 8, 8, 8)),
    "qwen": (small_qwen_image, QwenImagePipeline, (1, 4, 8, 8)),
    "krea2": (small_krea2, Krea2Pipeline, (1, 4, 8, 8)),
}


def layers_of(pipeline: Any, ends: tuple[str, ...], scale: float = 0.1) -> Layers:
    """Return a random LoRA of rank 2 and alpha 3 for the layers whose names end so."""
    network: Any = getattr(pipeline, "unet", None) or pipeline.transformer
    made: dict[str, Factors] = {}
    for number, (name, layer) in enumerate(network.named_modules()):
        if name.endswith(ends) and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            out, inputs, *kernel = layer.weight.shape
            down = randn(number, 2, inputs, *kernel, dtype=torch.float32)
            up = scale * randn(1000 + number, out, 2, *[1] * len(kernel), dtype=torch.float32)
            made[name] = Factors(down, up, 3.0)
    return made


def written(folder: Path, layers: Layers, prefix: str) -> Adapter:
    folder.mkdir()
    weights, settings = formats.packed(layers)
    file = files.save(folder, weights, {}, prefix=prefix, adapter_metadata=settings)
    return files.read(file)


def parts_of(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of every part with weights."""
    parts = pipeline.components.items()
    return {n: part.state_dict() for n, part in parts if isinstance(part, torch.nn.Module)}


def check_same(found: Any, expected: Any, but: str | None = None) -> None:
    mine, theirs = parts_of(found), parts_of(expected)
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {but}:
        assert mine[name].keys() == theirs[name].keys()
        assert all(torch.equal(mine[name][key], value) for key, value in theirs[name].items())


def image(pipeline: Any, latents: torch.Tensor, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt="a cat",
        num_inference_steps=2,
        latents=as_given(pipeline, latents),
        output_type="pt",
        **scale_of(pipeline, 2.0),
        **options,
    )
    return made.images


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2", marks=pytest.mark.long), "sdxl"])
def test_both_kinds_of_merged_model_have_the_weights_of_base_and_lora(
    name: str, tmp_path: Path
) -> None:
    build, kind, options = ORIGINAL[name]
    base = build(tmp_path / "base", **options)
    plain = kind.from_pretrained(base)
    # Linear layers and convolutions.
    layers = layers_of(plain, ("to_q", "to_out.0", "conv1", "ff.net.2"))
    adapter = written(tmp_path / "lora", layers, "unet.")
    config = ModelConfig(id=str(base))
    (tmp_path / "out").mkdir()
    done = merged.save_folder(config, adapter, tmp_path / "out")
    assert (done.layers, done.dtype) == (len(layers), "float32")
    assert 0.0 < done.rounding < 1e-5

    # 1. The folder: W + (alpha / rank) B A in the network, everything else as it was.
    folder = kind.from_pretrained(tmp_path / "out")
    check_same(folder, plain, but="unet")
    before, after = parts_of(plain)["unet"], parts_of(folder)["unet"]
    for key, value in before.items():
        factors = layers.get(key.removesuffix(".weight"))
        expected = value
        if factors is not None:
            product = factors.up.double().flatten(1) @ factors.down.double().flatten(1)
            expected = (value.double() + 1.5 * product.view(value.shape)).float()
        assert torch.equal(after[key], expected), key

    # 2. The single file, by diffusers' own reader of such files.
    file = tmp_path / "model.safetensors"
    merged.save_single_file(config, adapter, file, "a title")
    check_same(kind.from_single_file(str(file), config=str(base)), folder)

    # 3. Images of the merged model and of base and LoRA, both drawn by diffusers.
    latents = randn_like_latents((1, 4, 8, 8))
    base_image = image(plain, latents, height=16, width=16)
    plain.load_lora_weights(tmp_path / "lora")
    expected = image(plain, latents, height=16, width=16)
    found = image(folder, latents, height=16, width=16)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)
    assert float((found - base_image).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "name", ["sd3", *(pytest.param(n, marks=pytest.mark.long) for n in FLOWS if n != "sd3")]
)
def test_a_merged_flow_draws_the_images_of_base_and_lora(name: str, tmp_path: Path) -> None:
    build, kind, shape = FLOWS[name]
    base = build(tmp_path / "base")
    pipeline = kind.from_pretrained(base)
    family, _ = find(ModelConfig(id=str(base)))
    ends = ("to_q", "to_k", "to_v", "to_qkv_mlp_proj")
    layers = layers_of(pipeline, ends)
    assert len(layers) >= 5
    adapter = written(tmp_path / "lora", layers, family.lora_prefix)
    (tmp_path / "out").mkdir()
    merged.save_folder(ModelConfig(id=str(base)), adapter, tmp_path / "out")
    found = kind.from_pretrained(tmp_path / "out")
    check_same(found, pipeline, but="transformer")
    side = {"klein": 32, "zimage": 64, "krea2": 64}.get(name, 16)
    latents = randn_like_latents(shape)
    size = {"height": side, "width": side}
    before = image(pipeline, latents, **size)
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = image(pipeline, latents, **size)
    torch.testing.assert_close(image(found, latents, **size), expected, rtol=0.0, atol=1e-3)
    assert float((expected - before).abs().max()) > 1e-2
    # Of these families no single files are written.
    with pytest.raises(ConfigError, match="is not written as a single file") as raised:
        merged.save_single_file(ModelConfig(id=str(base)), adapter, tmp_path / "f", "t")
    assert "--export merged" in str(raised.value.hint)


def test_a_variant_in_half_precision_and_many_files_is_merged_into_plain_names(
    tmp_path: Path,
) -> None:
    plain = StableDiffusionPipeline.from_pretrained(small_pipeline(tmp_path / "float32"))
    plain.to(torch.float16).save_pretrained(
        tmp_path / "base", variant="fp16", max_shard_size="20KB"
    )
    names = {path.name for path in (tmp_path / "base" / "text_encoder").iterdir()}
    assert any("fp16" in name and "00002-of" in name for name in names)
    layers = layers_of(plain, ("to_q",))
    adapter = written(tmp_path / "lora", layers, "unet.")
    config = ModelConfig(id=str(tmp_path / "base"), variant="fp16", quantize="int8")
    (tmp_path / "out").mkdir()
    done = merged.save_folder(config, adapter, tmp_path / "out")
    assert done.dtype == "float16"
    # float16 has a step of 2^-11, and the update is about as large as the weights.
    assert 1e-5 < done.rounding < 1e-2
    assert not [path for path in (tmp_path / "out").rglob("*fp16*")]
    found = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16)
    check_same(found, plain, but="unet")
    for key, factors in layers.items():
        weight = plain.unet.get_submodule(key).get_parameter("weight")
        expected = (weight.double() + factors.delta()).half()
        assert torch.equal(found.unet.get_submodule(key).get_parameter("weight"), expected)


def test_the_base_may_be_a_single_file_itself(tmp_path: Path) -> None:
    base = small_pipeline(tmp_path / "base")
    plain = StableDiffusionPipeline.from_pretrained(base)
    layers = layers_of(plain, ("to_q",))
    none = {name: Factors(0 * one.down, one.up, one.alpha) for name, one in layers.items()}
    file = tmp_path / "base.safetensors"
    merged.save_single_file(
        ModelConfig(id=str(base)), written(tmp_path / "none", none, "unet."), file, "base"
    )
    adapter = written(tmp_path / "lora", layers, "unet.")
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    merged.save_folder(ModelConfig(id=str(file), config=str(base)), adapter, tmp_path / "a")
    merged.save_folder(ModelConfig(id=str(base)), adapter, tmp_path / "b")
    check_same(
        StableDiffusionPipeline.from_pretrained(tmp_path / "a"),
        StableDiffusionPipeline.from_pretrained(tmp_path / "b"),
    )


def test_a_single_file_says_what_it_is_and_is_the_same_every_time(tmp_path: Path) -> None:
    base = small_xl_pipeline(tmp_path / "base")
    plain = StableDiffusionXLPipeline.from_pretrained(base)
    adapter = written(tmp_path / "lora", layers_of(plain, ("attn2.to_k",)), "unet.")
    made = [tmp_path / name for name in ("1.safetensors", "2.safetensors")]
    for file in made:
        merged.save_single_file(ModelConfig(id=str(base)), adapter, file, "a title")
    assert made[0].read_bytes() == made[1].read_bytes()
    with safe_open(made[0], "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.title"] == "a title"
    assert header["modelspec.resolution"] == "16x16"
    assert header["modelspec.prediction_type"] == "epsilon"
    # Autoencoders of the original have convolutions of one pixel there, which ComfyUI reads.
    state = load_file(made[0])
    assert state["first_stage_model.encoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)


def test_a_single_file_of_sdxl_carries_the_marks_of_its_noise(tmp_path: Path) -> None:
    # Named as ComfyUI looks for them (comfy/supported_models.py, SDXL.model_type).
    base = small_xl_pipeline(tmp_path / "base")
    place = base / "scheduler" / "scheduler_config.json"
    plain = StableDiffusionXLPipeline.from_pretrained(base).to(torch.float16)
    plain.save_pretrained(base)
    adapter = written(tmp_path / "lora", layers_of(plain, ("attn2.to_k",)), "unet.")
    file = tmp_path / "made.safetensors"
    values = json.loads(place.read_text())
    for noise, marks in (
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, set()),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}, {"v_pred"}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
    ):
        place.write_text(json.dumps(values | noise))
        merged.save_single_file(ModelConfig(id=str(base)), adapter, file, "a title")
        state = load_file(file)
        assert {name for name in state if "." not in name} == marks
        said = single_files.noise_marks(file)
        assert said == ({k: v for k, v in noise.items() if v is not False} if marks else {})
    # Merged once more, a mark of another precision than the weights changes nothing.
    state = {**state, "v_pred": torch.empty(0, dtype=torch.float32)}
    save_file(state, file, {"format": "pt"})
    assert merged._stored([file]) == torch.float16
    (tmp_path / "out").mkdir()
    merged.save_folder(ModelConfig(id=str(file), config=str(base)), adapter, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (made["prediction_type"], made["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_a_part_that_the_original_layout_lacks_is_named(tmp_path: Path) -> None:
    base = small_pipeline(tmp_path / "base", time_cond_proj_dim=8)
    plain = StableDiffusionPipeline.from_pretrained(base)
    adapter = written(tmp_path / "lora", layers_of(plain, ("to_q",)), "unet.")
    with pytest.raises(ConfigError, match=r"no place for unet\.time_embedding\.cond_proj"):
        merged.save_single_file(ModelConfig(id=str(base)), adapter, tmp_path / "f", "t")


def test_a_tensor_of_a_text_encoder_that_the_original_layout_lacks_is_named() -> None:
    encoder = torch.nn.ModuleDict({"adapter": torch.nn.Linear(1, 1, bias=False)})
    with pytest.raises(ConfigError, match=r"no place for text_encoder\.text_model\.adapter\.weig"):
        original_layout._open_clip(encoder, "x.")


def test_a_dora_is_merged_as_its_paper_says() -> None:
    """W' = m V / |V| with V = W + (alpha / rank) B A; the norm is of each row (eq. 5)."""
    linear = torch.nn.Linear(5, 4)
    down, up, m = randn(1, 2, 5), randn(2, 4, 2), randn(3, 4).abs() + 0.5
    network = torch.nn.ModuleDict({"x": linear.double()})
    before = linear.weight.detach().clone()
    merged.merge(network, {"x": Factors(down, up, 3.0, magnitude=m)})
    v = before + 1.5 * up @ down
    for row in range(4):
        expected = m[row] * v[row] / v[row].square().sum().sqrt()
        torch.testing.assert_close(linear.weight[row], expected)


def test_a_weight_that_leaves_the_range_of_float16_is_refused() -> None:
    network = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2).half()})
    layers = {"x": Factors(torch.ones(1, 2), torch.full((2, 1), 1e6), 1.0)}
    with pytest.raises(RunError, match="layer x is too large for float16"):
        merged.merge(network, layers)


def test_without_space_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_pipeline(tmp_path / "base")
    plain = StableDiffusionPipeline.from_pretrained(base)
    adapter = written(tmp_path / "lora", layers_of(plain, ("to_q",)), "unet.")
    (tmp_path / "out").mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"needs 0\.00 GiB, and the disk has 0\.00 GiB left"):
        merged.save_folder(ModelConfig(id=str(base)), adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(RunError, match="the file needs"):
        merged.save_single_file(ModelConfig(id=str(base)), adapter, tmp_path / "f", "t")
    assert not (tmp_path / "f").exists()
