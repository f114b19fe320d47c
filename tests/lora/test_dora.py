"""DoRA, rsLoRA and all linear layers: trained, written, read by all doors and plain diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.console import Console
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import files, formats
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from alignprop_cli.models.families import open_model
from alignprop_cli.planning import request as planning
from alignprop_cli.training import setup
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline, small_xl_pipeline
from tests.flow_models import small_klein, small_sd3
from tests.plain import both

CPU = torch.device("cpu")
# Linear layers and convolutions.
TARGETS = ("to_q", "proj_in", "conv_in")
FAMILIES: dict[str, tuple[Callable[..., Path], Any]] = {
    "sd": (small_pipeline, StableDiffusionPipeline),
    "sdxl": (small_xl_pipeline, StableDiffusionXLPipeline),
    "sd3": (small_sd3, StableDiffusion3Pipeline),
    "klein": (small_klein, Flux2KleinPipeline),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("dora"))


@pytest.fixture
def network(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def inject(network: torch.nn.Module, *, trained: bool = False, **options: Any) -> None:
    """Put a DoRA in; `trained` gives it random values."""
    given = {"rank": 3, "alpha": 6.0, "target_modules": TARGETS, "seed": 0, "dora": True}
    lora.inject(network, **(given | options))
    if trained:
        fill_lora_b(network, seed=1)
        for number, (name, parameter) in enumerate(sorted(network.named_parameters())):
            if ".lora_magnitude_vector." in name:
                # By up to a third.
                factor = 1.0 + randn(number, *parameter.shape, dtype=torch.float32).tanh() / 3.0
                parameter.data.mul_(factor)


def save(network: torch.nn.Module, place: Path, prefix: str = "unet.") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    metadata = lora.adapter_metadata(network)
    return files.save(place, lora.weights(network), {}, prefix=prefix, adapter_metadata=metadata)


@torch.no_grad()
def output(network: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    latents = randn(1, 2, 4, 8, 8, dtype=torch.float32).to(dtype)
    text = randn(2, 2, 5, TEXT_WIDTH, dtype=torch.float32).to(dtype)
    return network(latents, 10, text).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_changes_nothing(network: UNet2DConditionModel, dtype: torch.dtype) -> None:
    network = network.to(dtype)
    before = output(network, dtype)
    inject(network)
    # Also in half precision, where peft's own start is rounded.
    assert torch.equal(output(network, dtype), before)
    assert {p.dtype for p in lora.trainable(network)} == {torch.float32}


@pytest.mark.parametrize(
    "name", ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"]
)
def test_a_layer_is_its_formula_and_the_norm_gets_no_gradient(
    network: UNet2DConditionModel, name: str
) -> None:
    """W' = m (W + s B A) / |W + s B A|, the norm a constant: Liu et al. 2024, eq. 5, sec. 4.3."""
    inject(network, trained=True)
    layer: Any = network.get_submodule(name)
    down, up = (half[lora.ADAPTER].weight for half in (layer.lora_A, layer.lora_B))
    magnitude = layer.lora_magnitude_vector[lora.ADAPTER].weight
    base, is_conv = layer.base_layer, name == "conv_in"
    x = randn(3, 2, 4, 8, 8, dtype=torch.float32) if is_conv else randn(3, 7, 32).float()
    found = layer(x)
    grads = torch.autograd.grad(found.square().sum(), [down, up, magnitude])
    # By hand.
    delta = (6 / 3 * up.flatten(1) @ down.flatten(1)).view(base.weight.shape)
    moved = base.weight + delta
    lengths = moved.detach().flatten(1).norm(dim=1)
    rows = (magnitude.flatten() / lengths).view(-1, *[1] * (moved.ndim - 1))
    weight = rows * moved
    if is_conv:
        expected = torch.nn.functional.conv2d(x, weight, base.bias, padding=1)
    else:
        expected = torch.nn.functional.linear(x, weight, base.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(
        grads, torch.autograd.grad(expected.square().sum(), [down, up, magnitude]), strict=True
    ):
        assert float(other.norm()) > 1e-3
        assert float((one - other).norm()) < 1e-4 * float(other.norm())


def test_what_is_written_is_read_bit_for_bit(network: UNet2DConditionModel, tmp_path: Path) -> None:
    inject(network, trained=True)
    drawn, before = output(network), lora.weights(network)
    file = save(network, tmp_path / "a")
    # The names that diffusers reads, without its warning about dora_scale.
    assert any(name.endswith(".to_q.lora_magnitude_vector") for name in load_file(file))
    lora.unload(network)
    adapter = files.read(file)
    lora.load(network, adapter, "model")
    assert torch.equal(output(network), drawn)
    after = lora.weights(network)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # As `soup` would write it, and PEFT's own format.
    weights, settings = formats.packed(adapter.layers)
    (tmp_path / "b").mkdir()
    again = files.save(tmp_path / "b", weights, {}, prefix="unet.", adapter_metadata=settings)
    (tmp_path / "peft").mkdir()
    named = {f"base_model.model.{name}": value for name, value in before.items()}
    save_file(named, tmp_path / "peft" / PEFT_FILE)
    config = lora.adapter_metadata(network)
    (tmp_path / "peft" / PEFT_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    for other in (again, tmp_path / "peft" / PEFT_FILE):
        lora.unload(network)
        lora.load(network, files.read(other), "model")
        assert torch.equal(output(network), drawn)


@pytest.mark.parametrize("options", ["dora", "all-linear"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_diffusers_draws_the_same_images(family: str, options: str, tmp_path: Path) -> None:
    make, kind = FAMILIES[family]
    place = make(tmp_path / "model")
    model = open_model(ModelConfig(id=str(place), dtype="float32"), [], CPU)
    module = model.network.module
    if options == "dora":
        inject(module, trained=True, target_modules=model.family.target_modules)
    else:
        inject(module, target_modules="all-linear", dora=False, rslora=True)
        fill_lora_b(module, seed=1, scale=0.02)
        linear = {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
        layers = {name.rpartition(".lora_")[0] for name in lora.weights(module)}
        assert {
            name.removesuffix(".base_layer") for name in linear if ".lora_" not in name
        } == layers
    file = save(module, tmp_path / "lora", model.family.lora_prefix)
    # In files of transformers it is in B, see `files.as_written`.
    is_unet = family in ("sd", "sdxl")
    scaling = 6.0 / (3.0**0.5 if options == "all-linear" else 3.0) if is_unet else 1.0
    assert {f.scaling for f in files.read(file).layers.values()} == {scaling}
    sample = {"num_inference_steps": 2, "guidance_scale": 2.0}
    sample |= {"height": 16, "width": 16} if family == "klein" else {}
    ((ours, theirs),) = both(place, kind, file, sample, ["a cat"])
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)
    ((base, _),) = both(place, kind, None, sample, ["a cat"])
    assert float((ours - base).abs().mean()) > 1e-3


# --- The commands ---

SMALL = (
    *("--preset=tiny", "--reward=brightness", "--set=sample.num_inference_steps=2"),
    *("--set=gradient.method=full", "--set=train.batch_size=2", "--set=eval.images=2"),
    *("--set=eval.sample_images=2", "--set=train.micro_batch=2", "--set=train.rollout_batch=2"),
    *("--set=train.decode_batch=2", "--set=lora.rank=2"),
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, args)))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, " ".join(captured.err.split())

    return call


@pytest.mark.long
def test_a_dora_is_trained_resumed_evaluated_and_not_mixed(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("train", *SMALL, "--set=lora.dora=true", "--set=lora.rslora=true", "--quiet")
    assert run(*given, "--steps=1", "--output=a")[0] == 0
    code, _, err = run("train", "--resume=a", "--steps=2", "--quiet")
    assert code == 0, err
    assert run(*given, "--steps=2", "--output=b")[0] == 0
    one, two = (load_file(Path(n, "checkpoints", "step-000002", LORA_FILE)) for n in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    first = load_file(Path("a", "checkpoints", "step-000001", LORA_FILE))
    moved = [n for n in one if "magnitude" in n and not torch.equal(first[n], one[n])]
    assert len(moved) == sum("magnitude" in name for name in one) > 0
    # `evaluate` and `lora.init` take it as it is.
    code, out, err = run("evaluate", "a", "--images=2", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["rewards"]["brightness"]["tuned"]["ties"] < 1.0
    config = presets.resolve(preset="tiny", assignments=["lora.init=a"])
    model = open_model(ModelConfig(id="tiny"), [], CPU)
    made = setup.prepare_lora(config, model, None, Console(quiet=True)).lora
    assert (made.rank, made.alpha, made.dora, made.rslora) == (2, 2.0, True, True)
    last = lora.weights(model.network.module)
    assert all(torch.equal(last[name.removeprefix("unet.")], one[name]) for name in one)
    # What has no meaning is refused, with what to do instead.
    code, _, err = run("evaluate", "a", "--images=2", "--scale=0,1", "-o", "c")
    assert code == 2
    assert "is a DoRA, which has no strengths" in err
    for args in (("a", "base", "--coef=0.5"), ("a", "--format=comfyui"), ("b", "a")):
        code, _, err = run("soup", *args, "-o", "mixed")
        assert code == 2
        assert "is a DoRA" in err
        assert not Path("mixed").exists()


def test_a_dora_is_not_begun_from_a_lora(tmp_path: Path) -> None:
    model = open_model(ModelConfig(id="tiny"), [], CPU)
    inject(model.network.module, dora=False, target_modules=("to_q",))
    file = save(model.network.module, tmp_path)
    lora.unload(model.network.module)
    config = presets.resolve(preset="tiny", assignments=[f"lora.init={file}", "lora.dora=true"])
    with pytest.raises(ConfigError, match=r"lora\.dora: lora\.init: .* is no DoRA"):
        setup.prepare_lora(config, model, None, Console(quiet=True))


@pytest.mark.long
def test_the_plan_counts_the_magnitudes_and_their_calls() -> None:
    def footprint(dora: bool) -> Any:
        config = presets.resolve(preset="tiny", assignments=[f"lora.dora={json.dumps(dora)}"])
        return planning.measure(config, "cpu")

    plain, dora = footprint(False), footprint(True)
    model = open_model(ModelConfig(id="tiny"), [], CPU)
    lora.inject(
        model.network.module,
        rank=presets.resolve(preset="tiny").lora.rank,
        alpha=1.0,
        target_modules=presets.resolve(preset="tiny").lora.target_modules or ("to_q",),
        seed=0,
        dora=True,
    )
    trained = {n: p.numel() for n, p in lora.named_trainable(model.network.module).items()}
    magnitudes = sum(size for name, size in trained.items() if "magnitude" in name)
    assert dora.trained == sum(trained.values())
    assert dora.trained - plain.trained == magnitudes > 0
    assert dora.call["none"].forward.each > plain.call["none"].forward.each
