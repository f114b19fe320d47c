"""Single files: of which family they are, and those that are refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.models.families import find, open_model
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.single_files import noise_marks

CPU = torch.device("cpu")
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
"""The first layer of Stable Diffusion's network."""


def written(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors; a .ckpt as Latent Diffusion does, under `state_dict`."""
    if path.suffix == ".ckpt":
        torch.save({"state_dict": dict(tensors)}, path)
    else:
        save_file(dict(tensors), path)
    return path


def ones(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}


# Names and shapes as diffusers' conversion from single files reads them
# (loaders/single_file_utils.py), and the model that it takes their kind from.
OTHERS = {
    "FLUX.1-dev": (
        ones(
            **{
                "double_blocks.0.img_attn.norm.key_norm.scale": (2,),
                "guidance_in.in_layer.bias": (2,),
                "img_in.weight": (4, 64),
            }
        ),
        "black-forest-labs/FLUX.1-dev",
    ),
    "FLUX.1-schnell, as ComfyUI writes it": (
        ones(
            **{"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (2,)},
            **{"vae.decoder.conv_in.bias": (2,)},
        ),
        "black-forest-labs/FLUX.1-schnell",
    ),
    "FLUX.2": (
        ones(**{"single_stream_modulation.lin.weight": (2, 2)}),
        "black-forest-labs/FLUX.2-dev",
    ),
    "SD 3.5 medium": (
        ones(
            **{
                "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (
                    9216,
                ),
                "model.diffusion_model.pos_embed": (1, 147456, 1),
            }
        ),
        "stabilityai/stable-diffusion-3.5-medium",
    ),
    "SD 3.5 large": (
        ones(**{"joint_blocks.37.x_block.mlp.fc1.weight": (2, 2)}),
        "stabilityai/stable-diffusion-3.5-large",
    ),
    "Z-Image": (
        ones(**{"model.diffusion_model.layers.0.adaLN_modulation.0.weight": (2, 2)}),
        "Tongyi-MAI/Z-Image-Turbo",
    ),
    "Krea 2": (ones(**{"txtfusion.projector.weight": (2, 2)}), "krea/Krea-2-Raw"),
    "SD 1.5 inpainting": (
        ones(**{FIRST: (4, 9, 3, 3)}),
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
    ),
    "Playground 2.5": (
        ones(**{FIRST: (4, 4, 3, 3), "edm_mean": (4,)}),
        "playgroundai/playground-v2.5-1024px-aesthetic",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_another_kind_of_model_is_named_and_refused(name: str, suffix: str, tmp_path: Path) -> None:
    tensors, like = OTHERS[name]
    file = written(tmp_path / f"model{suffix}", tensors)
    with pytest.raises(ConfigError, match="of whose family no single files") as raised:
        find(ModelConfig(id=str(file)))
    assert f"its tensors are those of a model like {like}, of whose" in raised.value.message
    assert "from_single_file" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("tensors", "message", "hint"),
    [
        ({"transformer_blocks.0.attn.to_q.weight": (2, 2)}, "no single file of Stable", "folder"),
        # Parts by themselves.
        ({"down_blocks.0.resnets.0.conv1.weight": (2, 2)}, "no single file of Stable", "one part"),
        ({"decoder.conv_in.weight": (2, 2)}, "it has no tensor model.diffusion_model", "one part"),
        ({"text_model.embeddings.position_embedding.weight": (2, 2)}, "no single file", "hub id"),
        # SD 3 keys without the shapes that diffusers looks at.
        ({"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9,)}, "no single file", "part"),
        ({"lora_unet_mid_block.lora_down.weight": (2, 2)}, "is a LoRA, not a base", "lora.init"),
        ({"transformer.x.lora_A.weight": (2, 2)}, "is a LoRA, not a base model", "lora.init"),
    ],
)
def test_what_is_no_whole_model_is_refused(
    tensors: dict[str, tuple[int, ...]], message: str, hint: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "model.safetensors", ones(**tensors))
    with pytest.raises(ConfigError, match=message) as raised:
        find(ModelConfig(id=str(file)))
    assert hint in str(raised.value.hint)


def test_a_single_file_with_the_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "model.safetensors", tmp_path / "parts"
    written(file, ones(**{"double_blocks.0.img_attn.norm.key_norm.scale": (2,)}))
    folder.mkdir()

    def index(kind: str) -> ModelConfig:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        return ModelConfig(id=str(file), config=str(folder))

    for kind in ("StableDiffusion3Pipeline", "Flux2KleinPipeline", "FluxPipeline"):
        config = index(kind)
        # By both ways to a model: for the plan and for the weights.
        for door in (
            lambda config: find(config),
            lambda config: meta_model(config, torch.float32),
            lambda config: open_model(config, ["a"], CPU),
        ):
            with pytest.raises(ConfigError, match="of whose family no single files") as raised:
                door(config)
            assert f"--model {folder}" in str(raised.value.hint)
    # The folder of a family that has single files does not make it one of them.
    with pytest.raises(ConfigError, match=r"a model like black-forest-labs/FLUX\.1-schnell"):
        find(index("StableDiffusionPipeline"))
    file.unlink()
    written(file, ones(**{FIRST: (4, 4, 3, 3), "conditioner.embedders.1.model.x": (2,)}))
    assert find(index("StableDiffusionXLPipeline"))[0].pipeline_class == "StableDiffusionXLPipeline"
    with pytest.raises(ConfigError, match=r"model\.config: it is Stable Diffusion 1.*is .*XL"):
        find(index("StableDiffusionPipeline"))
    file.unlink()
    written(file, ones(**{FIRST: (4, 4, 3, 3)}))
    kind = "LatentConsistencyModelPipeline"
    assert find(index(kind))[0].pipeline_class == kind


@pytest.mark.parametrize(
    ("more", "how"),
    [
        ({"x.weight": torch.ones(2, dtype=torch.float8_e4m3fn)}, "x.weight is float8_e4m3fn"),
        ({"x.weight": torch.ones(2, dtype=torch.float8_e5m2)}, "x.weight is float8_e5m2"),
        ({"scaled_fp8": torch.ones(1)}, "a tensor scaled_fp8"),
        ({"x.scale_weight": torch.ones(1)}, "a tensor x.scale_weight"),
        ({"x.weight.absmax": torch.ones(1)}, "a tensor x.weight.absmax"),
        (
            {"x.weight.quant_state.bitsandbytes__nf4": torch.ones(1)},
            "a tensor x.weight.quant_state.bitsandbytes__nf4",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_quantised_single_file_is_refused(
    more: dict[str, Tensor], how: str, suffix: str, tmp_path: Path
) -> None:
    file = written(tmp_path / f"m{suffix}", {**ones(**{FIRST: (4, 4, 3, 3)}), **more})
    with pytest.raises(ConfigError, match="are quantised already") as raised:
        find(ModelConfig(id=str(file)))
    assert how in raised.value.message
    assert "model.quantize: nf4 or int8" in str(raised.value.hint)


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_a_header_says_that_the_network_predicts_v(key: str, tmp_path: Path) -> None:
    # The first is ModelSpec's key, which sd-scripts writes, the second is ComfyUI's.
    file = tmp_path / "model.safetensors"
    for word, found in (("epsilon", {}), ("v", {"prediction_type": "v_prediction"})):
        save_file(ones(**{FIRST: (4, 4, 3, 3)}), file, {key: word})
        assert noise_marks(file) == found


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"quantised already \(GGUF\)"):
        find(ModelConfig(id=str(tmp_path / "flux1-dev-Q4_0.gguf")))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02]q\x00."])
def test_a_file_that_cannot_be_read_is_left_to_loading(content: bytes, tmp_path: Path) -> None:
    for name in ("m.safetensors", "m.ckpt"):
        (tmp_path / name).write_bytes(content)
        family, _ = find(ModelConfig(id=str(tmp_path / name)))
        assert family.pipeline_class == "StableDiffusionPipeline"
