"""The trained weights: what is injected, frozen, listed, copied and switched off."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import layers as lora
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def network(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def inject(network: torch.nn.Module, **options: int) -> list[torch.nn.Parameter]:
    return lora.inject(
        network, **({"rank": 3, "alpha": 6, "seed": 0} | options), target_modules=TARGETS
    )


@torch.no_grad()
def run(network: torch.nn.Module) -> Tensor:
    latents = randn(1, 2, 4, 8, 8, dtype=torch.float32)
    return network(latents, 10, randn(2, 2, 5, TEXT_WIDTH, dtype=torch.float32)).sample


def test_a_fresh_lora_changes_nothing(network: UNet2DConditionModel) -> None:
    before = run(network)
    inject(network)
    assert torch.equal(run(network), before)


def test_only_the_lora_is_trainable_and_it_is_float32(folder: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(torch.bfloat16)
    parameters = inject(network)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    # 2 attention layers a block, 3 blocks of them (down, middle, up twice), 4 projections, A and B.
    assert len(trained) == len(parameters) == 4 * 2 * 4 * 2
    assert all(".lora_" in name for name in trained)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for n, p in network.named_parameters() if ".lora_" not in n} == {torch.bfloat16}


def test_a_layer_becomes_w_plus_alpha_over_rank_b_a(network: UNet2DConditionModel) -> None:
    inject(network, rank=3, alpha=6)
    fill_lora_b(network, seed=9)
    weights = lora.weights(network)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = network.get_submodule(name)
    x = randn(3, 7, 32, dtype=torch.float32)
    delta = 6 / 3 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    with torch.no_grad():
        expected = x @ (layer.base_layer.weight + delta).T
        # float32, sums over 32 channels of numbers of order 1.
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_fresh_weights_are_a_function_of_the_seed(folder: Path) -> None:
    def fresh(seed: int) -> dict[str, Tensor]:
        network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        inject(network, seed=seed)
        return lora.weights(network)

    first, again, other = fresh(0), fresh(0), fresh(1)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if ".lora_A." in name:
            assert not torch.equal(value, other[name])
            # Standard deviation 1 / rank; 96 numbers and more know theirs to 30 %.
            assert float(value.std()) == pytest.approx(1.0 / 3.0, rel=0.3)
        else:
            assert not value.any()
    draws = [value.flatten()[:8].tolist() for name, value in first.items() if ".lora_A." in name]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_injecting_leaves_the_global_generator_as_if_never_asked_for_values(
    network: UNet2DConditionModel, folder: Path
) -> None:
    # Whatever the global generator holds, the weights are the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        inject(network)
    other = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(456)
        inject(other)
    first, second = lora.weights(network), lora.weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_target_modules_are_refused(network: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules.*to_x"):
        lora.inject(network, rank=2, alpha=2, target_modules=["to_x"], seed=0)


def test_a_regular_expression_names_layers_by_their_whole_name(
    network: UNet2DConditionModel,
) -> None:
    pattern = r"mid_block\..*\.attn[12]\.to_(q|out\.0)"
    lora.inject(network, rank=2, alpha=2, target_modules=pattern, seed=0)
    layers = {name.rpartition(".lora_")[0] for name in lora.weights(network)}
    inside = "mid_block.attentions.0.transformer_blocks.0"
    assert layers == {f"{inside}.attn{i}.{end}" for i in (1, 2) for end in ("to_q", "to_out.0")}


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("to_q", "no whole name fits the pattern to_q"),
        ("(", r"'\(' is no regular expression"),
        (r".*attn1", "names more than linear layers and convolutions"),
    ],
)
def test_patterns_that_name_no_layers_are_refused(
    network: UNet2DConditionModel, pattern: str, match: str
) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.target_modules: .*{match}") as raised:
        lora.inject(network, rank=2, alpha=2, target_modules=pattern, seed=0)
    assert "\n" not in raised.value.message


def test_weights_are_copies_that_can_be_put_back(network: UNet2DConditionModel) -> None:
    inject(network)
    fill_lora_b(network, seed=1)
    weights, before = lora.weights(network), run(network)
    fill_lora_b(network, seed=2)
    assert not torch.equal(run(network), before)
    lora.set_weights(network, weights)
    assert torch.equal(run(network), before)
    assert all(p.requires_grad for p in lora.trainable(network))


def test_weights_of_another_rank_are_refused_and_named(network: UNet2DConditionModel) -> None:
    inject(network)
    weights = lora.weights(network)
    wrong = {name: value[:2] if ".lora_A." in name else value for name, value in weights.items()}
    with pytest.raises(ConfigError, match=r"does not fit this run: 32 tensors differ.*\(2, 32\)"):
        lora.set_weights(network, wrong)
    missing = dict(list(weights.items())[1:])
    with pytest.raises(ConfigError, match=r"1 tensors differ.*None in the file"):
        lora.set_weights(network, missing)


def test_switched_off_the_base_model_is_back_exactly(network: UNet2DConditionModel) -> None:
    before = run(network)
    inject(network)
    fill_lora_b(network, seed=3)
    tuned = run(network)
    assert float((tuned - before).abs().max()) > 1e-3
    with lora.disabled(network):
        assert torch.equal(run(network), before)
    assert torch.equal(run(network), tuned)
    with pytest.raises(RuntimeError, match="inside"), lora.disabled(network):
        raise RuntimeError("inside")
    assert torch.equal(run(network), tuned)
    assert all(p.requires_grad for p in lora.trainable(network))


def test_the_norm_is_over_all_weights(network: UNet2DConditionModel) -> None:
    assert lora.norm(network) == 0.0
    assert not lora.is_present(network)
    inject(network)
    assert lora.is_present(network)
    expected = torch.cat([v.flatten().double() for v in lora.weights(network).values()]).norm()
    assert lora.norm(network) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("alpha", [4, 2.5])
def test_the_settings_are_plain_values(network: UNet2DConditionModel, alpha: float) -> None:
    lora.inject(network, rank=3, alpha=alpha, target_modules=TARGETS, seed=0)
    settings = lora.adapter_metadata(network)
    assert settings == json.loads(json.dumps(settings))
    assert (settings["r"], settings["lora_alpha"]) == (3, alpha)
    assert settings["target_modules"] == sorted(TARGETS)


def test_the_order_of_the_parameters_is_fixed(network: UNet2DConditionModel) -> None:
    parameters = inject(network)
    assert [id(p) for p in parameters] == [id(p) for p in lora.trainable(network)]
    names = {id(p): name for name, p in network.named_parameters()}
    order = [names[id(p)] for p in parameters]
    assert order == sorted(order)


def test_merged_it_is_the_same_function_without_lora_layers(
    network: UNet2DConditionModel,
) -> None:
    targets = (*TARGETS, "conv1", "time_emb_proj")
    lora.inject(network.double(), rank=3, alpha=6, target_modules=targets, seed=0)
    fill_lora_b(network, seed=3)
    network.double()
    layers = dict(network.named_modules())
    weights = {name: p.clone() for name, p in network.named_parameters()}
    latents, embeds = randn(1, 2, 4, 8, 8), randn(2, 2, 5, TEXT_WIDTH)
    merged = lora.Merged(network)
    with torch.no_grad():
        tuned = network(latents, 10, embeds).sample
        for _ in range(2):
            with merged:
                assert not lora.is_present(network)
                inside = network(latents, 10, embeds).sample
            torch.testing.assert_close(inside, tuned, rtol=1e-12, atol=1e-12)
            # The very same layers and numbers are back.
            now = dict(network.named_modules())
            assert now.keys() == layers.keys()
            assert all(now[name] is layer for name, layer in layers.items())
        assert torch.equal(network(latents, 10, embeds).sample, tuned)
        with lora.disabled(network):
            assert float((network(latents, 10, embeds).sample - tuned).abs().max()) > 1e-3
    for name, p in network.named_parameters():
        assert torch.equal(p, weights[name])
    # 8 attention layers of 4 projections, and in 8 residual blocks a convolution and a projection.
    replaced = [name for name in layers if name.endswith(".base_layer")]
    sizes = [layers[name].weight.numel() for name in replaced]
    assert merged.bytes == 8 * sum(sizes) > 0


def test_merged_the_memory_layout_is_kept(network: UNet2DConditionModel) -> None:
    lora.inject(network, rank=3, alpha=6, target_modules=("conv1",), seed=0)
    network.to(memory_format=torch.channels_last)
    with lora.Merged(network):
        weight = network.mid_block.resnets[0].conv1.weight
        assert weight.shape[2:] == (3, 3)
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("why", ["half precision", "switched off", "no LoRA"])
def test_nothing_is_merged_where_it_would_change_the_output(
    network: UNet2DConditionModel, why: str
) -> None:
    if why != "no LoRA":
        inject(network)
    if why == "half precision":
        network.to(torch.bfloat16)
    with lora.disabled(network) if why == "switched off" else nullcontext():
        merged = lora.Merged(network)
    assert merged.bytes == 0
    before = dict(network.named_modules())
    with merged:
        assert dict(network.named_modules()) == before
