"""The LoRA of linear layers: peft's function and gradients in fewer operators and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.linear import ADAPTER, LoraLinear, take_over
from alignprop_cli.planning import meter
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = 8 * len(TARGETS)
RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("linear"))


def network_of(folder: Path, dtype: torch.dtype, *, scale: float = 0.02) -> UNet2DConditionModel:
    """Return a network with a LoRA, float32 but for a network in float64."""
    found = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    # Rounded once, so that all precisions have the same weights.
    torch.nn.Module.to(torch.nn.Module.to(found, torch.bfloat16), dtype)
    lora.inject(found, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=0)
    fill_lora_b(found, seed=3, scale=scale)
    if dtype == torch.float64:
        for parameter in lora.trainable(found):
            parameter.data = parameter.data.double()
    return found


def plain(network: torch.nn.Module) -> None:
    """Give all layers peft's own forward back."""
    for layer in network.modules():
        if isinstance(layer, LoraLinear):
            layer.__class__ = Linear


def run(network: torch.nn.Module, seed: int = 1, *, grad_in: bool = True) -> tuple[Tensor, Tensor]:
    """Return the output for two rows, and the input."""
    dtype = network.conv_in.weight.dtype  # type: ignore[union-attr]

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16).to(dtype)

    latents = rounded(randn(seed, 2, 4, 8, 8)).requires_grad_(grad_in)
    return network(latents, 10, rounded(randn(seed + 1, 2, 5, TEXT_WIDTH))).sample, latents


