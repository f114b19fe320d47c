"""Models whose weights are quantised already: refused in every family, by name, before loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_cli.cli import main
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.models import full_weights
from alignprop_cli.models.families import open_model
from alignprop_cli.models.meta import meta_model
from tests.factories import small_pipeline
from tests.flow_models import (
    small_flux1,
    small_klein,
    small_krea2,
    small_qwen_image,
    small_sd3,
    small_zimage,
)

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[Callable[..., Path], str]] = {
    "sd": (small_pipeline, "unet"),
    "sd3": (small_sd3, "transformer"),
    "klein": (small_klein, "transformer"),
    "flux1": (small_flux1, "transformer"),
    "zimage": (small_zimage, "transformer"),
    "qwen": (small_qwen_image, "transformer"),
    "krea2": (small_krea2, "transformer"),
}
# As the libraries write it into config.json.
METHODS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "torchao": {"quant_type": "int8_weight_only"},
    "gguf": {"compute_dtype": "bfloat16"},
    "fp8": {"activation_scheme": "dynamic"},
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_folder_that_is_quantised_is_refused_for_a_run_and_its_plan(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, network = FAMILIES[name]
    folder = build(tmp_path / "model")
    for part, method in ((network, "bitsandbytes"), ("text_encoder", "torchao")):
        file = folder / part / "config.json"
        whole = file.read_text()
        written = {full_weights.KEY: {"quant_method": method, **METHODS[method]}}
        file.write_text(json.dumps(json.loads(whole) | written))
        for door in (
            lambda: open_model(ModelConfig(id=str(folder)), ["a"], CPU),
            lambda: meta_model(ModelConfig(id=str(folder)), torch.float32),
        ):
            with pytest.raises(ConfigError) as raised:
                door()
            assert f"{file}: quantization_config: these" in raised.value.message
            assert f"quantised already ({method})" in raised.value.message
            assert "set model.id to the full weights" in str(raised.value.hint)
        if part == network:  # what a user sees
            with pytest.raises(SystemExit) as ended:
                main(["train", "--preset=tiny", f"--model={folder}", "--dry-run"])
            assert ended.value.code == 2
            said = " ".join(capsys.readouterr().err.split())
            assert f"these weights are quantised already ({method})" in said
            assert "model.quantize: nf4 or int8 to hold them in fewer bits" in said
        # What says nothing is no quantisation.
        file.write_text(json.dumps(json.loads(whole) | {full_weights.KEY: None}))
        assert meta_model(ModelConfig(id=str(folder)), torch.float32)
        file.write_text(whole)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors"),
        # transformers passes over tensors that no layer is for.
        ("text_encoder", "model.safetensors"),
    ],
)
def test_scales_beside_the_weights_are_noticed_where_no_configuration_tells(
    part: str, file: str, tmp_path: Path
) -> None:
    folder = small_zimage(tmp_path / "model")
    path = folder / part / file
    state = load_file(path)
    name = next(name for name, value in state.items() if value.ndim == 2)
    state[f"{name}_scale"] = torch.ones(1)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{part}.*quantised already .*{name}_scale"):
        open_model(ModelConfig(id=str(folder)), ["a"], CPU)


@pytest.mark.parametrize("method", [*METHODS, None])
def test_the_method_is_named(method: str | None) -> None:
    values = {full_weights.KEY: {"quant_method": method, **METHODS.get(str(method), {})}}
    with pytest.raises(ConfigError, match=f"[(]{method or 'by some method'}[)]"):
        full_weights.check_config(values, "x/config.json")


def test_names_of_ordinary_layers_are_not_those_of_a_quantiser() -> None:
    names = ["scale", "x.scale_shift_table", "norm.weight", "x.weight", "quant_conv.weight"]
    full_weights.check_names([*names, "post_quant_conv.bias", "input_scale_x"], "x")
