"""Rectified flows from the command line: trained, resumed, drawn by plain diffusers."""

from __future__ import annotations

import json
import re
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
    ZImagePipeline,
)
from safetensors.torch import load_file
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.calls import calls_in
from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config, ModelConfig
from alignprop_cli.evaluation.draw import Sample, draw_samples
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.tensor_file import save_tensors
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.planning.window import with_window
from alignprop_cli.rewards.mixture import build_mixture
from tests.factories import fill_lora_b
from tests.flow_models import (
    as_given,
    scale_of,
    small_flux1,
    small_klein,
    small_krea2,
    small_qwen_image,
    small_sd3,
    small_zimage,
)

CPU = torch.device("cpu")
CASES: dict[str, tuple[Callable[..., Path], Any]] = {
    "sd3": (small_sd3, StableDiffusion3Pipeline),
    "klein": (small_klein, Flux2KleinPipeline),
    "flux1": (small_flux1, FluxPipeline),
    "zimage": (small_zimage, ZImagePipeline),
    "qwen": (small_qwen_image, QwenImagePipeline),
    "krea2": (small_krea2, Krea2Pipeline),
}

# What ComfyUI's key maps hold for these networks (comfy/lora.py and comfy/utils.py of commit
# 17358c8, model_lora_keys_unet: mmdit_to_diffusers, flux_to_diffusers, z_image_to_diffusers,
# krea2_to_diffusers).
COMFYUI = {
    "sd3": r"transformer\.transformer_blocks\.\d+\.attn2?\.(to_[qkv]|to_out\.0)"
    r"|transformer\.transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
    "klein": r"transformer\.transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
    r"|transformer\.single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    "qwen": r"transformer\.transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
    "zimage": r"transformer\.layers\.\d+\.attention\.(to_[qkv]|to_out\.0)",
    "krea2": r"transformer\.transformer_blocks\.\d+\.attn\.(to_[qkv]|to_gate|to_out\.0)",
    "flux1": r"transformer\.transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)"
    r"|transformer\.transformer_blocks\.\d+\.(attn\.to_add_out|ff(_context)?\.net\.(0\.proj|2))"
    r"|transformer\.single_transformer_blocks\.\d+\.attn\.to_[qkv]",
}


# The others take longer.
SHORT = ("zimage",)


