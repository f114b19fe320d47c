"""LoRA files with ComfyUI's or kohya's names are the update that they are in the original's layers.

What becomes of that update in diffusers is told by diffusers' converters of whole models, which
turn the original code's weights into those of its own classes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.lora import files, names, original
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.factors import Factors
from alignprop_cli.models.families import ARCHITECTURES
from tests.factories import randn

Shapes = dict[str, tuple[int, ...]]


class Whole(dict[str, Tensor]):
    """A checkpoint in which every tensor is found: those that no LoRA changes are zeros.

    Converters divide the rows of biases too, of which there are these many in the largest.
    """

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, *default or (torch.zeros(7 * 32),))


@dataclass(frozen=True)
class Case:
    """A small network, and what its original code's layers are.

    Args:
        build: Makes it.
        convert: diffusers' converter of whole checkpoints.
        shapes: Of the weights of the original's layers, all that a LoRA may change.
    """

    build: Callable[[], torch.nn.Module]
    convert: Callable[..., dict[str, Tensor]]
    shapes: Shapes


def flux1_converter() -> Callable[..., dict[str, Tensor]]:
    """Return the converter for a network of width 32: 3072 is written in it."""
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(function)
    assert source.count("inner_dim = 3072") == 1
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), names)
    return names[function.__name__]


def blocks(name: str, count: int, layers: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{name}.{n}.{layer}": shape for n in range(count) for layer, shape in layers.items()}


def flux1() -> Case:
    def build() -> torch.nn.Module:
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )

    stream = {"mod.lin": (192, 32), "attn.qkv": (96, 32), "attn.proj": (32, 32)}
    stream |= {"mlp.0": (128, 32), "mlp.2": (32, 128)}
    double = {f"{side}_{name}": shape for side in ("img", "txt") for name, shape in stream.items()}
    single = {"modulation.lin": (96, 32), "linear1": (224, 32), "linear2": (32, 160)}
    shapes: Shapes = {"img_in": (32, 16), "txt_in": (32, 24)}
    for name, inputs in {"time_in": 256, "guidance_in": 256, "vector_in": 20}.items():
        shapes |= {f"{name}.in_layer": (32, inputs), f"{name}.out_layer": (32, 32)}
    shapes |= {"final_layer.linear": (16, 32), "final_layer.adaLN_modulation.1": (64, 32)}
    shapes |= blocks("double_blocks", 2, double) | blocks("single_blocks", 2, single)
    return Case(build, flux1_converter(), shapes)


def flux2() -> Case:
    def build() -> torch.nn.Module:
        return Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4),
            timestep_guidance_channels=64,
            guidance_embeds=True,
        )

    stream = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.0": (192, 32), "mlp.2": (32, 96)}
    double = {f"{side}_{name}": shape for side in ("img", "txt") for name, shape in stream.items()}
    single = {"linear1": (288, 32), "linear2": (32, 128)}
    shapes: Shapes = {"img_in": (32, 16), "txt_in": (32, 24)}
    for name in ("time_in", "guidance_in"):
        shapes |= {f"{name}.in_layer": (32, 64), f"{name}.out_layer": (32, 32)}
    shapes |= {f"double_stream_modulation_{side}.lin": (192, 32) for side in ("img", "txt")}
    shapes |= {"single_stream_modulation.lin": (96, 32)}
    shapes |= {"final_layer.linear": (16, 32), "final_layer.adaLN_modulation.1": (64, 32)}
    shapes |= blocks("double_blocks", 2, double) | blocks("single_blocks", 2, single)
    convert = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers
    return Case(build, convert, shapes)


def sd3() -> Case:
    def build() -> torch.nn.Module:
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            out_channels=8,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )

    attention = {"attn.qkv": (96, 32), "attn.proj": (32, 32)}
    forward = {"mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}
    second = {name.replace("attn", "attn2"): shape for name, shape in attention.items()}
    # The first two blocks have a second attention, the last makes no more of the prompt.
    modulation = "adaLN_modulation.1"
    sides = {
        0: (attention | second | forward | {modulation: (288, 32)}, {modulation: (192, 32)}),
        2: (attention | forward | {modulation: (192, 32)}, {modulation: (64, 32)}),
    }
    sides[0][1].update(attention | forward)
    sides[2][1].update({"attn.qkv": (96, 32)})
    shapes: Shapes = {"x_embedder.proj": (32, 8, 2, 2), "context_embedder": (32, 24)}
    for name, inputs in {"t_embedder": 256, "y_embedder": 20}.items():
        shapes |= {f"{name}.mlp.0": (32, inputs), f"{name}.mlp.2": (32, 32)}
    shapes |= {"final_layer.linear": (32, 32), "final_layer.adaLN_modulation.1": (64, 32)}
    for number in range(3):
        for side, layers in zip(("x", "context"), sides[0 if number < 2 else 2], strict=True):
            shapes |= {f"joint_blocks.{number}.{side}_block.{n}": s for n, s in layers.items()}
    convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    return Case(build, convert, shapes)


def zimage() -> Case:
    def build() -> torch.nn.Module:
        return ZImageTransformer2DModel(
            in_channels=8,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 64, 64],
        )

    block = {"attention.qkv": (96, 32), "attention.out": (32, 32)}
    # 8 / 3 of the width.
    block |= {"feed_forward.w1": (85, 32), "feed_forward.w2": (32, 85), "feed_forward.w3": (85, 32)}
    shapes: Shapes = {"x_embedder": (32, 32), "cap_embedder.1": (32, 24)}
    shapes |= {"t_embedder.mlp.0": (1024, 256), "t_embedder.mlp.2": (32, 1024)}
    shapes |= {"final_layer.linear": (32, 32), "final_layer.adaLN_modulation.1": (32, 32)}
    modulated = block | {"adaLN_modulation.0": (128, 32)}
    shapes |= blocks("layers", 2, modulated) | blocks("noise_refiner", 1, modulated)
    shapes |= blocks("context_refiner", 1, block)
    convert = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers
    return Case(build, convert, shapes)


CASES = {"flux1": flux1, "flux2": flux2, "sd3": sd3, "zimage": zimage}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def pair(shape: tuple[int, ...], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer whose weight has this shape."""
    out, *inputs = shape
    ones = [1] * (len(inputs) - 1)
    down = 0.3 * randn(2 * seed, rank, *inputs, dtype=torch.float32)
    return down, 0.3 * randn(2 * seed + 1, out, rank, *ones, dtype=torch.float32)


