"""Weights in 8 and 4 bits: how they are rounded, what autograd keeps, what the plan counts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM, T5EncoderModel

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import AssetError
from alignprop_cli.estimators import full
from alignprop_cli.guidance import guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.linear import LoraLinear
from alignprop_cli.models import components, quantized
from alignprop_cli.models.base import Model, Source
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.quantized import How, QuantizedLinear, pack, quantize, unpack
from alignprop_cli.planning import footprint, meter, sampling
from alignprop_cli.planning import request as planning
from alignprop_cli.sampling import backprop
from tests.factories import fill_lora_b, randn, small_pipeline, small_xl_pipeline
from tests.flow_models import small_klein, small_sd3
from tests.planning.test_flow_footprint import BUILD as FLOWS

CPU = torch.device("cpu")
BUILD: dict[str, Callable[..., Path]] = {
    "sd": small_pipeline,
    "sdxl": small_xl_pipeline,
    "sd3": small_sd3,
    "klein": small_klein,
}

# The levels of nf4, from appendix E of QLoRA, arXiv:2305.14314.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)

needs_bitsandbytes = pytest.mark.extra("bitsandbytes", "quantize")
HOW = ["int8", pytest.param("nf4", marks=needs_bitsandbytes)]


def weight(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * randn(seed, *shape)).to(dtype)


def layer(how: How, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """Return a quantised layer 96 -> 40, its numbers of a size as in a network."""
    linear = torch.nn.Linear(96, 40, bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(weight(40, 96, dtype=dtype))
    return QuantizedLinear(linear, how)


def plain(layer: QuantizedLinear) -> torch.nn.Linear:
    """Return a usual layer with the weight as it is unpacked."""
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear = linear.to(layer.dtype).requires_grad_(False)
    linear.weight.copy_(layer.weight)
    if layer.bias is not None:
        linear.bias.copy_(layer.bias)
    return linear


def test_int8_rounds_to_half_a_level_of_each_row() -> None:
    full = weight(8, 50)
    full[3] *= 100.0
    full[5] = 0.0
    found = unpack(*pack(full, "int8"), "int8", (8, 50), torch.float32)
    # 127 levels on each side of 0, the largest at the largest weight of the row.
    half = full.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((found - full).abs() <= half * (1 + 1e-5)).all()
    assert float((found - full).abs().max()) > 0.5 * float(half.max())
    assert torch.equal(found[5], full[5])
    assert pack(full, "int8")[0].dtype == torch.int8


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(6, 64), (8, 96), (40, 32), (3, 20), (5, 7)])
def test_nf4_takes_the_nearest_level_of_each_block(shape: tuple[int, int]) -> None:
    """Blocks go on over the ends of rows, which bitsandbytes itself gets wrong on the CPU."""
    full = weight(*shape)
    found = unpack(*pack(full, "nf4"), "nf4", shape, torch.float32)
    for block, values in zip(full.flatten().split(64), found.flatten().split(64), strict=True):
        largest = block.abs().max()
        nearest = ((block / largest)[:, None] - NF4).abs().argmin(dim=-1)
        torch.testing.assert_close(values, largest * NF4[nearest], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
def test_a_layer_and_its_gradient_are_those_of_the_unpacked_weight(
    how: How, dtype: torch.dtype
) -> None:
    made = layer(how, dtype=dtype)
    reference = plain(made)
    given = randn(2, 3, 7, 96).to(dtype).requires_grad_()
    same = given.detach().clone().requires_grad_()
    upstream = randn(3, 3, 7, 40).to(dtype)
    out, expected = made(given), reference(same)
    assert torch.equal(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    assert given.grad is not None
    assert same.grad is not None
    assert torch.equal(given.grad, same.grad)
    with torch.no_grad():
        assert torch.equal(made(given), expected)


@pytest.mark.parametrize("how", HOW)
def test_autograd_keeps_nothing_but_the_packed_weight(how: How) -> None:
    made = layer(how)
    given = randn(2, 4, 96, dtype=torch.float32).requires_grad_()
    with meter.SavedBytes([given, *made.buffers()]) as kept:
        out = made(given)
    assert out.requires_grad
    assert kept.total == 0
    # An unpacked weight that is left to autograd is kept whole.
    with meter.SavedBytes([given, *made.buffers()]) as kept:
        torch.nn.functional.linear(given, made.weight, made.bias)
    assert kept.total == 4 * 40 * 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
def test_a_lora_around_it_is_the_lora_around_the_unpacked_weight(
    how: How, dtype: torch.dtype
) -> None:
    def wrapped(base: torch.nn.Linear) -> torch.nn.Module:
        network = torch.nn.Sequential(base)
        lora.inject(network, rank=4, alpha=8, target_modules=["0"], seed=0)
        fill_lora_b(network, seed=5)
        assert isinstance(network[0], LoraLinear)
        return network

    made = layer(how, dtype=dtype)
    results: list[list[Tensor]] = []
    for network in (wrapped(plain(made)), wrapped(made)):
        given = randn(2, 3, 7, 96).to(dtype).requires_grad_()
        with lora.prepared(network) as merged:
            network(given).backward(randn(3, 3, 7, 40).to(dtype))
            # The weight of a quantised layer is never merged: it would be held in full.
            is_whole = not isinstance(network[0].base_layer, QuantizedLinear)  # type: ignore
            assert merged.is_empty is not (is_whole and dtype == torch.float32)
            with torch.no_grad():
                free = network(given)
        factors = [p.grad for p in lora.trainable(network)]
        assert all(p.dtype == torch.float32 for p in lora.trainable(network))
        results.append([found for found in (free, given.grad, *factors) if found is not None])
    assert len(results[0]) == 4
    for one, other in zip(*results, strict=True):
        assert float(one.norm()) > 0.0
        assert torch.equal(one, other)


def opened(folder: Path, how: str, prompts: tuple[str, ...] = ()) -> Model:
    return open_model(ModelConfig(id=str(folder), quantize=how), prompts, CPU)  # type: ignore


def size_of(module: torch.nn.Module) -> int:
    """Return the bytes of weights and buffers."""
    return sum(t.numel() * t.element_size() for t in footprint.held(module))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", sorted(BUILD))
def test_the_plan_counts_the_bytes_that_are_held(family: str, how: How, tmp_path: Path) -> None:
    folder = BUILD[family](tmp_path / "model")
    model, whole = opened(folder, how), opened(folder, "none")
    network = model.network.module
    held = size_of(network)
    planned = meta_model(ModelConfig(id=str(folder), quantize=how), torch.float32).parts
    assert size_of(planned.network.module) == held
    # A byte and a scale for each row; half a byte, and a scale for every 64.
    saved, full = 0, size_of(whole.network.module)
    for part in whole.network.module.modules():
        if type(part) is torch.nn.Linear:
            out, count = part.out_features, part.weight.numel()
            size = count + 4 * out if how == "int8" else -(-count // 2) + 4 * -(-count // 64)
            saved += 4 * count - size
    assert saved > 0
    assert held == full - saved
    # The autoencoder is never quantised, and a LoRA belongs to either.
    assert not any(isinstance(m, QuantizedLinear) for m in model.decoder.module.modules())
    assert size_of(planned.decoder.module) == size_of(whole.decoder.module)
    assert model.fingerprint == whole.fingerprint


# One family in 4 bits: what is unpacked is of the same size.
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("klein", "int8"),
        *(pytest.param(n, "int8", marks=pytest.mark.long) for n in sorted(FLOWS) if n != "klein"),
        pytest.param("klein", "nf4", marks=needs_bitsandbytes),
    ],
)
def test_what_a_call_needs_is_counted_with_the_weights_that_it_unpacks(
    family: str, how: How, tmp_path: Path
) -> None:
    """On the meta device as with real numbers; an unpacked weight is as large for any batch."""
    folder = FLOWS[family](tmp_path / "model")
    chosen = parse(
        {
            "model": {"id": str(folder), "quantize": how},
            "sample": {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 32},
            "reward": {"brightness": {}},
        }
    )
    need, sampled = planning.measure(chosen, "cpu"), sampling.measure(chosen, CPU)
    # These read prompts as long as they are, and are planned for the longest.
    prompt = 600 * "a " if family in ("zimage", "qwen", "krea2") else "a"
    model = opened(folder, how, (prompt,))
    module, shape = model.network.module, model.network.latent_shape(32, 32)
    assert need.weights["network weights"] == size_of(module)
    conditioning = model.conditioning(4 * [prompt], None)
    chain = sampler(chosen.sample, model.family, model.network)
    denoise = guided(model.network.predict, conditioning, chain.guidance)
    step = chain.schedule(model.network, shape).steps[0]

    def counted(images: int, *, has_grad: bool) -> meter.Cost:
        given = randn(1, images, *shape, dtype=torch.float32).requires_grad_(has_grad)
        there = [*footprint.held(module), *conditioning.text.tensors.values(), given]
        with torch.set_grad_enabled(has_grad):
            return meter.count(lambda: denoise(given, step), exclude=there)

    # Of one image some copies are views.
    batches = {1: 0.03, 4: 0.02}
    # What `evaluate` samples the base with; there the embeddings are counted.
    embeds = sum(t[0].numel() * t.element_size() for t in conditioning.text.tensors.values())
    for images, rel in batches.items():
        plain = counted(images, has_grad=False).forward + images * embeds
        assert sampled.parts["network"](images) == pytest.approx(plain, rel=rel)
    lora.inject(module, rank=4, alpha=4, target_modules=model.family.target_modules, seed=0)
    for images, rel in batches.items():
        about = functools.partial(pytest.approx, rel=rel)
        assert need.rollout.forward(images) == about(counted(images, has_grad=False).forward)
        call, cost = need.call["none"], counted(images, has_grad=True)
        assert call.saved(images) == about(cost.saved)
        assert call.forward(images) == about(cost.forward)
        assert call.backward(images) == about(cost.backward)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", sorted(FLOWS))
def test_a_network_in_half_precision_predicts_as_with_its_weights_unpacked(
    family: str, how: How, tmp_path: Path
) -> None:
    """With a float32 LoRA in it, whose precision is not that of the network."""
    folder = FLOWS[family](tmp_path / "model")
    chosen = ModelConfig(id=str(folder), quantize=how, dtype="bfloat16")
    model = open_model(chosen, ("a", "b"), CPU)
    module, network = model.network.module, model.network
    lora.inject(module, rank=4, alpha=4, target_modules=model.family.target_modules, seed=0)
    fill_lora_b(module, seed=5)
    text = model.conditioning(["a", "b"], None).text
    text = text.with_guidance(3.0) if family == "flux1" else text
    given = randn(1, 2, *network.latent_shape(32, 32), dtype=torch.float32)

    def prediction() -> Tensor:
        with torch.no_grad():
            return network.predict(given, 500.0, text)

    found = prediction()
    assert found.dtype == torch.float32
    assert torch.equal(network.predict(given.clone().requires_grad_(), 500.0, text), found)
    for path, part in list(module.named_modules()):
        if isinstance(part, QuantizedLinear):
            module.set_submodule(path, plain(part))
    assert torch.equal(prediction(), found)
    assert float(found.std()) > 0.0


def test_text_encoders_are_quantised_but_for_what_their_class_keeps(tmp_path: Path) -> None:
    sd3, klein = small_sd3(tmp_path / "sd3"), small_klein(tmp_path / "klein")
    for folder, name, kind, kept in (
        (sd3, "text_encoder_3", T5EncoderModel, "wo"),
        (klein, "text_encoder", Qwen3ForCausalLM, "lm_head"),
    ):
        config = ModelConfig(id=str(folder), quantize="int8")
        source = Source(config, folder, torch.float32, CPU)
        encoder = components.load_network(source, name, kind)
        kinds: dict[type, set[str]] = {torch.nn.Linear: set(), QuantizedLinear: set()}
        for path, part in encoder.named_modules():
            if type(part) in kinds:
                kinds[type(part)].add(path.rpartition(".")[2])
        assert kinds[torch.nn.Linear] == {kept}
        assert len(kinds[QuantizedLinear]) >= 6
    prompts = ("a small dog", "two cats")
    full, packed = (opened(sd3, how, prompts).embeds for how in ("none", "int8"))
    for prompt in prompts:
        for key, value in full[prompt].tensors.items():
            found = packed[prompt].tensors[key]
            assert not torch.equal(found, value)
            assert float((found - value).norm() / value.norm()) < 0.05


# The least cosine that is asked for; docs/memory.md has what was measured. In networks with random
# weights every rounding grows from layer to layer: nf4 is only asked of the trained one.
CASES = [
    ("tiny", "int8", 0.99),
    pytest.param("tiny", "nf4", 0.98, marks=needs_bitsandbytes),
    ("sd3", "int8", 0.99),
    ("klein", "int8", 0.99),
]


@pytest.mark.parametrize(("family", "how", "least"), CASES)
def test_the_gradient_of_the_lora_points_where_the_unquantised_one_does(
    family: str, how: How, least: float, tmp_path: Path
) -> None:
    folder = family if family == "tiny" else str(BUILD[family](tmp_path / "model"))
    whole = lora_gradient(folder, "none")
    found = lora_gradient(folder, how)
    assert float(whole.norm()) > 1e-6
    assert 1.0 - 1e-9 > cosine(whole, found) > least


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def lora_gradient(folder: str, how: str, steps: int = 4) -> Tensor:
    """Return the gradient of the LoRA through a whole chain and the decoder, float64."""
    model = opened(Path(folder), how, ("a red circle",))
    network = model.network
    lora.inject(network.module, rank=4, alpha=4, target_modules=model.family.target_modules, seed=0)
    fill_lora_b(network.module, seed=5, scale=0.02)
    chosen = parse(
        {
            "sample": {"num_inference_steps": steps, "guidance_scale": 1.0},
            "reward": {"brightness": {}},
        }
    )
    chain = sampler(chosen.sample, model.family, network)
    size = None if folder == "tiny" else 32
    shape = network.latent_shape(size, size)
    schedule = chain.schedule(network, shape)
    denoise = guided(network.predict, model.conditioning(["a red circle"], None), chain.guidance)
    path = full().path(tuple(range(len(schedule))))
    start = randn(7, 1, *shape, dtype=torch.float32)
    ends = backprop(denoise, start, schedule, path, eta=0.0, draw_noise=lambda i: start)
    images = model.decoder.decode(ends)
    (images * randn(8, *images.shape, dtype=torch.float32)).mean().backward()
    grads = [p.grad for p in lora.trainable(network.module) if p.grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads])


def test_nothing_is_quantised_where_nothing_is_asked_for(tmp_path: Path) -> None:
    network = opened(small_pipeline(tmp_path / "model"), "none").network.module
    assert not any(isinstance(part, QuantizedLinear) for part in network.modules())
    assert quantize(network, "none") is network


def test_a_missing_library_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(AssetError) as caught:
        opened(tmp_path, "nf4")
    assert caught.value.message == (
        "model.quantize: nf4 needs bitsandbytes, which is not installed"
    )
    assert caught.value.hint == "pip install 'alignprop[quantize]'; int8 needs nothing"
    assert caught.value.exit_code == 3
    quantized.check("int8", CPU)


@needs_bitsandbytes
def test_nf4_works_on_this_cpu() -> None:
    quantized.check("nf4", CPU)
