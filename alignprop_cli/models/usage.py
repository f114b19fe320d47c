"""How a LoRA is loaded and sampled with in diffusers, as lines of Python for a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Without a family diffusers finds the class in the model's own files.
_ANY = "DiffusionPipeline"


def snippet(
    base: str | None, pipeline_class: str | None, place: str, sample: Mapping[str, Any]
) -> list[str]:
    """Return lines of Python that sample an image with a LoRA.

    Args:
        base: Id of the base model; None where it is a folder of somebody's own.
        pipeline_class: Its pipeline in diffusers; None where it is not known.
        place: Folder or hub id of the LoRA.
        sample: Values of the `sample` section; may be incomplete.
    """
    kind = pipeline_class or _ANY
    # What the pipelines of all families take, by the names of the section.
    options: dict[str, Any] = {
        name: sample[name]
        for name in ("num_inference_steps", "guidance_scale", "height", "width")
        if sample.get(name) is not None
    }
    if sample.get("true_guidance_scale", 1.0) > 1.0:
        options["true_cfg_scale"] = sample["true_guidance_scale"]
    if sample.get("negative_prompt"):
        # As JSON, which Python reads alike: no quotation mark of the text ends it.
        options["negative_prompt"] = sample["negative_prompt"]
    arguments = [json.dumps("a prompt"), *(f"{n}={json.dumps(v)}" for n, v in options.items())]
    # Names go in as JSON too: a quotation mark in one ends nothing.
    return [
        f"from diffusers import {kind}",
        "",
        f"pipeline = {kind}.from_pretrained({json.dumps(base or 'FOLDER-OF-THE-BASE-MODEL')})",
        f"pipeline.load_lora_weights({json.dumps(place)})",
        f"image = pipeline({', '.join(arguments)}).images[0]",
    ]
