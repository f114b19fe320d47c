"""The law of LoRA files: each is read exactly as its formula says, or refused with what it is."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import alignprop_cli
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError, RunError
from alignprop_cli.lora import files, formats, names
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.factors import Factors
from alignprop_cli.lora.files import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from tests.factories import TEXT_WIDTH, randn, small_pipeline
from tests.lora.written import (
    Lora,
    diffusers_ab,
    diffusers_alpha,
    diffusers_both,
    diffusers_down,
    diffusers_name,
    diffusers_plain,
    diffusers_processor,
    diffusers_rslora,
    header,
    kohya,
    kohya_alpha,
    kohya_plain,
    one,
    ours,
    over_rank,
    over_root,
    peft,
    peft_folder,
    peft_rslora,
)

PACKAGE = Path(alignprop_cli.__file__).parent

# Every kind of layer that a LoRA of a UNet can have, of different ranks and alphas.
ATTENTION = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (2, 3.0),
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0": (4, 1.0),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 1.0),
}
LAYERS = ATTENTION | {
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (3, 0.5),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": (4, 8.0),
    "down_blocks.0.downsamplers.0.conv": (2, 2.0),
    "down_blocks.0.resnets.0.conv1": (4, 1.0),
    "down_blocks.0.resnets.0.time_emb_proj": (1, 1.0),
    "mid_block.attentions.0.proj_in": (5, 2.5),
    "up_blocks.0.resnets.0.conv_shortcut": (2, 4.0),
    "conv_in": (2, 1.0),
    "time_embedding.linear_1": (3, 6.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def base(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)


@torch.no_grad()
def run(network: torch.nn.Module) -> Tensor:
    latents = randn(1, 2, 4, 8, 8, dtype=torch.float32)
    return network(latents, 10, randn(2, 2, 5, TEXT_WIDTH, dtype=torch.float32)).sample


# Format, its layers, its scaling, and whether plain diffusers reads it rightly: it refuses `.alpha`
# beside its own names, does not load PEFT's files, and loses alphas of kohya's attention layers.
FORMATS = [
    (diffusers_down, LAYERS, over_rank, True),
    (diffusers_ab, LAYERS, over_rank, True),
    (diffusers_plain, LAYERS, one, True),
    (diffusers_alpha, LAYERS, over_rank, False),
    (diffusers_both, LAYERS, over_rank, False),
    (diffusers_rslora, LAYERS, over_root, True),
    (diffusers_name, LAYERS, one, True),
    (diffusers_processor, ATTENTION, one, True),
    (peft_folder, LAYERS, over_rank, False),
    (peft_rslora, LAYERS, over_root, False),
    (kohya_plain, LAYERS, one, True),
    (kohya_alpha, LAYERS, over_rank, False),
    (ours, LAYERS, over_rank, True),
]


@pytest.mark.parametrize(
    ("write", "layers", "scaling", "oracle"), FORMATS, ids=[row[0].__name__ for row in FORMATS]
)
def test_every_format_is_read_as_its_formula_says(
    base: UNet2DConditionModel, folder: Path, tmp_path: Path, write, layers, scaling, oracle
) -> None:
    made = Lora(base, layers)
    file, deltas = write(made, tmp_path), made.deltas(scaling)

    adapter = files.read(file)
    assert adapter.layers.keys() == deltas.keys()
    assert adapter.left_out == 0
    for name, factors in adapter.layers.items():
        torch.testing.assert_close(factors.delta(), deltas[name], rtol=1e-6, atol=1e-6)

    # Loaded it is the same as added to the weights by hand.
    before = run(base)
    by_hand, loaded = copy.deepcopy(base), copy.deepcopy(base)
    for name, delta in deltas.items():
        by_hand.get_submodule(name).weight.data += delta.float()
    lora.load(loaded, adapter, "small")
    expected = run(by_hand)
    effect = float((expected - before).norm())
    assert effect > 1e-2 * float(before.norm())
    assert float((run(loaded) - expected).norm()) < 1e-4 * effect

    if oracle:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(file)
        assert float((run(pipeline.unet) - expected).norm()) < 1e-4 * effect


def test_a_pattern_of_peft_matches_the_end_of_names(
    base: UNet2DConditionModel, tmp_path: Path
) -> None:
    made = Lora(base, dict.fromkeys(ATTENTION, (4, 2.0)))
    patterns = {"attn2.to_(k|v)": 6, r"^down_blocks\..*to_q": 8, "to_out": 99}
    read = files.read(diffusers_ab(made, tmp_path, lora_alpha=2, alpha_pattern=patterns)).layers
    assert [factors.alpha for _, factors in sorted(read.items())] == [8.0, 6.0, 2.0]


def test_a_layer_whose_name_ends_as_another_keeps_its_own_alpha(tmp_path: Path) -> None:
    def layer(seed: int, rank: int, alpha: float) -> Factors:
        return Factors(randn(seed, rank, 4), randn(seed, 6, rank), alpha)

    layers = {"a.x": layer(1, 2, 4.0), "b.a.x": layer(2, 3, 1.0), "c": layer(3, 5, 2.0)}
    layers |= {name: layer(4, 5, 2.0) for name in ("d", "e")}
    weights, settings = formats.packed(layers)
    file = files.save(tmp_path, weights, {}, prefix="unet.", adapter_metadata=settings)
    read = files.read(file).layers
    assert {n: f.alpha for n, f in read.items()} == {n: f.alpha for n, f in layers.items()}


SHIPPED = PACKAGE / "models" / "architectures"
ARCHITECTURES = sorted(file.parent.parent.name for file in SHIPPED.glob("*/unet/config.json"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kohyas_names_are_those_of_the_layers_with_other_dots(architecture: str) -> None:
    config = SHIPPED / architecture / "unet" / "config.json"
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(json.loads(config.read_text()))
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert len(names) > 200
    pair = (torch.ones(2, 3), torch.ones(4, 2))
    state = {}
    for name in names:
        parts = (f"{kohya(name)}.lora_down.weight", f"{kohya(name)}.lora_up.weight")
        state |= dict(zip(parts, pair, strict=True))
    layers, _ = formats.read_layers(state, {}, Path("kohya.safetensors"))
    assert sorted(layers) == sorted(names)


def original_names() -> dict[str, str]:
    """Return the layers of Stable Diffusion XL by kohya's names, from how the network is built.

    The original code numbers everything through: conv_in, then two layers and a downsampler a
    level; three layers a level on the way up, the last of them with an upsampler.
    """
    resnet = {
        "in_layers_2": "conv1",
        "emb_layers_1": "time_emb_proj",
        "out_layers_3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    attention = [("proj_in", "proj_in"), ("proj_out", "proj_out")]
    for block in range(10):
        inner = f"transformer_blocks_{block}_"
        for name in (
            *(f"attn{n}_to_{kind}" for n in (1, 2) for kind in ("q", "k", "v", "out_0")),
            *("ff_net_0_proj", "ff_net_2"),
        ):
            dotted = name.replace("attn1_", "attn1.").replace("attn2_", "attn2.")
            dotted = dotted.replace("to_out_0", "to_out.0").replace(
                "ff_net_0_proj", "ff.net.0.proj"
            )
            dotted = dotted.replace("ff_net_2", "ff.net.2")
            attention.append((inner + name, f"transformer_blocks.{block}.{dotted}"))
    found = {
        "time_embed_0": "time_embedding.linear_1",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    }
    places = {f"middle_block_{2 * n}": f"mid_block.resnets.{n}" for n in (0, 1)}
    attentions = {"middle_block_1": "mid_block.attentions.0"}
    for number, (level, place) in {
        1: (0, 0),
        2: (0, 1),
        4: (1, 0),
        5: (1, 1),
        7: (2, 0),
        8: (2, 1),
    }.items():
        places[f"input_blocks_{number}_0"] = f"down_blocks.{level}.resnets.{place}"
        attentions[f"input_blocks_{number}_1"] = f"down_blocks.{level}.attentions.{place}"
    for number in range(9):
        level, place = number // 3, number % 3
        places[f"output_blocks_{number}_0"] = f"up_blocks.{level}.resnets.{place}"
        attentions[f"output_blocks_{number}_1"] = f"up_blocks.{level}.attentions.{place}"
    for old, new in places.items():
        found |= {f"{old}_{kind}": f"{new}.{name}" for kind, name in resnet.items()}
    for old, new in attentions.items():
        found |= {f"{old}_{kind}": f"{new}.{name}" for kind, name in attention}
    return found


def test_kohyas_names_of_stable_diffusion_xl_are_those_of_the_original_code() -> None:
    config = PACKAGE / "models" / "architectures" / "sdxl" / "unet" / "config.json"
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(json.loads(config.read_text()))
    layers = {
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    # Of all names that there could be, those whose layer there is: each layer has one.
    names = {old: new for old, new in original_names().items() if new in layers}
    assert sorted(names.values()) == sorted(layers)
    state = {}
    for old in names:
        state[f"lora_unet_{old}.lora_down.weight"] = torch.ones(2, 3)
        state[f"lora_unet_{old}.lora_up.weight"] = torch.ones(4, 2)
    found, _ = formats.read_layers(state, {}, Path("kohya.safetensors"))
    assert sorted(found) == sorted(layers)
    # And those of each one: a rank by which it is known.
    for rank, (old, new) in enumerate(sorted(names.items())[:40], start=1):
        down, up = torch.ones(rank, 3), torch.ones(4, rank)
        one = {f"lora_unet_{old}.lora_down.weight": down, f"lora_unet_{old}.lora_up.weight": up}
        (layer,) = formats.read_layers(one, {}, Path("kohya.safetensors"))[0]
        assert layer == new


@pytest.mark.parametrize("prefix", ["unet.", "transformer."])
def test_a_file_for_comfyui_is_read_back_with_its_scaling(tmp_path: Path, prefix: str) -> None:
    def draw(*shape: int) -> Tensor:
        return randn(len(shape) + shape[0], *shape, dtype=torch.float32)

    layers = {
        "mid_block.attentions.0.proj_in": Factors(draw(2, 3), draw(4, 2), 6.0),
        # rsLoRA: alpha / sqrt(rank) is written as an alpha whose quotient by the rank is the same.
        "conv_in": Factors(draw(4, 3, 1, 1), draw(5, 4, 1, 1), 3.0, True),
    }
    state = formats.for_comfyui(layers, prefix)
    names = {
        "unet.": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "transformer.": "transformer.mid_block.attentions.0.proj_in.lora_A.weight",
    }
    assert names[prefix] in state
    # Only a U-Net's have alpha; diffusers refuses those of a transformer with it.
    alphas = [name for name in state if name.endswith(".alpha")]
    assert (len(state), len(alphas)) == ((6, 2) if prefix == "unet." else (4, 0))
    file = files.save_for_comfyui(
        tmp_path / files.LORA_FILE, layers, {"note": "x"}, prefix=prefix, title="t"
    )
    found = files.read(file)
    assert found.header["note"] == "x"
    for name, factors in layers.items():
        torch.testing.assert_close(found.layers[name].delta(), factors.delta())
        # The factors themselves; B with the scaling in it where there is no alpha.
        scaling = 1.0 if prefix == "unet." else factors.scaling
        assert torch.equal(found.layers[name].down, factors.down)
        assert torch.equal(found.layers[name].up, scaling * factors.up)
    expected = [6.0, 6.0] if prefix == "unet." else [2.0, 4.0]
    assert [found.layers[n].alpha for n in layers] == expected


def test_the_scaling_of_every_layer_is_multiplied_into_b_for_transformers(tmp_path: Path) -> None:
    up = torch.arange(8.0).reshape(4, 2)
    layers = {
        "transformer_blocks.0.attn.to_q": Factors(torch.ones(2, 3), up, 3.0),
        "transformer_blocks.0.attn.to_k": Factors(torch.ones(2, 3), up.clone(), 2.0),
        "transformer_blocks.1.attn.to_q": Factors(torch.ones(4, 3), torch.ones(4, 4), 1.0),
    }
    weights, metadata = formats.packed(layers)
    written, settings = files.as_written(weights, metadata, "transformer.")
    assert {n for n in weights if written[n] is not weights[n]} == {
        "transformer_blocks.0.attn.to_q.lora.up.weight",
        "transformer_blocks.1.attn.to_q.lora.up.weight",
    }
    options = {"prefix": "transformer.", "adapter_metadata": metadata}
    found = files.read(files.save(tmp_path, weights, {}, **options)).layers
    for name, factors in layers.items():
        assert found[name].scaling == 1.0
        torch.testing.assert_close(found[name].delta(), factors.delta())
    assert settings["lora_alpha"] == settings["r"]
    stabilised, _ = files.as_written(weights, {**metadata, "use_rslora": True}, "transformer.")
    name = "transformer_blocks.0.attn.to_q.lora.up.weight"
    torch.testing.assert_close(stabilised[name], 3.0 / 2.0**0.5 * up)
    # Those of a U-Net are written with the alpha that they have.
    assert files.as_written(weights, metadata, "unet.") == (weights, metadata)


X = "unet.x.to_q"
PAIR = {f"{X}.lora.down.weight": torch.ones(2, 4), f"{X}.lora.up.weight": torch.ones(6, 2)}
HALVES = (("A", "down"), ("B", "up"))
K = "lora_unet_mid_block_attentions_0_proj_in"
KOHYA = {f"{K}.lora_down.weight": torch.ones(2, 4), f"{K}.lora_up.weight": torch.ones(6, 2)}
NAN = torch.tensor(float("nan"))


def changed(part: str, value: Tensor) -> dict[str, Tensor]:
    return PAIR | {f"{X}.lora.{part}.weight": value}


def tall(value: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((2, 4), value, dtype=torch.float64).to(dtype)


REFUSED: dict[str, tuple[dict[str, Tensor], type[AlignPropError], str]] = {
    # Other kinds of adapters, by their tensors.
    "dora of kohya": (KOHYA | {f"{K}.dora_scale": torch.ones(6, 1)}, ConfigError, "is a DoRA in"),
    "dora of another shape": (
        PAIR | {f"{X}.lora_magnitude_vector": torch.ones(4)},
        AssetError,
        r"lora_magnitude_vector of layer x\.to_q is \(4,\), expected \(6,\)",
    ),
    "dora twice": (
        PAIR
        | {f"{X}.lora_magnitude_vector": torch.ones(6)}
        | {f"{X}.lora_magnitude_vector.weight": torch.ones(6)},
        AssetError,
        "has two tensors for layer",
    ),
    "dora in part": (
        PAIR
        | {name.replace("to_q", "to_k"): value for name, value in PAIR.items()}
        | {f"{X}.lora_magnitude_vector": torch.ones(6)},
        AssetError,
        "is a DoRA in some of its layers and a LoRA in others",
    ),
    "magnitudes alone": (
        PAIR | {"unet.x.to_v.lora_magnitude_vector": torch.ones(6)},
        AssetError,
        "which stands alone",
    ),
    "infinite magnitudes": (
        PAIR | {f"{X}.lora_magnitude_vector": torch.full((6,), torch.inf)},
        RunError,
        "NaN or infinity",
    ),
    "loha": (
        {f"{K}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        ConfigError,
        "is a LoHa",
    ),
    "lokr": (
        {f"{K}.lokr_w1": torch.ones(2, 2), f"{K}.lokr_w2": torch.ones(3, 2)},
        ConfigError,
        "is a LoKr",
    ),
    "locon mid": (
        KOHYA | {f"{K}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        ConfigError,
        "Tucker factor",
    ),
    "oft": ({f"{K}.oft_blocks": torch.ones(2, 2, 2)}, ConfigError, "is an OFT"),
    "ia3": ({f"{K}.weight": torch.ones(4), f"{K}.on_input": NAN}, ConfigError, r"is an \(IA\)3"),
    "differences": ({f"{K}.diff": torch.ones(6, 4)}, ConfigError, "whole weight differences"),
    "embedding": ({f"{X}.lora_embedding_A": torch.ones(2, 4)}, ConfigError, "of embeddings"),
    # Names that no rule reads.
    "other weights": ({"conv_in.weight": torch.ones(4)}, AssetError, "holds no LoRA weights"),
    "nothing": ({}, AssetError, "holds no LoRA weights"),
    "bias": (PAIR | {f"{X}.bias": torch.ones(6)}, AssetError, r"unexpected tensor .*to_q\.bias"),
    "a bias of a factor": (
        PAIR | {f"{X}.lora_B.bias": torch.ones(6)},
        AssetError,
        "unexpected tensor",
    ),
    "another part": (
        {n.replace("unet.", "vae."): v for n, v in PAIR.items()},
        AssetError,
        r"unexpected tensor vae\.x",
    ),
    "no prefix": ({n[5:]: v for n, v in PAIR.items()}, AssetError, r"unexpected tensor x\.to_q"),
    "comfyui": (
        {n.replace("unet.", "diffusion_model."): v for n, v in PAIR.items()},
        AssetError,
        r"have ComfyUI's names, of a network that is not known here \(diffusion_model\.x\.to_q\)",
    ),
    "names of sdxl": (
        {n.replace("mid_block", "middle_block"): v for n, v in KOHYA.items()},
        AssetError,
        r"have kohya's names, of a network that is not known here \(lora_unet_middle_block_att",
    ),
    "words of nobody": (
        {n.replace("proj_in", "proj-in"): v for n, v in KOHYA.items()},
        AssetError,
        r"of a network that is not known here \(lora_unet_mid_block_attentions_0_proj-in\)",
    ),
    "alone": (
        PAIR | {"unet.x.to_v.lora.down.weight": torch.ones(2, 4)},
        AssetError,
        r"unexpected tensor unet\.x\.to_v.* alone",
    ),
    "an alpha alone": (PAIR | {"unet.y.alpha": torch.tensor(1.0)}, AssetError, "alone"),
    "a layer twice": (
        PAIR | {f"{X}.lora_A.weight": torch.ones(2, 4), f"{X}.lora_B.weight": torch.ones(6, 2)},
        AssetError,
        r"two tensors for layer x\.to_q",
    ),
    "two adapters": (
        PAIR | {f"unet.y.lora_{n}.b.weight": PAIR[f"{X}.lora.{m}.weight"] for n, m in HALVES},
        AssetError,
        "several adapters",
    ),
    # Tensors that are no factors.
    "0-d": (changed("down", torch.tensor(1.0)), AssetError, "share no rank"),
    "both 0-d": (
        dict.fromkeys(PAIR, torch.tensor(1.0)),
        AssetError,
        r"to_q: shapes \(\) and \(\) share no rank",
    ),
    "rank 0": (
        {f"{X}.lora.down.weight": torch.ones(0, 4), f"{X}.lora.up.weight": torch.ones(6, 0)},
        AssetError,
        "share no rank",
    ),
    "other ranks": (changed("up", torch.ones(6, 3)), AssetError, r"\(2, 4\) and \(6, 3\) share"),
    "a kernel in up": (
        {
            f"{X}.lora.down.weight": torch.ones(2, 4, 1, 1),
            f"{X}.lora.up.weight": torch.ones(6, 2, 3, 3),
        },
        AssetError,
        "share no rank",
    ),
    "float8": (
        changed("down", tall(dtype=torch.float8_e4m3fn)),
        AssetError,
        r"down\.weight is float8_e4m3fn; expected a float of 16 to 64 bits",
    ),
    "int8": (changed("up", torch.ones(6, 2, dtype=torch.int8)), AssetError, "is int8"),
    "nan": (changed("down", tall(float("nan"))), RunError, r"layer x\.to_q holds NaN"),
    "infinity": (changed("down", tall(float("inf"))), RunError, r"layer x\.to_q holds NaN or inf"),
    "alpha of three": (
        PAIR | {f"{X}.alpha": torch.ones(3)},
        AssetError,
        r"alpha of layer x\.to_q cannot be read: expected one number",
    ),
    "alpha 2 x 2": (
        KOHYA | {f"{K}.alpha": torch.ones(2, 2)},
        AssetError,
        r"alpha of layer mid_block\.attentions\.0\.proj_in cannot be read",
    ),
    "alpha in float8": (
        PAIR | {f"{X}.alpha": torch.tensor(1.0).to(torch.float8_e4m3fn)},
        AssetError,
        "expected one number, got torch.float8",
    ),
    "a number that float32 has not": (
        changed("down", tall(1e300, torch.float64)),
        RunError,
        "holds NaN or infinity",
    ),
    "a long name": (
        PAIR | {f"unet.{'x.' * 5000}bias": torch.ones(2)},
        AssetError,
        r"unexpected tensor unet(\.x)+\.*$",
    ),
    "a long layer": (
        {n.replace("x.", "x" * 300 + "."): v for n, v in PAIR.items()},
        AssetError,
        r"unexpected tensor unet\.x{95}\.\.\.$",
    ),
    "alpha nan": (PAIR | {f"{X}.alpha": NAN}, RunError, "holds NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_or_less_than_a_lora_is_refused(tmp_path: Path, case: str) -> None:
    state, kind, words = REFUSED[case]
    file = tmp_path / LORA_FILE
    save_file({name: value.clone() for name, value in state.items()}, file)
    with pytest.raises(kind, match=words) as raised:
        files.read(file)
    assert type(raised.value) is kind
    assert "\n" not in raised.value.message
    assert str(file) in raised.value.message


SETTINGS: dict[str, tuple[str, type[AlignPropError], str]] = {
    "dora": ('{"unet.use_dora": true}', AssetError, r"has no lora_magnitude_vector, and use_dora"),
    "bias": ('{"unet.lora_bias": true}', ConfigError, "is a LoRA with biases"),
    "loha": ('{"peft_type": "LOHA"}', ConfigError, "is a LOHA"),
    "repeated": ('{"layer_replication": [[0, 4]]}', ConfigError, "repeated layers"),
    "parameters": ('{"target_parameters": ["w"]}', ConfigError, "of parameters"),
    "pissa": (
        '{"init_lora_weights": "pissa_niter_4"}',
        ConfigError,
        "pissa_niter_4 changes the base model's weights",
    ),
    "a number": ("5", AssetError, "expected an object, got 5"),
    "a list": ("[]", AssetError, "expected an object"),
    "no json": ("{", AssetError, "not JSON"),
    "deep": ("[" * 100_000, AssetError, "nested too deeply"),
    "deep objects": ('{"a":' * 200 + "1" + "}" * 200, AssetError, "nested too deeply"),
    "surrogate": ('{"r": "\\ud800"}', AssetError, "half of a surrogate pair"),
    "twice": ('{"r": 2, "r": 4, "lora_alpha": 2}', AssetError, "given twice"),
    "twice by prefix": ('{"r": 2, "unet.r": 2}', AssetError, "given twice"),
    "unknown": ('{"unet.nosuch": 1}', AssetError, "unknown option nosuch"),
    "unknown long": (json.dumps({"x" * 5000: 1}), AssetError, r"unknown option x{100}\.\.\.,"),
    "biases": ('{"bias": "all"}', ConfigError, "a LoRA with biases"),
    "whole layers": ('{"modules_to_save": ["conv_in"]}', ConfigError, "whole layers beside it"),
    "corda": (
        '{"init_lora_weights": "corda", "corda_config": {"x": 1}}',
        ConfigError,
        "corda changes the base model's weights",
    ),
    "endless pattern": (
        '{"lora_alpha": 2, "alpha_pattern": {"(.*.*)*x": 1}}',
        AssetError,
        "too complex",
    ),
    "targets": ('{"target_modules": 5}', AssetError, "names or a regular expression, got 5"),
    "target names": ('{"target_modules": [5]}', AssetError, "names or a regular expression"),
    "target pattern": ('{"target_modules": "("}', AssetError, "names or a regular expression"),
    "alpha text": ('{"lora_alpha": "many"}', AssetError, r"alpha of layer x\.to_q"),
    "alpha true": ('{"lora_alpha": true}', AssetError, r"alpha of layer x\.to_q"),
    "alpha nan": ('{"lora_alpha": NaN}', AssetError, "NaN is no finite number"),
    "patterns": ('{"r": 2, "lora_alpha": 2, "alpha_pattern": [1]}', AssetError, "cannot be read"),
    "pattern": ('{"lora_alpha": 2, "alpha_pattern": {"(": 1}}', AssetError, "cannot be read"),
    "rslora": ('{"lora_alpha": 2, "use_rslora": "yes"}', AssetError, "use_rslora"),
    "no alpha": ('{"r": 2}', AssetError, "a rank and no lora_alpha"),
    "other rank": ('{"r": 8, "lora_alpha": 2}', AssetError, "has rank 2, its configuration 8"),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("place", ["header", "beside"])
def test_settings_that_say_something_else_are_refused(
    tmp_path: Path, case: str, place: str
) -> None:
    text, kind, words = SETTINGS[case]
    words = words.replace(r"x\.to_q", r"[\w.]+")
    if place == "header":
        file = tmp_path / LORA_FILE
        save_file(PAIR, file, metadata={"lora_adapter_metadata": text})
    else:
        file = tmp_path / PEFT_FILE
        state = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}
        save_file({f"{peft('conv_in')}.{n}.weight": v for n, v in state.items()}, file)
        (tmp_path / PEFT_CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(kind, match=words) as raised:
        files.read(file)
    assert type(raised.value) is kind
    assert str(tmp_path) in raised.value.message


def test_an_alpha_that_is_said_twice_must_be_the_same(tmp_path: Path) -> None:
    file = tmp_path / LORA_FILE
    state = PAIR | {f"{X}.alpha": torch.tensor(4.0)}
    save_file(state, file, metadata=header({"r": 2, "lora_alpha": 2}))
    with pytest.raises(AssetError, match="alpha 4 among its tensors, 2 in its configuration"):
        files.read(file)


def test_pefts_own_format_needs_its_configuration(
    base: UNet2DConditionModel, tmp_path: Path
) -> None:
    file = peft_folder(Lora(base, ATTENTION), tmp_path)
    (tmp_path / PEFT_CONFIG).unlink()
    with pytest.raises(AssetError, match=r"adapter_config\.json .* cannot be read"):
        files.read(file)


def test_layers_of_text_encoders_are_counted(tmp_path: Path) -> None:
    text = "text_encoder.text_model.encoder.layers.{}.self_attn.{}_proj"
    state = dict(PAIR)
    for name in (text.format(0, "q"), text.format(1, "q"), text.format(1, "out")):
        state |= {
            f"{name}.lora_linear_layer.down.weight": torch.ones(2, 4),
            f"{name}.lora_linear_layer.up.weight": torch.ones(4, 2),
        }
    save_file(state, tmp_path / "a.safetensors")
    assert files.read(tmp_path / "a.safetensors").left_out == 3

    state = dict(KOHYA)
    for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_projection"):
        state |= {
            f"{name}.lora_down.weight": torch.ones(2, 4),
            f"{name}.lora_up.weight": torch.ones(4, 2),
            f"{name}.alpha": torch.tensor(1.0),
            # Whatever it is there, it is left out.
            f"{name}.dora_scale": torch.ones(4, 1),
        }
    save_file(state, tmp_path / "b.safetensors")
    assert files.read(tmp_path / "b.safetensors").left_out == 2


# --- Files as people report them elsewhere ---

CASES = (
    Path(os.environ.get("ALIGNPROP_CASES", Path(__file__).parents[3] / "shared" / "cases")) / "lora"
)


@pytest.fixture
def tiny() -> UNet2DConditionModel:
    network = UNet2DConditionModel.from_pretrained(PACKAGE / "tiny" / "pipeline", subfolder="unet")
    return network.requires_grad_(False)


def case_file(name: str) -> Path:
    if not (CASES / name).is_file():
        pytest.skip(f"needs {CASES / name}")
    return CASES / name


def check_adds_up(
    network: UNet2DConditionModel, adapter: files.Adapter, state: dict[str, Tensor], scale: float
) -> None:
    """Assert that the loaded LoRA is scale B A added to the weights, of every tensor in a file."""
    width = network.config.cross_attention_dim
    inputs = (
        randn(1, 2, network.config.in_channels, 8, 8, dtype=torch.float32),
        10,
        randn(2, 2, 5, width, dtype=torch.float32),
    )
    by_hand = copy.deepcopy(network)
    downs = sorted(name for name in state if ".lora_A." in name)
    for down in downs:
        layer = down.split(".lora_A.")[0].removeprefix("unet.").removeprefix("base_model.model.")
        delta = scale * state[down.replace(".lora_A.", ".lora_B.")] @ state[down]
        by_hand.get_submodule(layer).weight.data += delta
    with torch.no_grad():
        before, expected = network(*inputs).sample, by_hand(*inputs).sample
        lora.load(network, adapter, "tiny")
        loaded = network(*inputs).sample
    assert len(adapter.layers) == len(downs) > 0
    effect = float((expected - before).norm())
    assert effect > 1e-3
    assert float((loaded - expected).norm()) < 1e-4 * effect


def test_case_a_dora_of_kohya_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a DoRA"):
        files.read(case_file("kohya_dora.safetensors"))


def test_case_the_name_of_an_adapter_in_the_names_is_read(tiny: UNet2DConditionModel) -> None:
    file = case_file("peft_default0_name.safetensors")
    check_adds_up(tiny, files.read(file), load_file(file), 1.0)


def test_case_alphas_beside_the_names_of_peft_are_read(tiny: UNet2DConditionModel) -> None:
    file = case_file("peft_alpha_layer.safetensors")
    check_adds_up(tiny, files.read(file), load_file(file), 0.25)


def test_case_a_folder_of_peft_is_read_with_its_configuration(
    tiny: UNet2DConditionModel, tmp_path: Path
) -> None:
    file = case_file("peft_base_model.safetensors")
    shutil.copy(file, tmp_path / PEFT_FILE)
    with pytest.raises(AssetError, match=r"adapter_config\.json"):
        files.read(files.locate(str(tmp_path)).file)
    shutil.copy(CASES / PEFT_CONFIG, tmp_path)
    check_adds_up(tiny, files.read(files.locate(str(tmp_path)).file), load_file(file), 4.0)


def test_a_peft_file_of_a_transformer_is_read_and_belongs_to_one() -> None:
    layers = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj")
    pair = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    state = {f"base_model.model.{n}.{h}.weight": v for n in layers for h, v in pair.items()}
    found, _ = formats.read_layers(state, {}, Path("peft.safetensors"))
    assert set(found) == set(layers)
    assert names.network_of(state) == "transformer."
    assert names.network_of(["base_model.model.mid_block.x.lora_A.weight"]) == "unet."


@pytest.mark.parametrize(
    "kind",
    [
        SD3Transformer2DModel,
        FluxTransformer2DModel,
        Flux2Transformer2DModel,
        ZImageTransformer2DModel,
        QwenImageTransformer2DModel,
        Krea2Transformer2DModel,
    ],
)
def test_every_layer_of_a_transformer_is_known_by_its_name_in_a_peft_file(kind: Any) -> None:
    with torch.device("meta"):
        network = kind()
    for layer, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            name = f"base_model.model.{layer}"
            assert names.layer_of(name) == layer
            assert names.network_of([f"{name}.lora_A.weight"]) == "transformer."


def test_other_names_of_a_transformers_layers_are_refused() -> None:
    name = "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight"
    state = {name: torch.ones(2, 3), name.replace("down", "up"): torch.ones(4, 2)}
    with pytest.raises(AssetError, match="unexpected tensor lora_transformer_"):
        formats.read_layers(state, {}, Path("other.safetensors"))
