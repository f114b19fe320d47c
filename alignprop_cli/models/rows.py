"""One row per family of base models: everything that is named after it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from alignprop_cli.models.base import Family


def _from(module: str, name: str) -> Callable[..., Any]:
    """Return a stand-in for a function of a family's file, imported when it is first called."""
    # The file imports diffusers, which takes seconds; looking up a row does not need it.

    def call(*arguments: Any) -> Any:
        function = getattr(importlib.import_module(f"alignprop_cli.models.{module}"), name)
        return function(*arguments)

    return call


# As `schedulers.SCHEDULERS`, and diffusers' `timestep_spacing`.
_SCHEDULERS = ("ddim", "euler", "euler_ancestral", "lcm")
_SPACINGS = ("leading", "trailing", "linspace")

_STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipeline_class="StableDiffusionPipeline",
    lora_prefix="unet.",
    target_modules=("to_q", "to_k", "to_v", "to_out.0"),
    load_text_encoders=_from("unet", "load_text_encoders"),
    load_parts=_from("unet", "load_parts"),
    on_meta=_from("unet", "on_meta"),
    schedulers=_SCHEDULERS,
    spacings=_SPACINGS,
    single_files=True,
    taesd="madebyollin/taesd",
)

FAMILIES: dict[str, Family] = {
    family.pipeline_class: family
    for family in (
        _STABLE_DIFFUSION,
        # The same parts in a pipeline of another name.
        replace(
            _STABLE_DIFFUSION,
            name="latent consistency models of Stable Diffusion 1.x",
            pipeline_class="LatentConsistencyModelPipeline",
        ),
        Family(
            name="Stable Diffusion XL",
            pipeline_class="StableDiffusionXLPipeline",
            lora_prefix="unet.",
            target_modules=("to_q", "to_k", "to_v", "to_out.0"),
            load_text_encoders=_from("sdxl", "load_text_encoders"),
            load_parts=_from("sdxl", "load_parts"),
            on_meta=_from("sdxl", "on_meta"),
            schedulers=_SCHEDULERS,
            spacings=_SPACINGS,
            single_files=True,
            taesd="madebyollin/taesdxl",
        ),
        Family(
            name="Stable Diffusion 3 and 3.5",
            pipeline_class="StableDiffusion3Pipeline",
            lora_prefix="transformer.",
            target_modules=(
                *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
                *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
            ),
            load_text_encoders=_from("sd3", "load_text_encoders"),
            load_parts=_from("sd3", "load_parts"),
            on_meta=_from("sd3", "on_meta"),
            spacings=("linear",),
            taesd="madebyollin/taesd3",
            t5="optional",
        ),
        Family(
            name="FLUX.1",
            pipeline_class="FluxPipeline",
            lora_prefix="transformer.",
            # Those of diffusers' trainer and of Flow-GRPO (arXiv:2505.05470) on FLUX.1-dev. The
            # first three are in the single blocks too.
            target_modules=(
                *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
                *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
                *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            ),
            load_text_encoders=_from("flux1", "load_text_encoders"),
            load_parts=_from("flux1", "load_parts"),
            on_meta=_from("flux1", "on_meta"),
            spacings=("linear",),
            taesd="madebyollin/taef1",
            true_guidance=True,
            t5="needed",
        ),
        Family(
            name="FLUX.2-klein",
            pipeline_class="Flux2KleinPipeline",
            lora_prefix="transformer.",
            # Names of attention layers alone would miss the single blocks, most of the network; and
            # in the dual blocks to_out is a list of layers.
            target_modules=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
            load_text_encoders=_from("flux2", "load_text_encoders"),
            load_parts=_from("flux2", "load_parts"),
            on_meta=_from("flux2", "on_meta"),
            spacings=("linear",),
        ),
        Family(
            name="Z-Image",
            pipeline_class="ZImagePipeline",
            lora_prefix="transformer.",
            # Endings of names would also mean the refiners, which prepare noise and text for the
            # layers.
            target_modules=r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
            load_text_encoders=_from("zimage", "load_text_encoders"),
            load_parts=_from("zimage", "load_parts"),
            on_meta=_from("zimage", "on_meta"),
            guidance_origin="text",
            stack=_from("qwen", "stack"),
            spacings=("linear",),
            taesd="madebyollin/taef1",
        ),
        Family(
            name="Qwen-Image",
            pipeline_class="QwenImagePipeline",
            lora_prefix="transformer.",
            # Those of diffusers' trainer; the prompt's own projections are not among them.
            target_modules=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            load_text_encoders=_from("qwen_image", "load_text_encoders"),
            load_parts=_from("qwen_image", "load_parts"),
            on_meta=_from("qwen_image", "on_meta"),
            guidance_rescale=_from("qwen_image", "rescale_to_text"),
            stack=_from("qwen", "stack"),
            spacings=("linear",),
        ),
        Family(
            name="Krea 2",
            pipeline_class="Krea2Pipeline",
            lora_prefix="transformer.",
            # Endings of names would also mean the text fusion, whose blocks would then store what
            # they make of 12 states of every token.
            target_modules=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)",
            load_text_encoders=_from("krea2", "load_text_encoders"),
            load_parts=_from("krea2", "load_parts"),
            on_meta=_from("krea2", "on_meta"),
            guidance_origin="text",
            stack=_from("qwen", "stack"),
            spacings=("linear",),
        ),
    )
}
"""All families, by the class of their pipeline in diffusers."""
