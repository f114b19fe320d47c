"""How a LoRA is loaded and sampled with in diffusers, as lines of Python for a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Without a family diffusers finds the class in the model's own files.
_ANY = "DiffusionPipeline"
# It takes the embeddings of a negative prompt and not its text.
_EMBEDS_ALONE = "Flux2KleinPipeline"
# Its guidance scale is that of two branches, and has the name of FLUX.1's.
_TRUE_SCALE = "QwenImagePipeline"


def snippet(
    base: str | None,
    pipeline_class: str | None,
    place: str,
    sample: Mapping[str, Any],
    *,
    without_t5: bool = False,
    weights: Mapping[str, str] | None = None,
) -> list[str]:
    """Return lines of Python that sample an image with a LoRA.

    Args:
        base: Id of the base model; None where it is a folder of somebody's own.
        pipeline_class: Its pipeline in diffusers; None where it is not known.
        place: Folder or hub id of the LoRA.
        sample: Values of the `sample` section; may be incomplete.
        without_t5: Whether the T5 of Stable Diffusion 3 is left out, as by `model.t5: none`.
        weights: `revision` and `variant` of the base model, where they were named.
    """
    kind = pipeline_class or _ANY
    # By name: the first argument of FLUX.2's pipeline is an image.
    options: dict[str, Any] = {"prompt": "a prompt"}
    # What the pipelines of all families take, by the names of the section.
    options |= {
        name: sample[name]
        for name in ("num_inference_steps", "guidance_scale", "height", "width")
        if sample.get(name) is not None
    }
    negative = sample.get("negative_prompt") or ""
    if sample.get("true_guidance_scale", 1.0) > 1.0:
        options["true_cfg_scale"] = sample["true_guidance_scale"]
    if kind == _TRUE_SCALE and "guidance_scale" in options:
        options["true_cfg_scale"] = options.pop("guidance_scale")
    # Without a negative prompt true_cfg_scale has no effect, so there an empty one is given too.
    if (negative or "true_cfg_scale" in options) and kind != _EMBEDS_ALONE:
        options["negative_prompt"] = negative
    # As JSON, which Python reads alike: no quotation mark of a text or a name ends it.
    arguments = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    if negative and kind == _EMBEDS_ALONE:
        encoded = f"pipeline.encode_prompt({json.dumps(negative)})[0]"
        arguments.append(f"negative_prompt_embeds={encoded}")
    loaded = json.dumps(base or "FOLDER-OF-THE-BASE-MODEL")
    loaded += "".join(f", {name}={json.dumps(v)}" for name, v in (weights or {}).items())
    loaded += ", text_encoder_3=None, tokenizer_3=None" if without_t5 else ""
    return [
        f"from diffusers import {kind}",
        "",
        f"pipeline = {kind}.from_pretrained({loaded})",
        f"pipeline.load_lora_weights({json.dumps(place)})",
        f"image = pipeline({', '.join(arguments)}).images[0]",
    ]
