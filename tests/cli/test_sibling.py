"""`alignprop evaluate RUN --model SIBLING`: trained on one checkpoint, sampled with another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    Flux2KleinPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import ModelConfig, SampleConfig, dump
from alignprop_cli.lora import files, formats
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import defaults
from alignprop_cli.models.families import fingerprint, open_model
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.published import PUBLISHED
from tests.factories import SD1_BETAS, fill_lora_b, small_pipeline, small_xl_pipeline
from tests.flow_models import small_klein, small_sd3
from tests.plain import both

CPU = torch.device("cpu")
PROMPTS = ("a cat", "dogs")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def call(*arguments: object) -> tuple[int, str, str]:
        given = [*arguments, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out"]
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", *map(str, given)])
        captured = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, " ".join(captured.err.split())

    return call


def trained(folder: Path, base: Path, **flags: Any) -> Path:
    """Write a run with one checkpoint, as training on `base` leaves it."""
    more = {"model.id": str(base), "eval.images": 2, "lora.rank": 2, "lora.target_modules": None}
    config = presets.resolve(preset="tiny", rewards={"brightness": None}, flags=more | flags)
    model = open_model(ModelConfig(id=str(base)), [], CPU)
    network = model.network.module
    lora.inject(network, rank=2, alpha=4, target_modules=model.family.target_modules, seed=0)
    fill_lora_b(network, seed=1, scale=0.5)
    place = folder / "checkpoints" / "step-000001"
    place.mkdir(parents=True)
    files.save(
        place,
        lora.weights(network),
        {
            "alignprop.base_model": str(base),
            "alignprop.base_fingerprint": model.fingerprint,
            "alignprop.config": json.dumps(config.model_dump(mode="json")),
        },
        prefix=model.family.lora_prefix,
        adapter_metadata=lora.adapter_metadata(network),
    )
    (folder / "config.yaml").write_text(dump(config))
    return folder


def check_images(out: Path, sibling: Path, run: Path, kind: Any, sample: dict[str, Any]) -> None:
    """Compare all images with those of plain diffusers, and the decoded images before rounding."""
    file = files.locate(str(run)).file
    for name, adapter in (("base", None), ("tuned", file)):
        for number, (ours, expected) in enumerate(both(sibling, kind, adapter, sample, PROMPTS)):
            torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-4)
            written = np.asarray(Image.open(out / "images" / name / f"{number:04d}.png"))
            image = expected[0].mul(255.0).round().permute(1, 2, 0).numpy()
            assert np.abs(written.astype(float) - image).max() <= 1  # a rounding apart


@pytest.mark.long
def test_a_lora_of_a_base_model_is_sampled_as_the_distilled_one_is(
    evaluate: Run, tmp_path: Path
) -> None:
    base = small_klein(tmp_path / "base")
    distilled = small_klein(tmp_path / "distilled", is_distilled=True, seed=1)
    recorded = {"num_inference_steps": 6, "guidance_scale": 3.0, "spacing": "linear"}
    recorded |= {"guidance_interval": (0.2, 0.9), "eta": 0.5, "height": 16, "width": 16}
    run = trained(tmp_path / "run", base, **{f"sample.{k}": v for k, v in recorded.items()})
    code, out, err = evaluate(run, "--model", distilled, "--json")
    assert code == 0, err
    values = json.loads(out)
    # The distilled model's own chain; the size is the LoRA's.
    own = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16}
    assert values["sample"] == SampleConfig(**own).model_dump(mode="json")
    # Which model was trained and which sampled, in every output.
    assert values["model"]["id"] == str(distilled)
    assert values["adapters"]["tuned"]["base_model"] == str(base)
    assert f"was trained on {base}, and is used with {distilled}: 4 steps, guidance 1" in err
    said = f"are sampled with {distilled}; trained on {base}"
    assert said in (tmp_path / "out" / "report.html").read_text()
    texts = Image.open(tmp_path / "out" / "images" / "tuned" / "0000.png").info
    assert (texts["model"], texts["adapter_base_model"]) == (str(distilled), str(base))
    check_images(tmp_path / "out", distilled, run, Flux2KleinPipeline, values["sample"])
    # What is typed wins, and one may be.
    typed = ("--set", "sample.num_inference_steps=2", "--set", "sample.spacing=linear")
    code, out, err = evaluate(run, "--model", distilled, *typed, "--overwrite")
    assert code == 0, err
    assert said in " ".join(out.split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sample"]
    assert found == values["sample"] | {"num_inference_steps": 2, "spacing": "linear"}


@pytest.mark.long
def test_steps_and_guidance_that_nothing_tells_are_asked_for(evaluate: Run, tmp_path: Path) -> None:
    base = small_xl_pipeline(tmp_path / "base")
    # As SDXL-Turbo is published: nothing in its files says how many steps it takes.
    ancestral = EulerAncestralDiscreteScheduler(
        **SD1_BETAS, steps_offset=1, timestep_spacing="trailing"
    )
    turbo = small_xl_pipeline(tmp_path / "turbo", seed=1, scheduler=ancestral)
    recorded = {"sample.num_inference_steps": 7, "sample.guidance_scale": 2.5}
    run = trained(tmp_path / "run", base, **recorded)
    code, out, err = evaluate(run, "--model", turbo)
    assert (code, out) == (2, "")
    assert "sample.num_inference_steps and sample.guidance_scale of this model are not known" in err
    ask = "--set sample.num_inference_steps=NUMBER --set sample.guidance_scale=NUMBER"
    assert f"{ask} (the LoRA has 7 and 2.5)" in err
    steps, guidance = "sample.num_inference_steps=1", "sample.guidance_scale=0"
    code, _, err = evaluate(run, "--model", turbo, "--set", steps)
    assert code == 2
    assert "--set sample.guidance_scale=NUMBER (the LoRA has 2.5)" in err
    assert not (tmp_path / "out").exists()
    code, out, err = evaluate(run, "--model", turbo, "--set", steps, "--set", guidance, "--json")
    assert code == 0, err
    sample = json.loads(out)["sample"]
    check_images(tmp_path / "out", turbo, run, StableDiffusionXLPipeline, sample)


def test_a_sibling_of_another_architecture_is_refused_before_it_is_loaded(
    evaluate: Run, tmp_path: Path
) -> None:
    run = trained(tmp_path / "run", small_klein(tmp_path / "base"))
    wide = small_klein(tmp_path / "wide", num_attention_heads=4, is_distilled=True)
    deep = small_klein(tmp_path / "deep", num_single_layers=4, is_distilled=True)
    given = ("--set", "sample.num_inference_steps=2", "--set", "sample.guidance_scale=1")
    for sibling, why in (
        (wide, "to_out takes 256 channels here, 128 there"),
        (deep, "the LoRA's own layers fit, but the networks differ in others"),
        (small_sd3(tmp_path / "sd3"), "which this model lacks"),
    ):
        # Without weights it could not be loaded.
        (sibling / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        code, out, err = evaluate(run, "--model", sibling, *given)
        assert (code, out) == (2, "")
        assert f"was trained on {tmp_path / 'base'}, whose layers are not those of {sibling}" in err
        assert why in err
    # A LoRA that records nothing is held against the layers alone.
    bare = tmp_path / "bare"
    bare.mkdir()
    adapter = files.read(files.locate(str(run)).file)
    weights, metadata = formats.packed(adapter.layers)
    files.save(bare, weights, {}, prefix="transformer.", adapter_metadata=metadata)
    code, _, err = evaluate(bare, "--model", wide, "--reward", "brightness", *given)
    assert code == 2
    assert f"does not belong to model {wide}" in err
    assert "to_out takes 256 channels here, 128 there" in err


def test_a_recorded_revision_is_not_the_siblings_and_trust_is_as_before(
    evaluate: Run, tmp_path: Path
) -> None:
    base, distilled = small_klein(tmp_path / "base"), tmp_path / "distilled"
    small_klein(distilled, is_distilled=True, seed=1)
    foreign = {"model.revision": "v2", "model.variant": "fp16"}
    run = trained(tmp_path / "run", base, **foreign)
    code, _, err = evaluate(run, "--model", distilled, "-n", 1, "--set", "sample.height=16")
    assert code == 0, err
    # What it names besides the model is still refused.
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("brightness:", "mine.py:blueness:"))
    code, _, err = evaluate(run, "--model", distilled, "--overwrite")
    assert code == 2
    assert "this reward is code, which would be run" in err


def test_one_folder_by_two_names_is_one_model(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "run", small_pipeline(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    code, out, err = evaluate(run, "--model", "./base", "-n", 1, "--json")
    assert code == 0, err
    # Those of the preset that it was trained with.
    sample = json.loads(out)["sample"]
    assert (sample["num_inference_steps"], sample["guidance_scale"]) == (5, 3.0)


def test_a_model_alone_is_sampled_as_it_is_published(evaluate: Run, tmp_path: Path) -> None:
    distilled = small_klein(tmp_path / "distilled", is_distilled=True)
    size = ("--set", "sample.height=16", "--set", "sample.width=16", "-n", 1)
    code, out, err = evaluate(
        "base", "--model", distilled, *size, "--reward", "brightness", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["sample"]["num_inference_steps"] == 4


def test_published_models_have_steps_and_guidance() -> None:
    # Of each pair the one that is trained, and the few-step one that its LoRA is used with.
    for model, expected in {
        "stabilityai/stable-diffusion-xl-base-1.0": (50, 5.0),
        "stabilityai/sdxl-turbo": (1, 0.0),
        "black-forest-labs/FLUX.2-klein-base-4B": (50, 4.0),
        "black-forest-labs/FLUX.2-klein-4B": (4, 1.0),
    }.items():
        assert defaults.own_sampling(ModelConfig(id=model)) == expected
    # No row is for a model that is not there.
    assert set(defaults._PUBLISHED) <= {*PUBLISHED.values(), "tiny"}


@pytest.mark.parametrize("make", [small_pipeline, small_xl_pipeline, small_sd3, small_klein])
def test_an_architecture_is_known_without_its_weights(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    config = ModelConfig(id=str(make(tmp_path / "model")))
    network = meta_model(config, torch.float32).parts.network.module
    assert fingerprint(network) == open_model(config, [], CPU).fingerprint