def product(down: Tensor, up: Tensor) -> Tensor:
    """Return B A in the shape of the weight."""
    return (up.double().flatten(1) @ down.double().flatten(1)).view(len(up), *down.shape[1:])


def layers_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of linear layers and convolutions, by the names of the layers."""
    ends = ".weight"
    return {n.removesuffix(ends): w for n, w in weights.items() if n.endswith(ends) and w.ndim > 1}


def comfyuis(name: str) -> str:
    return f"diffusion_model.{name}"


def kohyas(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


# The spelling of the layers and of the factors, and which layers have an alpha.
SPELLINGS = {
    "A and B": (comfyuis, ("lora_A", "lora_B"), None),
    "A and B with alpha": (comfyuis, ("lora_A", "lora_B"), 1),
    "down and up with alpha": (comfyuis, ("lora_down", "lora_up"), 1),
    "an alpha for every second": (comfyuis, ("lora_down", "lora_up"), 2),
    "the name of an adapter": (comfyuis, ("lora_A.default", "lora_B.default"), None),
    "kohya's": (kohyas, ("lora_down", "lora_up"), 1),
    "kohya's with an alpha for every second": (kohyas, ("lora_down", "lora_up"), 2),
}


def written(case: Case, spelling: str, place: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a file with a LoRA of every layer, and return what it adds to diffusers' weights."""
    spelled, (a, b), every = SPELLINGS[spelling]
    state: dict[str, Tensor] = {}
    updates = Whole()
    for number, (name, shape) in enumerate(case.shapes.items()):
        rank = 1 + number % 4
        down, up = pair(shape, rank, number)
        layer = spelled(name)
        state |= {f"{layer}.{a}.weight": down, f"{layer}.{b}.weight": up}
        scaling = 1.0
        if every and number % every == 0:
            alpha = 0.5 * (1 + number % 7)
            state[f"{layer}.alpha"] = torch.tensor(alpha)
            scaling = alpha / rank
        updates[f"{name}.weight"] = scaling * product(down, up)
    file = place / "original.safetensors"
    save_file(state, file)
    return file, layers_of(case.convert(updates))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layer_is_read_as_diffusers_converts_its_weights(
    case: Case, tmp_path: Path, spelling: str
) -> None:
    file, expected = written(case, spelling, tmp_path)
    adapter = files.read(file)
    assert adapter.prefix == "transformer."
    assert adapter.layers.keys() == expected.keys()
    for name, factors in adapter.layers.items():
        torch.testing.assert_close(factors.delta(), expected[name], rtol=1e-12, atol=1e-14)