@pytest.fixture(
    params=[
        pytest.param(each, marks=() if each in SHORT else pytest.mark.long)
        for each in sorted(CASES)
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return CASES[name][0](tmp_path / "model")


def options(folder: Path) -> list[str]:
    return [
        "--preset=tiny",
        "--reward=brightness",
        f"--set=model.id={folder}",
        "--set=sample.num_inference_steps=2",
        "--set=sample.guidance_scale=2.0",
        "--set=sample.height=16",
        "--set=sample.width=16",
        "--set=gradient.method=full",
        "--set=train.batch_size=2",
        # All that a plan leaves open, so that nothing has to be measured.
        "--set=train.micro_batch=2",
        "--set=train.rollout_batch=2",
        "--set=train.decode_batch=2",
        "--set=gradient.checkpoint_network=none",
        "--set=gradient.checkpoint_decoder=false",
        "--set=gradient.checkpoint_reward=false",
        "--set=train.learning_rate=0.05",
        "--set=eval.images=2",
        "--set=eval.sample_images=2",
        "--set=lora.rank=2",
        "--set=lora.target_modules=null",
    ]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


def drawn(config: Config, prompt: str, file: Path | None) -> Tensor:
    """Return our image, (3, H, W) bytes, as `evaluate` draws the first one."""
    model = open_model(config.model, [prompt, ""], CPU)
    if file is not None:
        lora.load(model.network.module, files.read(file), "model")
    mixture = build_mixture(config.reward, config.loss, CPU)
    found = draw_samples(
        model,
        [Sample(prompt, 0, 0)],
        mixture,
        sampler(config.sample, model.family, model.network),
        seed=0,
        batch_size=1,
    )
    return torch.from_numpy(found.images[0])


def test_two_steps_resumed_to_three_give_the_image_of_plain_diffusers(
    run: Callable[..., tuple[int, str, str]], name: str, folder: Path
) -> None:
    # An alpha that is not the rank, and no power of two from it.
    given = [*options(folder), "--set=lora.alpha=3"]
    code, out, err = run("train", *given, "--steps=2", "--output=r", "--json")
    assert code == 0, err
    assert "cover 100.0% of the path from noise to image" in err
    first = load_file(Path("r/checkpoints/step-000002") / files.LORA_FILE)
    resumed_by = ["--resume=r", f"--set=model.id={folder}", "--set=train.steps=3"]
    code, out, err = run("train", *resumed_by, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 3
    code, _, err = run("train", *given, "--steps=3", "--output=whole", "--json")
    assert code == 0, err
    file = Path("r/checkpoints/step-000003") / files.LORA_FILE
    resumed, whole = load_file(file), load_file(Path("whole/checkpoints/step-000003") / file.name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert any(not torch.equal(first[key], resumed[key]) for key in first)

    # Every layer has its name in ComfyUI's map, which without `.alpha` scales by 1; the B that is
    # trained, and resumed from, is another than that in the file.
    layers = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in resumed}
    assert all(re.fullmatch(COMFYUI[name], layer) for layer in layers)
    assert {factors.scaling for factors in files.read(file).layers.values()} == {1.0}
    trained = load_file(file.with_name("optimizer.safetensors"))
    for layer in layers:
        (up,) = (resumed[key] for key in resumed if key == f"{layer}.lora_B.weight")
        own = trained[f"trained:{layer.removeprefix('transformer.')}.lora_B.weight"]
        assert torch.equal(up, 1.5 * own)

    # The file in plain diffusers, and our own image.
    config = presets.resolve(config=Path("r/config.yaml"))
    pipeline = CASES[name][1].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(file.parent)
    shape = open_model(config.model, [], CPU).network.latent_shape(16, 16)
    image = pipeline(
        prompt="a small dog",
        num_inference_steps=2,
        **scale_of(pipeline, 2.0),
        height=16,
        width=16,
        latents=as_given(pipeline, rng.image_noise(0, "eval_noise", [(0, 0)], shape)),
        output_type="pt",
    ).images[0]
    expected = image.mul(255.0).round().to(torch.uint8).permute(1, 2, 0)
    ours = drawn(config, "a small dog", file)
    assert int((ours.int() - expected.int()).abs().max()) <= 1  # a rounding apart
    assert float((ours.float() - expected.float()).abs().mean()) < 0.01
    base = drawn(config, "a small dog", None)
    assert float((ours.float() - base.float()).abs().mean()) > 1.0


def test_a_lora_of_another_family_is_refused(
    run: Callable[..., tuple[int, str, str]], folder: Path, name: str, tmp_path: Path
) -> None:
    others = {"sd3": "klein", "klein": "flux1", "flux1": "klein", "krea2": "zimage"}
    other = others.get(name, "sd3")
    theirs = CASES[other][0](tmp_path / "other")
    model = open_model(ModelConfig(id=str(theirs)), [], CPU)
    network = model.network.module
    lora.inject(network, rank=2, alpha=2, target_modules=model.family.target_modules, seed=0)
    (tmp_path / "lora").mkdir()
    files.save(
        tmp_path / "lora",
        lora.weights(network),
        {},
        prefix=model.family.lora_prefix,
        adapter_metadata=lora.adapter_metadata(network),
    )
    code, _, err = run("train", *options(folder), "--steps=1", f"--set=lora.init={tmp_path}/lora")
    assert code == 2
    assert "this LoRA does not belong to model" in err


@pytest.mark.long
def test_a_run_from_a_file_with_an_alpha_is_resumed_as_if_it_had_not_stopped(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = small_flux1(tmp_path / "model")
    # Diffusers' format as others write it: with alpha in the header.
    network = open_model(ModelConfig(id=str(folder)), [], CPU).network.module
    lora.inject(network, rank=2, alpha=3, target_modules=["attn.to_q", "attn.to_v"], seed=0)
    fill_lora_b(network, seed=1)
    state = {f"transformer.{key}": value for key, value in lora.weights(network).items()}
    header = {f"transformer.{k}": v for k, v in lora.adapter_metadata(network).items()}
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    save_tensors(tmp_path / "start.safetensors", state, metadata)
    given = [*options(folder), "--set=lora.init=start.safetensors"]
    code, _, err = run("train", *given, "--steps=1", "--output=r", "--json")
    assert code == 0, err
    assert "lora.init: rank 2, alpha 2, its file's scaling multiplied into B" in err
    again = ["--resume=r", f"--set=model.id={folder}", "--set=train.steps=2"]
    code, _, err = run("train", *again, "--json")
    assert code == 0, err
    code, _, err = run("train", *given, "--steps=2", "--output=whole", "--json")
    assert code == 0, err
    resumed, whole = (
        load_file(Path(name) / "checkpoints/step-000002" / files.LORA_FILE)
        for name in ("r", "whole")
    )
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_tiny_window_is_warned_of_and_another_asked_for_as_a_share_of_the_path(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = small_sd3(tmp_path / "model")
    last = {"sample.num_inference_steps": 28, "gradient.method": "last_k", "gradient.k": 1}
    given = [*options(folder), *(f"--set={key}={value}" for key, value in last.items())]
    # The last step of the pipeline's own list is 0.9 % of the path.
    code, out, err = run("train", *given, "--dry-run")
    assert code == 0, err
    said = "the calls with gradient cover 0.9% of the path from noise to image"
    assert f"window: {said}" in out
    assert f"{said}, so they can change next to nothing: set gradient.path_share" in err

    def k_of(share: float, **more: Any) -> int:
        flags = {"model.id": str(folder), **last, "gradient.path_share": share, **more}
        return with_window(presets.resolve(preset="tiny", flags=flags)).gradient.k

    # Its last two are 11.1 %. Of equal steps the last is shift(1 / 28) = 3 / 30 = 10 %.
    assert [k_of(share) for share in (0.001, 0.1, 0.112, 1.0)] == [1, 2, 3, 28]
    assert k_of(0.099, **{"sample.spacing": "linear"}) == 1
    assert k_of(0.101, **{"sample.spacing": "linear"}) == 2

    def window_of(method: str) -> Any:
        flags = {"model.id": str(folder), **last, "gradient.method": method}
        flags |= {"gradient.k_min": 1, "gradient.path_share": 0.112}
        return with_window(presets.resolve(preset="tiny", flags=flags)).gradient

    # The last three calls, in the words of each estimator.
    assert window_of("random_k").k_max == 3
    for method in ("refl", "drtune", "leap", "sparse"):
        assert calls_in(window_of(method).span, 28) == range(25, 28)
    # The others have no window to choose and ignore this one.
    assert k_of(0.5, **{"gradient.method": "full"}) == 1
