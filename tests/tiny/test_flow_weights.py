"""The embedded flow models: size, formats, the pipeline's own images, and what their card says."""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file

from alignprop_cli.config.schema import EMBEDDED_MODELS, ModelConfig, SampleConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.guidance import guided
from alignprop_cli.models.families import TINY, TINY_FLOW, open_model, sampler
from alignprop_cli.rewards import registry
from alignprop_cli.sampling import sample
from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.checker import check
from alignprop_cli.tiny.make import build
from tests.factories import randn

CPU = torch.device("cpu")
PARTS = ("background", "colour", "shape", "count", "all_right")
FEW_CALLS = [1.0, 0.75, 0.5, 0.25]


@functools.cache
def pipeline_of(name: str) -> Any:
    variant = {"tiny-flow": None, "tiny-fewstep": "fewstep"}[name]
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        TINY_FLOW, variant=variant, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def options_of(name: str) -> dict[str, Any]:
    """Return how each model is meant to be drawn, for diffusers' pipeline."""
    if name == "tiny-flow":
        return {"num_inference_steps": 4, "guidance_scale": 3.0}
    return {"sigmas": FEW_CALLS, "guidance_scale": 0.0}


@pytest.mark.parametrize("name", ["tiny-flow", "tiny-fewstep"])
def test_our_images_are_those_of_plain_diffusers(name: str) -> None:
    prompts = data.heldout_prompts()[::60]
    model = open_model(ModelConfig(id=name), [*prompts, ""], CPU)
    few = name == "tiny-fewstep"
    config = SampleConfig(
        num_inference_steps=4,
        guidance_scale=0.0 if few else 3.0,
        spacing="linear" if few else "model",
    )
    chain = sampler(config, model.family, model.network)
    start = randn(3, len(prompts), *model.network.latent_shape(None, None)).float()
    conditioning = model.conditioning(prompts, "" if chain.guidance.enabled else None)
    denoise = guided(model.network.predict, conditioning, chain.guidance)
    schedule = chain.schedule(model.network, tuple(start.shape[1:]))
    with torch.no_grad():
        ours = model.decoder.decode(sample(denoise, start, schedule))
    theirs = pipeline_of(name)(prompts, latents=start, output_type="pt", **options_of(name)).images
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)


def test_the_few_step_model_has_weights_of_its_own_and_all_other_parts_in_common() -> None:
    base, few = pipeline_of("tiny-flow"), pipeline_of("tiny-fewstep")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        pairs = zip(
            base.components[name].parameters(), few.components[name].parameters(), strict=True
        )
        same = all(torch.equal(one, other) for one, other in pairs)
        assert same == (name != "transformer")


def test_autoencoder_and_text_encoder_are_those_of_the_first_embedded_model() -> None:
    for part, file, prefix in (
        ("vae", "diffusion_pytorch_model.safetensors", ""),
        ("text_encoder", "model.safetensors", "text_model."),
    ):
        first, here = load_file(TINY / part / file), load_file(TINY_FLOW / part / file)
        for name, tensor in first.items():
            assert torch.equal(tensor, here[prefix + name])
    for name in ("tokenizer", "tokenizer_2"):
        for file in (TINY / "tokenizer").iterdir():
            assert (TINY_FLOW / name / file.name).read_bytes() == file.read_bytes()


def test_no_part_names_the_folder_that_it_came_from() -> None:
    for file in TINY_FLOW.parent.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), file


def test_a_written_configuration_forgets_its_folder_and_nothing_else(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"_name_or_path": "/somewhere", "patch_size": 2}')
    build.forget_origin(config)
    assert json.loads(config.read_text()) == {"patch_size": 2}


def test_the_weights_are_half_precision_and_add_at_most_6_megabytes_to_the_wheel(
    tmp_path: Path,
) -> None:
    archive = tmp_path / "wheel.zip"
    files = [file for file in TINY_FLOW.rglob("*") if file.is_file()]
    files.append(TINY_FLOW.parent / "flow_samples.png")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in files:
            wheel.write(file, file.relative_to(TINY_FLOW.parent))
    assert archive.stat().st_size <= 6e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 5
    for file in weights:
        with safe_open(file, "pt") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}


@pytest.mark.long
@pytest.mark.parametrize(("name", "entry"), [("tiny-flow", "flow"), ("tiny-fewstep", "fewstep")])
def test_samples_are_as_right_as_the_card_says(name: str, entry: str) -> None:
    samples = json.loads((TINY.parent / "card.json").read_text())[entry]["samples"]
    assert samples["images"] == 500
    prompts = data.heldout_prompts()[1::4][:40]
    options = options_of(name)
    if "num_inference_steps" in options:
        options["num_inference_steps"] = 12
    images = pipeline_of(name)(
        prompts,
        generator=[torch.Generator().manual_seed(i) for i in range(40)],
        output_type="np",
        **options,
    ).images
    checks = check(np.rint(images * 255.0).astype(np.uint8), prompts)
    for part in PARTS:
        share = np.mean([getattr(one, part) for one in checks])
        # Shares of 40 images scatter by at most .08, one standard deviation.
        assert abs(share - samples["right"][part]) < 0.25, part
    assert samples["right"]["all_right"] >= 0.4


def test_the_embedded_aligner_measures_images_of_every_embedded_model_unasked() -> None:
    rewards = parse({"reward": {"clip": {}}}).reward
    for name in EMBEDDED_MODELS:
        registry.check_embedded(rewards, name)