def test_the_network_computes_with_that_update_in_all_of_its_layers(
    case: Case, tmp_path: Path
) -> None:
    file, expected = written(case, "an alpha for every second", tmp_path)
    network = case.build()
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    every_layer = {name for name, layer in network.named_modules() if isinstance(layer, kinds)}
    assert every_layer == expected.keys()
    before = {name: network.get_submodule(name).weight.detach().clone() for name in every_layer}
    lora.load(network, files.read(file), "small")
    for name in every_layer:
        layer = network.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        # W' = W + the update, in float32.
        layer.merge()
        change = layer.get_base_layer().weight.detach().double() - before[name].double()
        torch.testing.assert_close(change, expected[name], rtol=1e-4, atol=2e-6)


def test_the_magnitudes_of_a_dora_go_with_their_rows(case: Case, tmp_path: Path) -> None:
    """The weight is m (W + B A) / |W + B A|, the norm of each row, in the original's layers."""
    state: dict[str, Tensor] = {}
    before, after = Whole(), Whole()
    for number, (name, shape) in enumerate(case.shapes.items()):
        down, up = pair(shape, 2, number)
        magnitude = randn(500 + number, shape[0], dtype=torch.float32).abs() + 0.5
        weight = randn(900 + number, *shape)
        per_row = [len(up), *[1] * (len(shape) - 1)]
        whole = weight + product(down, up)
        lengths = magnitude.double() / whole.flatten(1).norm(dim=1)
        before[f"{name}.weight"], after[f"{name}.weight"] = weight, lengths.view(per_row) * whole
        written = magnitude if len(shape) == 2 else magnitude.view(1, -1, 1, 1)
        for part, value in (
            ("lora_A.weight", down),
            ("lora_B.weight", up),
            ("lora_magnitude_vector", written),
        ):
            state[f"diffusion_model.{name}.{part}"] = value
    save_file(state, tmp_path / "dora.safetensors")
    old, new = (layers_of(case.convert(weights)) for weights in (before, after))
    found = files.read(tmp_path / "dora.safetensors").layers
    assert found.keys() == new.keys()
    for name, factors in found.items():
        torch.testing.assert_close(factors.merged(old[name]), new[name], rtol=1e-12, atol=1e-12)


def test_a_file_that_is_read_can_be_written_and_read_again(case: Case, tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(case.shapes.items()):
        down, up = pair(shape, 2, number)
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, tmp_path / "given.safetensors")
    given = files.read(tmp_path / "given.safetensors")
    file = files.save_for_comfyui(
        tmp_path / "made.safetensors", given.layers, {}, prefix=given.prefix, title="t"
    )
    made = files.read(file)
    assert made.prefix == given.prefix
    assert made.layers.keys() == given.layers.keys()
    for name, factors in made.layers.items():
        assert factors.scaling == 1.0
        assert torch.equal(factors.down, given.layers[name].down)
        assert torch.equal(factors.up, given.layers[name].up)


# --- Beside diffusers' converters of LoRA files, for what these do rightly ---

