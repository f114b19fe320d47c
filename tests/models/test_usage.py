"""The lines of a model card that sample with diffusers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest

from alignprop_cli.models.families import FAMILIES
from alignprop_cli.models.usage import snippet
from tests.flow_models import small_sd3

PLAIN = {"num_inference_steps": 4, "guidance_scale": 3.5, "height": 64, "width": 32}


def call_of(pipeline_class: str, sample: dict[str, Any]) -> dict[str, ast.expr]:
    """Return the named arguments with which the pipeline is called."""
    lines = snippet("owner/model", pipeline_class, "owner/lora", sample)
    (image,) = ast.parse(lines[-1]).body
    assert isinstance(image, ast.Assign)
    # pipeline(...).images[0]
    calls = [n for n in ast.walk(image) if isinstance(n, ast.Call)]
    (call,) = [n for n in calls if ast.unparse(n.func) == "pipeline"]
    # Not by its place, where FLUX.2's pipeline takes an image.
    assert not call.args
    return {str(keyword.arg): keyword.value for keyword in call.keywords}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_argument_is_one_of_diffusers_pipeline(kind: str) -> None:
    sample = {**PLAIN, "negative_prompt": 'a "blurry" cat'}
    # Refused where guidance was distilled in, which is all of these models.
    if kind == "LatentConsistencyModelPipeline":
        sample["negative_prompt"] = ""
    if FAMILIES[kind].true_guidance:
        sample["true_guidance_scale"] = 2.0
    given = call_of(kind, sample)
    assert given.keys() <= inspect.signature(getattr(diffusers, kind).__call__).parameters.keys()
    scale = "true_cfg_scale" if kind == "QwenImagePipeline" else "guidance_scale"
    assert given.keys() >= {"prompt", scale, *PLAIN} - ({"guidance_scale"} - {scale})
    shown = " ".join(map(ast.unparse, given.values()))
    assert (repr(sample["negative_prompt"]) in shown) is bool(sample["negative_prompt"])


def test_two_branches_of_flux1_need_a_negative_prompt_though_it_is_empty() -> None:
    # `do_true_cfg = true_cfg_scale > 1 and has_neg_prompt` in diffusers' pipeline.
    given = call_of("FluxPipeline", {**PLAIN, "true_guidance_scale": 3.0, "negative_prompt": ""})
    assert ast.literal_eval(given["negative_prompt"]) == ""
    assert ast.literal_eval(given["true_cfg_scale"]) == 3.0
    assert "negative_prompt" not in call_of("FluxPipeline", {**PLAIN, "negative_prompt": ""})


def test_the_guidance_scale_of_qwen_image_has_another_name_and_needs_a_negative_prompt() -> None:
    given = call_of("QwenImagePipeline", {**PLAIN, "negative_prompt": ""})
    assert ast.literal_eval(given["true_cfg_scale"]) == 3.5
    assert ast.literal_eval(given["negative_prompt"]) == ""
    assert "guidance_scale" not in given
    # Without guidance too, since the pipeline's own scale is 4.
    given = call_of("QwenImagePipeline", {**PLAIN, "guidance_scale": 1.0, "negative_prompt": "x"})
    assert ast.literal_eval(given["true_cfg_scale"]) == 1.0


def test_a_negative_prompt_of_klein_is_encoded_by_its_pipeline() -> None:
    given = call_of("Flux2KleinPipeline", {**PLAIN, "negative_prompt": "blurry"})
    assert ast.unparse(given["negative_prompt_embeds"]) == "pipeline.encode_prompt('blurry')[0]"
    assert "negative_prompt_embeds" not in call_of("Flux2KleinPipeline", PLAIN)


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", None])
def test_a_pipeline_without_t5_is_loaded_without_it(kind: str | None, tmp_path: Path) -> None:
    base = str(small_sd3(tmp_path))
    for without_t5 in (True, False):
        lines = snippet(base, kind, "owner/lora", PLAIN, without_t5=without_t5)
        names: dict[str, Any] = {}
        # Up to the LoRA, which is on no hub.
        exec("\n".join(lines[:3]), names)
        assert (names["pipeline"].text_encoder_3 is None) is without_t5
        assert (names["pipeline"].tokenizer_3 is None) is without_t5


def test_weights_are_chosen_by_what_diffusers_takes() -> None:
    weights = {"revision": 'v1"', "variant": "fp16"}
    lines = snippet("owner/model", None, "owner/lora", PLAIN, weights=weights)
    (loaded,) = ast.parse(lines[2]).body
    assert isinstance(loaded, ast.Assign)
    assert isinstance(loaded.value, ast.Call)
    given = {str(k.arg): ast.literal_eval(k.value) for k in loaded.value.keywords}
    assert given == weights
    # `from_pretrained` takes anything by name; what it does with these is in its words.
    said = str(diffusers.DiffusionPipeline.from_pretrained.__doc__)
    assert all(f"{name} (`str`, *optional*" in said for name in weights)
