"""LoRA files in a network: ours, those of diffusers, and those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.lora import files, formats
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import LORA_FILE
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("sd") / "model")


def network_of(folder: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)


@pytest.fixture
def network(folder: Path) -> UNet2DConditionModel:
    return network_of(folder)


@torch.no_grad()
def run(network: torch.nn.Module) -> Tensor:
    latents = randn(1, 2, 4, 8, 8, dtype=torch.float32)
    return network(latents, 10, randn(2, 2, 5, TEXT_WIDTH, dtype=torch.float32)).sample


# float32 with sums over 32 to 128 channels.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def with_lora(network: torch.nn.Module, **options: object) -> dict[str, Tensor]:
    settings = {"rank": 3, "alpha": 5, "seed": 2, "target_modules": TARGETS} | options
    lora.inject(network, **settings)
    fill_lora_b(network, seed=50)
    return lora.weights(network)


def save(network: torch.nn.Module, folder: Path, header: Mapping[str, str] = {}) -> Path:
    folder.mkdir(exist_ok=True)
    return files.save(
        folder,
        lora.weights(network),
        header,
        prefix="unet.",
        adapter_metadata=lora.adapter_metadata(network),
    )


def load(network: torch.nn.Module, file: Path) -> None:
    lora.load(network, files.read(file), "small")


def test_a_saved_lora_loads_to_the_same_weights_and_output(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    base = run(network)
    weights = with_lora(network)
    tuned = run(network)
    assert float((tuned - base).abs().max()) > 1e-3
    file = save(network, tmp_path)
    assert file == tmp_path / LORA_FILE
    again = network_of(folder)
    load(again, file)
    loaded = lora.weights(again)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert torch.equal(run(again), tuned)
    # Nothing is trainable until it is asked for.
    assert not any(p.requires_grad for p in again.parameters())


def test_a_saved_lora_gives_equal_output_in_plain_diffusers(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    # alpha differs from rank, so a reader that ignores it computes something else.
    with_lora(network)
    save(network, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    base = run(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    tuned = run(pipeline.unet)
    assert float((tuned - base).abs().max()) > 1e-3
    torch.testing.assert_close(run(network), tuned, **CLOSE)


def test_a_lora_saved_by_plain_diffusers_is_read(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    with_lora(network)
    expected = run(network)
    save(network, tmp_path / "ours")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "ours")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="default_0"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default_0"].to_dict(),
    )
    again = network_of(folder)
    load(again, tmp_path / "theirs" / LORA_FILE)
    torch.testing.assert_close(run(again), expected, **CLOSE)


def test_what_is_written_is_what_plain_diffusers_writes(
    network: UNet2DConditionModel, tmp_path: Path
) -> None:
    weights = with_lora(network)
    ours = save(network, tmp_path / "ours")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=weights,
        unet_lora_adapter_metadata=lora.adapter_metadata(network),
    )
    with safe_open(ours, "pt") as mine, safe_open(tmp_path / "theirs" / LORA_FILE, "pt") as other:
        assert mine.metadata() == other.metadata()
        assert set(mine.keys()) == set(other.keys())
        for name in mine.keys():  # noqa: SIM118
            assert torch.equal(mine.get_tensor(name), other.get_tensor(name))


def test_metadata_goes_to_the_header_of_the_file(
    network: UNet2DConditionModel, tmp_path: Path
) -> None:
    with_lora(network)
    header = files.read_header(save(network, tmp_path, {"alignprop_model": "tiny"}))
    assert header["alignprop_model"] == "tiny"
    assert header["format"] == "pt"
    settings = json.loads(header["lora_adapter_metadata"])
    assert settings["unet.r"] == 3
    assert settings["unet.lora_alpha"] == 5


def test_a_loaded_lora_can_be_trained_on(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    weights = with_lora(network)
    file = save(network, tmp_path)
    again = network_of(folder, torch.bfloat16)
    load(again, file)
    parameters = lora.make_trainable(again)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert len(trained) == len(parameters) > 0
    assert all(".lora_" in name for name in trained)
    # The numbers of the file, not rounded to the network's precision.
    named = lora.named_trainable(again)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert list(named) == sorted(weights)
    assert all(torch.equal(named[name], weights[name]) for name in weights)
    assert [id(p) for p in named.values()] == [id(p) for p in parameters]


@pytest.mark.parametrize(
    "targets",
    [
        ["to_k", "to_q"],
        r".*attn1\.to_(q|k)",
        r"down_blocks\.0\..*\.(to_q|ff\.net\.2|proj_in)|mid_block\.resnets\.0\.conv1",
    ],
)
def test_the_file_keeps_how_its_layers_were_named(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path, targets: list[str] | str
) -> None:
    with_lora(network, target_modules=targets)
    assert lora.adapter_metadata(network)["target_modules"] == targets
    file = save(network, tmp_path)
    again = network_of(folder)
    load(again, file)
    assert lora.adapter_metadata(again) == lora.adapter_metadata(network) | {
        "init_lora_weights": True
    }
    assert torch.equal(run(again), run(network))
    # It is the same file again, and plain diffusers computes the same with it.
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(save(again, tmp_path / "again").parent)
    torch.testing.assert_close(run(pipeline.unet), run(network), **CLOSE)


def test_target_modules_that_mean_other_layers_here_are_replaced(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    with_lora(network, target_modules=["to_q", "to_k"])
    layers = dict(files.read(save(network, tmp_path)).layers)
    gone = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    del layers[gone]
    weights, settings = formats.packed(layers)
    settings["target_modules"] = ["to_q", "to_k"]
    (tmp_path / "less").mkdir()
    file = files.save(tmp_path / "less", weights, {}, prefix="unet.", adapter_metadata=settings)
    again = network_of(folder)
    load(again, file)
    assert {name.rpartition(".lora_")[0] for name in lora.weights(again)} == layers.keys()
    named = lora.adapter_metadata(again)["target_modules"]
    assert not any(gone.endswith(name) for name in named)


def test_unloaded_the_base_model_is_back_bit_for_bit(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    with_lora(network, target_modules=(*TARGETS, "conv1", "time_emb_proj"))
    file, tuned = save(network, tmp_path), run(network)
    again = network_of(folder)
    base, before, modules = run(again), again.state_dict(), dict(again.named_modules())
    own = set(vars(again))
    for _ in range(2):
        load(again, file)
        assert torch.equal(run(again), tuned)
        with pytest.raises(ValueError, match="already"):
            load(again, file)
        lora.unload(again)
        after = again.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        now = dict(again.named_modules())
        assert now.keys() == modules.keys()
        assert all(now[name] is module for name, module in modules.items())
        assert set(vars(again)) == own
        assert torch.equal(run(again), base)


def check_refused_unchanged(
    network: torch.nn.Module, path: Path, kind: type[AlignPropError], match: str
) -> None:
    before = run(network)
    with pytest.raises(kind, match=match):
        load(network, path)
    assert not lora.is_present(network)
    assert torch.equal(run(network), before)


def test_a_lora_of_another_width_is_refused(network: UNet2DConditionModel, tmp_path: Path) -> None:
    other = network_of(small_pipeline(tmp_path / "other", block_out_channels=(64, 64)))
    with_lora(other)
    match = "does not belong to model small: .* takes 32 channels here, 64 there"
    check_refused_unchanged(network, save(other, tmp_path), ConfigError, match)


def test_a_lora_with_layers_this_model_lacks_is_refused(
    network: UNet2DConditionModel, tmp_path: Path
) -> None:
    other = network_of(
        small_pipeline(
            tmp_path / "other",
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    with_lora(other)
    match = "does not belong to model small: .* which this model lacks"
    check_refused_unchanged(network, save(other, tmp_path), ConfigError, match)


@pytest.mark.parametrize(
    ("layer", "down", "up", "match"),
    [
        # Right inputs, other outputs; a kernel of another size; a layer that has no matrix.
        ("conv_in", (2, 4, 3, 3), (33, 2, 1, 1), r"is \(32, 4, 3, 3\) here, \(33, 4, 3, 3\) there"),
        ("conv_in", (2, 4, 1, 1), (32, 2, 1, 1), r"is \(32, 4, 3, 3\) here, \(32, 4, 1, 1\) there"),
        ("conv_norm_out", (2, 32), (32, 2), "which this model lacks"),
    ],
)
def test_a_layer_of_another_shape_is_refused(
    network: UNet2DConditionModel, tmp_path: Path, layer: str, down: tuple, up: tuple, match: str
) -> None:
    file = tmp_path / LORA_FILE
    names = (f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight")
    save_file(dict(zip(names, (torch.ones(down), torch.ones(up)), strict=True)), file)
    check_refused_unchanged(network, file, ConfigError, match)


def test_a_lora_of_a_text_encoder_alone_is_refused(
    network: UNet2DConditionModel, tmp_path: Path
) -> None:
    file = tmp_path / LORA_FILE
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    state = {
        f"{layer}.down.weight": torch.ones(2, TEXT_WIDTH),
        f"{layer}.up.weight": torch.ones(TEXT_WIDTH, 2),
    }
    save_file(state, file)
    check_refused_unchanged(network, file, ConfigError, "LoRA of the text encoder alone")


def test_files_that_are_no_lora_are_reported(
    network: UNet2DConditionModel, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssetError, match="holds no LoRA"):
        files.locate(str(tmp_path))
    missing = tmp_path / "nothing.safetensors"
    check_refused_unchanged(network, missing, AssetError, r"nothing\.safetensors: cannot be read")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\x00\x00\x00")
    check_refused_unchanged(network, damaged, AssetError, "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    check_refused_unchanged(network, weights, AssetError, "holds no LoRA weights")