A_B, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
# The pipeline, the layers and the widths (out, in), the spelling of the layers and of the factors,
# and alpha.
CONVERTED = {
    "zimage": (
        "ZImagePipeline",
        {"layers.3.attention.to_q": (8, 12), "context_refiner.0.feed_forward.w1": (5, 12)},
        comfyuis,
        A_B,
        2.0,
    ),
    "krea2": (
        "Krea2Pipeline",
        {"blocks.3.attn.wq": (8, 12), "blocks.12.attn.wo": (12, 12), "blocks.3.mlp.up": (40, 12)}
        | {"txtfusion.refiner_blocks.1.attn.gate": (12, 12), "txtfusion.projector": (1, 12)}
        | {"txtfusion.layerwise_blocks.0.mlp.down": (12, 5), "tproj.1": (72, 12)}
        | {"first": (12, 4), "last.linear": (4, 12), "txtmlp.3": (12, 12), "tmlp.0": (12, 8)},
        comfyuis,
        A_B,
        None,
    ),
    "flux2": (
        "Flux2KleinPipeline",
        {"double_blocks.0.txt_attn.qkv": (36, 12), "single_blocks.0.linear1": (108, 12)},
        comfyuis,
        A_B,
        None,
    ),
    "flux2 with diffusers' names": (
        "Flux2KleinPipeline",
        {"transformer_blocks.0.attn.to_q": (12, 12)},
        comfyuis,
        A_B,
        None,
    ),
    "flux1": (
        "FluxPipeline",
        {"double_blocks.0.img_attn.qkv": (36, 12), "double_blocks.7.img_mlp.2": (12, 48)},
        comfyuis,
        DOWN_UP,
        2.0,
    ),
    # Without the last layer, whose alpha diffusers drops, and linear1, which is 3072 wide there.
    "flux1 of kohya": (
        "FluxPipeline",
        {
            "double_blocks.3.txt_attn.qkv": (36, 12),
            "double_blocks.18.img_mod.lin": (72, 12),
            "single_blocks.37.linear2": (12, 60),
            "single_blocks.0.modulation.lin": (36, 12),
        },
        kohyas,
        DOWN_UP,
        2.0,
    ),
    "flux2 of kohya": (
        "Flux2KleinPipeline",
        {
            "double_blocks.0.img_attn.qkv": (36, 12),
            "double_blocks.4.txt_mlp.2": (12, 36),
            "single_blocks.11.linear1": (108, 12),
            "time_in.in_layer": (12, 4),
        },
        kohyas,
        DOWN_UP,
        2.0,
    ),
    "zimage of kohya": (
        "ZImagePipeline",
        {
            "layers.3.attention.to_q": (8, 12),
            "layers.3.attention.to_out.0": (12, 8),
            "noise_refiner.1.adaLN_modulation.0": (48, 12),
            "context_refiner.0.feed_forward.w1": (5, 12),
        },
        kohyas,
        DOWN_UP,
        2.0,
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_it_is_what_diffusers_makes_of_the_file(name: str, tmp_path: Path) -> None:
    kind, layers, spelled, (a, b), alpha = CONVERTED[name]
    state: dict[str, Tensor] = {}
    for number, (layer, shape) in enumerate(layers.items()):
        down, up = pair(shape, 4, number)
        state[f"{spelled(layer)}.{a}.weight"] = down
        state[f"{spelled(layer)}.{b}.weight"] = up
        if alpha is not None:
            state[f"{spelled(layer)}.alpha"] = torch.tensor(alpha)
    given, made = tmp_path / "given.safetensors", tmp_path / "made.safetensors"
    save_file(state, given)
    theirs = getattr(diffusers, kind).lora_state_dict(given)
    # Without the prefix where the names were diffusers' already.
    save_file({n: v.clone() for n, v in theirs.items()}, made)
    ours, expected = files.read(given).layers, files.read(made).layers
    assert ours.keys() == expected.keys()
    for layer, factors in ours.items():
        torch.testing.assert_close(factors.delta(), expected[layer].delta(), rtol=1e-6, atol=1e-8)


# --- What is refused, and what is left out ---


def of(name: str, *shape: int) -> dict[str, Tensor]:
    down, up = pair(shape, 2, 1)
    return {
        f"diffusion_model.{name}.lora_A.weight": down,
        f"diffusion_model.{name}.lora_B.weight": up,
    }


def of_kohya(name: str, *shape: int) -> dict[str, Tensor]:
    down, up = pair(shape, 2, 1)
    return {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}


QKV = of("double_blocks.0.img_attn.qkv", 24, 8)
Z = of("layers.0.attention.qkv", 24, 8)
K_QKV = of_kohya("double_blocks_0_img_attn_qkv", 24, 8)
K_Z = of_kohya("layers_0_attention_qkv", 24, 8)
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a layer of nobody": (
        QKV | of("double_blocks.0.img_attn.to_q", 8, 8),
        r"unexpected layer diffusion_model\.double_blocks\.0\.img_attn\.to_q of shape \(8, 8\), "
        r"which is no layer of FLUX\.1 or FLUX\.2",
    ),
    "three that are not as wide as their input": (
        of("double_blocks.0.img_attn.qkv", 24, 9),
        r"double_blocks\.0\.img_attn\.qkv of shape \(24, 9\), which is no layer of FLUX",
    ),
    "three that do not divide": (
        of("layers.0.attention.qkv", 25, 8),
        r"layers\.0\.attention\.qkv of shape \(25, 8\), which is no layer of Z-Image",
    ),
    "three with fewer keys than queries": (
        of("layers.0.attention.qkv", 16, 8),
        r"\(16, 8\), which is no layer of Z-Image",
    ),
    "three as a convolution": (
        of("joint_blocks.0.x_block.attn.qkv", 24, 8, 1, 1),
        r"\(24, 8, 1, 1\), which is no layer of Stable Diffusion 3",
    ),
    "a modulation of another width": (
        of("joint_blocks.2.context_block.adaLN_modulation.1", 24, 8),
        r"context_block\.adaLN_modulation\.1 of shape \(24, 8\), which is no layer",
    ),
    "no number": (of("double_blocks.img_attn.qkv", 24, 8), r"unexpected layer .*img_attn\.qkv of"),
    "a number of words": (Z | of("layers.x.attention.qkv", 24, 8), "unexpected layer .*layers.x"),
    "braces": (Z | of("layers.0.attention.{}", 8, 8), r"unexpected layer .*attention\.\{\}"),
    "another network's": (Z | of("img_in", 8, 8), r"unexpected layer diffusion_model\.img_in of"),
    "diffusers' names beside others": (
        of("transformer_blocks.0.attn.to_q", 8, 8) | of("vector_in.in_layer", 8, 8),
        r"vector_in\.in_layer of shape \(8, 8\), which is no layer of a transformer in diffusers",
    ),
    "the same twice": (
        Z | of("layers.0.attention.to_k", 8, 8),
        r"two layers for layers\.0\.attention\.to_k: diffusion_model\.layers\.0\.attention\.qkv "
        r"and diffusion_model\.layers\.0\.attention\.to_k",
    ),
    "two networks": (QKV | Z, r"of several networks \(diffusion_model\.double_blocks"),
    "two of one name": (
        of("double_blocks.0.img_mlp.0", 32, 8) | of("double_blocks.0.txt_mlp.0", 48, 8),
        r"diffusion_model\.double_blocks\.0\.img_mlp\.0 is of FLUX\.1, "
        r"diffusion_model\.double_blocks\.0\.txt_mlp\.0 of FLUX\.2",
    ),
    "either of two": (
        QKV | of("time_in.in_layer", 8, 4),
        r"nothing shows whether it is of FLUX\.1 or of FLUX\.2",
    ),
    "no block": (
        of("final_layer.linear", 8, 8),
        r"of a network that is not known here \(diffusion_model\.final_layer\.linear\)",
    ),
    "a network that is not known": (of("stages.0.self_attn.q", 8, 8), "not known here"),
    # Wan's, whose blocks have the name of Krea 2's.
    "a network with another's blocks": (
        of("blocks.0.self_attn.q", 8, 8),
        r"unexpected layer diffusion_model\.blocks\.0\.self_attn\.q of .* no layer of Krea 2",
    ),
    "one factor alone": (
        QKV | {"diffusion_model.img_in.lora_A.weight": torch.ones(2, 4)},
        r"unexpected tensor diffusion_model\.img_in\.lora_A\.weight, which stands alone",
    ),
    "a tensor that is no factor": (
        QKV | {"diffusion_model.img_in.bias": torch.ones(4)},
        r"unexpected tensor diffusion_model\.img_in\.bias",
    ),
    "other names beside them": (
        Z | {n.replace("diffusion_model", "transformer"): v for n, v in of("x", 8, 8).items()},
        r"unexpected tensor transformer\.x\.lora_A\.weight beside ComfyUI's names",
    ),
    "kohya's DoRA": (
        QKV | {"diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(24, 1)},
        r"is a DoRA in kohya's format",
    ),
    "a layer of nobody in kohya's": (
        K_QKV | of_kohya("double_blocks_0_img_attn_q", 8, 8),
        r"unexpected layer lora_unet_double_blocks_0_img_attn_q of shape \(8, 8\), which is no "
        r"layer of FLUX\.1 or FLUX\.2",
    ),
    "three that are not as wide as their input in kohya's": (
        of_kohya("joint_blocks_0_x_block_attn_qkv", 24, 9),
        r"lora_unet_joint_blocks_0_x_block_attn_qkv of shape \(24, 9\), which is no layer of Sta",
    ),
    "no number in kohya's": (
        K_QKV | of_kohya("double_blocks_img_attn_qkv", 24, 8),
        "unexpected layer lora_unet_double_blocks_img_attn_qkv of",
    ),
    "another network's in kohya's": (
        K_Z | of_kohya("img_in", 8, 8),
        "unexpected layer lora_unet_img_in of",
    ),
    "the same twice in kohya's": (
        K_Z | of_kohya("layers_0_attention_to_k", 8, 8),
        r"two layers for layers\.0\.attention\.to_k: lora_unet_layers_0_attention_qkv and "
        "lora_unet_layers_0_attention_to_k",
    ),
    "two networks in kohya's": (
        K_QKV | K_Z,
        r"have kohya's names, of several networks \(lora_unet_double_blocks_0_img_attn_qkv, ",
    ),
    "two of one name in kohya's": (
        of_kohya("double_blocks_0_img_mlp_0", 32, 8) | of_kohya("double_blocks_0_txt_mlp_0", 48, 8),
        r"lora_unet_double_blocks_0_img_mlp_0 is of FLUX\.1, "
        r"lora_unet_double_blocks_0_txt_mlp_0 of FLUX\.2",
    ),
    "either of two in kohya's": (
        K_QKV | of_kohya("time_in_in_layer", 8, 4),
        r"have kohya's names, and nothing shows whether it is of FLUX\.1 or of FLUX\.2",
    ),
    # There the dots of diffusers' names would have to be guessed.
    "diffusers' names in kohya's": (
        of_kohya("transformer_blocks_0_attn_to_q", 8, 8),
        r"of a network that is not known here \(lora_unet_transformer_blocks_0_attn_to_q\)",
    ),
    "dots in kohya's": (
        K_QKV | of_kohya("double_blocks.1.img_attn.qkv", 24, 8),
        r"unexpected tensor lora_unet_double_blocks\.1\.img_attn\.qkv\.lora_down\.weight",
    ),
    "nothing in kohya's": (
        K_QKV | of_kohya("", 8, 8),
        r"unexpected layer lora_unet_ of shape \(8, 8\), which is no layer of FLUX",
    ),
    "a UNet's beside kohya's": (
        K_QKV | of_kohya("up_blocks_0_resnets_0_conv1", 8, 8),
        r"unexpected tensor lora_unet_double_blocks_0_img_attn_qkv\.lora_down\.weight beside "
        r"lora_unet_up_blocks_0_resnets_0_conv1\.lora_down\.weight, which is a UNet's",
    ),
    "ComfyUI's beside kohya's": (
        K_Z | of("layers.1.attention.qkv", 24, 8),
        r"unexpected tensor lora_unet_layers_0_attention_qkv\.lora_down\.weight beside ComfyUI's "
        r"names \(diffusion_model\.\.\.\.\)",
    ),
    "diffusers' beside kohya's": (
        K_Z | {f"transformer.x.{n}.weight": torch.ones(2, 2) for n in ("lora_A", "lora_B")},
        r"unexpected tensor transformer\.x\.lora_A\.weight beside kohya's names \(lora_unet_\.",
    ),
    "parts of which each has its own factors": (
        {
            f"lora_unet_double_blocks_0_img_attn_qkv.{half}.{part}.weight": torch.ones(shape)
            for part in range(3)
            for half, shape in {"lora_down": (2, 8), "lora_up": (8, 2)}.items()
        },
        r"has two tensors for layer double_blocks_0_img_attn_qkv: .*\.lora_down\.0\.weight and ",
    ),
    "kohya's DoRA in kohya's": (
        K_QKV | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(24, 1)},
        r"is a DoRA in kohya's format",
    ),
    "a LoKr in kohya's": (
        {f"lora_unet_double_blocks_0_img_attn_qkv.lokr_w{n}": torch.ones(2, 2) for n in (1, 2)},
        "is a LoKr",
    ),
    "differences": (
        QKV | {"diffusion_model.double_blocks.0.img_attn.qkv.diff_b": torch.ones(24)},
        "is a file of whole weight differences",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_for_certain_is_refused(name: str, tmp_path: Path) -> None:
    state, words = REFUSED[name]
    file = tmp_path / "a.safetensors"
    save_file(state, file)
    with pytest.raises(AlignPropError, match=words) as raised:
        files.read(file)
    assert type(raised.value) is (ConfigError if "\nis a" in f"\n{words}" else AssetError)
    assert raised.value.message.startswith(f"{file}: ")
    assert "\n" not in raised.value.message


def test_a_configuration_with_patterns_of_other_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    plain = '{"transformer.r": 2, "transformer.lora_alpha": 6}'
    save_file(Z, file, metadata={"lora_adapter_metadata": plain})
    assert {factors.scaling for factors in files.read(file).layers.values()} == {3.0}
    patterned = plain.replace("}", ', "transformer.alpha_pattern": {"to_q": 4}}')
    save_file(Z, file, metadata={"lora_adapter_metadata": patterned})
    with pytest.raises(AssetError, match="alpha_pattern of its configuration cannot be read"):
        files.read(file)
    save_file(K_Z, file, metadata={"lora_adapter_metadata": patterned})
    with pytest.raises(AssetError, match="have kohya's names, for which alpha_pattern of its"):
        files.read(file)
    # Of names that stay as they are, it means what it says.
    same = of("layers.0.attention.to_q", 8, 8) | of("layers.0.attention.to_k", 8, 8)
    save_file(same, file, metadata={"lora_adapter_metadata": patterned})
    found = files.read(file).layers
    alphas = {re.sub(r".*\.", "", name): factors.alpha for name, factors in found.items()}
    assert alphas == {"to_q": 4.0, "to_k": 6.0}


@pytest.mark.parametrize(
    ("state", "texts"),
    [
        (QKV, ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"]),
        (
            K_QKV,
            [
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            ],
        ),
    ],
    ids=["ComfyUI's", "kohya's"],
)
def test_layers_of_text_encoders_are_left_out_and_counted(
    state: dict[str, Tensor], texts: list[str], tmp_path: Path
) -> None:
    state = dict(state)
    for text in texts:
        state |= {
            f"{text}.lora_down.weight": torch.ones(2, 4),
            f"{text}.lora_up.weight": torch.ones(4, 2),
            f"{text}.alpha": torch.tensor(1.0),
        }
    save_file(state, tmp_path / "a.safetensors")
    found = files.read(tmp_path / "a.safetensors")
    assert found.prefix == "transformer."
    assert found.left_out == len(texts)
    assert len(found.layers) == 3


def test_names_differ_without_their_dots_too() -> None:
    tables = [table for networks in original._NETWORKS.values() for table in networks.values()]
    every = {name for table in tables for name in table}
    blocks = {name for name, networks in original._NETWORKS.items() if networks}
    whole: set[str] = set()
    for name in every:
        first, _, rest = name.partition(".")
        if first in blocks:
            whole |= {f"{first}.{number}.{rest}" for number in (0, 1, 2, 10, 21, 102)}
        else:
            whole.add(name)
    assert len(whole) > 300
    assert len({name.replace(".", "_") for name in whole}) == len(whole)
    for name in whole:
        flat = name.replace(".", "_")
        assert original._dotted(flat) == name
        # Nor is one the name of a layer of a UNet.
        assert names.layer_of(f"lora_unet_{flat}") == flat
        assert names.network_of([f"lora_unet_{flat}.lora_down.weight"]) == "transformer."


# --- In the sizes of what is published ---

KINDS = {
    "FluxTransformer2DModel": original._FLUX1,
    "Flux2Transformer2DModel": original._FLUX2,
    "SD3Transformer2DModel": original._SD3,
    "ZImageTransformer2DModel": original._ZIMAGE,
    "Krea2Transformer2DModel": original._KREA2,
}
# Some have the same configuration. The original code of Qwen-Image has diffusers' names.
CONFIGS = {
    file.read_text(): file.parts[-3]
    for file in sorted(ARCHITECTURES.glob("*/transformer/config.json"), reverse=True)
    if file.parts[-3] != "qwen-image"
}


@pytest.mark.parametrize("text", CONFIGS, ids=CONFIGS.values())
def test_every_layer_of_a_published_network_has_a_place_of_its_shape(text: str) -> None:
    config = json.loads(text)
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    shapes = {n: m.weight.shape for n, m in network.named_modules() if isinstance(m, kinds)}
    placed: set[str] = set()
    for place in KINDS[config["_class_name"]].values():
        for number in range(60):
            names = [name.format(number) for name in place.names]
            if shapes.keys() >= set(names):
                rows = sum(shapes[name][0] for name in names)
                _, *inputs = shapes[names[0]]
                ones = [1] * (len(inputs) - 1)
                factors = Factors(torch.empty(1, *inputs), torch.empty(rows, 1, *ones), 1.0)
                assert place.fits(factors), names
                placed.update(names)
    assert placed == shapes.keys()