def gradients(network: torch.nn.Module, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return the gradients of the LoRA and of the input, float64."""
    for parameter in lora.trainable(network):
        parameter.grad = None
    output, latents = run(network, seed)
    weight = randn(seed + 2, *output.shape).to(torch.bfloat16).to(output.dtype)
    (output * weight).sum().backward()
    factors = [p.grad for p in lora.trainable(network) if p.grad is not None]
    assert len(factors) == 2 * LAYERS
    assert latents.grad is not None
    return torch.cat([g.flatten().double() for g in factors]), latents.grad.flatten().double()


def relative(one: Tensor, other: Tensor) -> float:
    assert float(other.norm()) > 1e-2
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_peft(
    folder: Path, dtype: torch.dtype, most: float
) -> None:
    network = network_of(folder, dtype, scale=0.3)
    assert sum(isinstance(layer, LoraLinear) for layer in network.modules()) == LAYERS
    outputs, found = run(network)[0].detach(), gradients(network)
    plain(network)
    expected = gradients(network)
    assert relative(outputs, run(network)[0].detach()) < most
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < most


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_in_bfloat16_the_gradient_is_as_good_as_that_of_peft(folder: Path, scale: float) -> None:
    """By the cosine to the gradient without rounding, over several inputs."""
    exact = network_of(folder, torch.float64, scale=scale)
    half, other = (network_of(folder, torch.bfloat16, scale=scale) for _ in range(2))
    plain(other)

    def missing(one: Tensor, reference: Tensor) -> float:
        return 1.0 - float(one @ reference / (one.norm() * reference.norm()))

    ours = peft = 0.0
    for seed in range(8):
        reference = gradients(exact, seed)[0]
        ours += missing(gradients(half, seed)[0], reference) / 8
        peft += missing(gradients(other, seed)[0], reference) / 8
    assert 1e-6 < peft < 0.2
    # Single inputs differ by more than this either way.
    assert ours < 1.05 * peft


def test_only_calls_of_the_roll_out_round_the_factors(folder: Path) -> None:
    network = network_of(folder, torch.bfloat16)
    with torch.no_grad():
        exact = run(network, grad_in=False)[0]
        with lora.prepared(network) as merged:
            assert merged.is_empty
            assert merged.bytes == 2 * sum(p.numel() for p in lora.trainable(network))
            rounded = merged.around(run)(network, grad_in=False)[0]
            assert torch.equal(run(network, grad_in=False)[0], exact)
        # The same function up to rounding, of which the plain calls have less.
        assert not torch.equal(rounded, exact)
        assert relative(rounded.double(), exact.double()) < 0.05
    assert torch.equal(run(network)[0].detach(), exact)


def test_casts_follow_the_factors_in_the_same_memory(folder: Path) -> None:
    network = network_of(folder, torch.bfloat16)

    def rolled_out() -> tuple[Tensor, tuple[int, ...]]:
        with lora.prepared(network) as merged, torch.no_grad():
            return merged.around(run)(network, grad_in=False)[0], lora.addresses(network)

    before, places = rolled_out()
    fill_lora_b(network, seed=11)
    after, places_after = rolled_out()
    assert places_after == places
    assert not torch.equal(before, after)
    fresh = network_of(folder, torch.bfloat16)
    fill_lora_b(fresh, seed=11)
    with lora.prepared(fresh) as merged, torch.no_grad():
        assert torch.equal(merged.around(run)(fresh, grad_in=False)[0], after)


def test_the_factors_gradients_are_float32_and_sums_over_calls(folder: Path) -> None:
    network = network_of(folder, torch.bfloat16)
    one, _ = gradients(network)
    assert {p.grad.dtype for p in lora.trainable(network) if p.grad is not None} == {torch.float32}
    output, _ = run(network)
    weight = randn(3, *output.shape).to(torch.bfloat16)
    (output * weight).sum().backward()
    twice = torch.cat(
        [p.grad.flatten().double() for p in lora.trainable(network) if p.grad is not None]
    )
    assert relative(twice, 2.0 * one) < 1e-6


class Operators(TorchDispatchMode):
    """Counts operators by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._overloadpacket.__name__ != "_unsafe_view":
            self.names[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> Counter[str]:
    with Operators() as seen:
        call()
    return seen.names


def added(network: torch.nn.Module, *, grad: bool) -> Counter[str]:
    """Return the operators of a call that the LoRA adds to the network without it."""

    def call() -> None:
        with torch.set_grad_enabled(grad):
            run(network, grad_in=grad)

    with lora.prepared(network) as merged:
        tuned = operators(call if grad else merged.around(call))
    with lora.disabled(network):
        base = operators(call)
    tuned.subtract(base)
    return +tuned


def test_a_layer_adds_fewer_operators_than_the_six_of_peft(folder: Path) -> None:
    network = network_of(folder, torch.bfloat16)
    assert added(network, grad=False) == {"mm": LAYERS, "addmm_": LAYERS}
    # Cast in, scale, two products, add.
    counts = {"_to_copy": LAYERS, "mul_": LAYERS, "mm": 2 * LAYERS, "add_": LAYERS}
    assert added(network, grad=True) == counts
    plain(network)
    # Cast in, two products, scale, add, cast out.
    assert sum(added(network, grad=False).values()) == 6 * LAYERS


def test_no_copy_of_the_input_is_kept_for_backward(folder: Path) -> None:
    """What autograd keeps because of the LoRA; a frozen layer alone keeps nothing."""
    network = network_of(folder, torch.bfloat16)

    def kept() -> int:
        exclude = [*network.parameters(), *(t for m in network.modules() for t in casts(m))]
        with meter.SavedBytes(exclude) as saved, lora.prepared(network):
            run(network)
        return saved.total

    lora_on = kept()
    with lora.disabled(network):
        without = kept()
    plain(network)
    peft = kept()
    assert without < lora_on < peft
    # Of peft's four-byte copies of every layer's input nothing is left but the inputs themselves,
    # two bytes a number, of which several layers share one.
    assert peft - without > 2.5 * (lora_on - without)


def casts(module: torch.nn.Module) -> tuple[Tensor, ...]:
    return module.casts if isinstance(module, LoraLinear) else ()


def test_other_kinds_of_layers_stay_as_peft_made_them() -> None:
    def layers(base: torch.nn.Module, **options: Any) -> list[torch.nn.Module]:
        network = torch.nn.Sequential(base)
        config = LoraConfig(r=2, target_modules=["0"], **options)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        take_over(network)
        return [network[0]]

    linear, conv = torch.nn.Linear(4, 4), torch.nn.Conv2d(4, 4, 3)
    assert type(layers(linear)[0]) is LoraLinear
    assert type(layers(linear, use_rslora=True)[0]) is LoraLinear  # another scaling alone
    assert type(layers(linear, use_dora=True)[0]) is Linear
    assert type(layers(linear, lora_dropout=0.1)[0]) is Linear
    assert type(layers(linear, lora_bias=True)[0]) is Linear
    assert type(layers(conv)[0]) is Conv2d


def test_what_peft_does_with_a_layer_is_left_alone(folder: Path) -> None:
    network = network_of(folder, torch.float64)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer: Any = network.get_submodule(name)
    x = randn(5, 3, layer.in_features)
    with torch.no_grad():
        expected = layer(x)
        lora.set_strength(network, 0.5)
        half = layer(x)
        lora.set_strength(network, 1.0)
        torch.testing.assert_close(2.0 * half - layer.base_layer(x), expected)
        layer.merge()
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.base_layer(x), expected)
        layer.unmerge()
        torch.testing.assert_close(layer(x), expected)
    assert set(lora.weights(network)) >= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)])
def test_inputs_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 6)).double()
    lora.inject(network, rank=2, alpha=3, target_modules=["0"], seed=0)
    for parameter in lora.trainable(network):
        parameter.data = randn(len(shape), *parameter.shape)
    x = randn(9, *shape).requires_grad_()
    assert torch.autograd.gradcheck(network, (x,))
    with torch.no_grad():
        torch.testing.assert_close(network(x), network(x.expand(2, *shape))[1])
