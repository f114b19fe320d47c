"""The shipped configurations are those of the published models, where one could be seen.

The hub cannot be reached from the tests: what its pages showed is written down here, without the
keys that are diffusers' defaults. A row that is no page of the model itself says so.
"""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.models.defaults import own_sampling
from alignprop_cli.models.published import ARCHITECTURES, PUBLISHED

_FLOW = {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
_DYNAMIC = {**_FLOW, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
_DYNAMIC |= {"use_dynamic_shifting": True}

_STATIC = {"num_train_timesteps": 1000, "shift": 3.0}

# By folder of `ARCHITECTURES`: class, values.
SEEN: dict[str, tuple[str, dict[str, Any]]] = {
    # huggingface.co/black-forest-labs/FLUX.1-schnell, commits 64a3664 and 768d12a
    "flux.1-schnell": (
        "FlowMatchEulerDiscreteScheduler",
        {**_FLOW, "base_shift": 0.5, "max_shift": 1.15, "shift": 1.0}
        | {"use_dynamic_shifting": False},
    ),
    # A copy: huggingface.co/multimodalart/FLUX.1-dev2pro-full; max_shift also in
    # github.com/huggingface/diffusers/issues/10675, which quotes the model's own.
    "flux.1-dev": ("FlowMatchEulerDiscreteScheduler", _DYNAMIC),
    # A copy: github.com/smthemex/ComfyUI_DyPE, Flux/FLUX.1-Krea-dev, f8489fe.
    "flux.1-krea-dev": ("FlowMatchEulerDiscreteScheduler", _DYNAMIC),
    # A copy of klein 9B's: github.com/DenOfEquity/ersatzForge, backend/huggingface, fca12a2. Its
    # copy of 4B's has all of these but a shift of 2.02, which is not read beside dynamic shifting:
    # the pipelines compute the shift. Of the base models none was seen; FLUX.2-dev's is the same
    # too (huggingface.co/diffusers/FLUX.2-dev-bnb-4bit).
    **dict.fromkeys(
        ("flux.2-klein-4b", "flux.2-klein-9b", "flux.2-klein-base-4b", "flux.2-klein-base-9b"),
        ("FlowMatchEulerDiscreteScheduler", {**_DYNAMIC, "time_shift_type": "exponential"}),
    ),
    # A copy: huggingface.co/frankjoshua/stable-diffusion-3.5-medium, of the public release.
    "sd-3.5-medium": ("FlowMatchEulerDiscreteScheduler", _STATIC),
    # A copy: github.com/lllyasviel/stable-diffusion-webui-forge, backend/huggingface, 2d5b6ca.
    "sd-3.5-large": ("FlowMatchEulerDiscreteScheduler", _STATIC),
    # No page seen. "Noise scheduler stay exactly the same as in SD3 Medium", says
    # huggingface.co/blog/sd3-5 of 3.5 large.
    "sd-3-medium": ("FlowMatchEulerDiscreteScheduler", _STATIC),
    # A copy: huggingface.co/TensorStack/Z-Image-Turbo-ts
    "z-image-turbo": (
        "FlowMatchEulerDiscreteScheduler",
        {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
    ),
    # A model that was trained from it: huggingface.co/mcuo/Anime-Z
    "z-image": (
        "FlowMatchEulerDiscreteScheduler",
        {"num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False},
    ),
    # Copies: github.com/bghira/SimpleTuner, bc8e6ab; the shifts also in
    # github.com/kohya-ss/musubi-tuner, src/musubi_tuner/qwen_image/qwen_image_utils.py, 0b402d5.
    "qwen-image": (
        "FlowMatchEulerDiscreteScheduler",
        {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 8192}
        | {"base_shift": 0.5, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02}
        | {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
    ),
    # No page seen: both are gated. Raw's as trainers quote it, Turbo's as the tests of a port do.
    **dict.fromkeys(
        ("krea-2-raw", "krea-2-turbo"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {**_FLOW, "max_image_seq_len": 6400, "base_shift": 0.5, "max_shift": 1.15, "shift": 1.0}
            | {"shift_terminal": None, "use_dynamic_shifting": True}
            | {"time_shift_type": "exponential"},
        ),
    ),
    # huggingface.co/stabilityai/sdxl-turbo, commit 647e47a
    "sdxl-turbo": (
        "EulerAncestralDiscreteScheduler",
        {**_DIFFUSION, "timestep_spacing": "trailing", "steps_offset": 1},
    ),
    # huggingface.co/stabilityai/sd-turbo, commit a07e586
    "sd-turbo": (
        "EulerDiscreteScheduler",
        {**_DIFFUSION, "timestep_spacing": "trailing", "steps_offset": 1}
        | {"timestep_type": "discrete", "use_karras_sigmas": False},
    ),
    # huggingface.co/SimianLuo/LCM_Dreamshaper_v7, commit 4c51dea
    "lcm-dreamshaper-v7": (
        "LCMScheduler",
        {**_DIFFUSION, "original_inference_steps": 50, "set_alpha_to_one": True}
        | {"steps_offset": 0, "timestep_spacing": "leading", "rescale_betas_zero_snr": False},
    ),
}


@pytest.mark.parametrize("name", sorted(SEEN))
def test_a_shipped_schedule_is_the_published_one(name: str) -> None:
    kind, values = SEEN[name]
    file = ARCHITECTURES / name / "scheduler" / "scheduler_config.json"
    shipped = json.loads(file.read_text())
    assert shipped.pop("_class_name") == kind
    scheduler = getattr(diffusers, kind)
    # With what the class takes where nothing is given.
    found = {key: scheduler.from_config(shipped).config[key] for key in values}
    assert found == values


# Sizes of networks by folder and part. Those of Krea-dev and klein 9B are from the same copies; the
# transformers and text encoders of all four kleins also from github.com/filipstrand/mflux,
# src/mflux/models/common/config/model_config.py, 97ac5e6, the base models' from there alone.
_KLEIN: dict[str, Any] = {"guidance_embeds": False, "attention_head_dim": 128, "mlp_ratio": 3.0}
_KLEIN |= {"axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-06}
_KLEIN |= {"timestep_guidance_channels": 256}
_QWEN = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
_QWEN |= {"head_dim": 128, "vocab_size": 151936}
_FOUR = {
    "transformer": {**_KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
    | {"joint_attention_dim": 7680},
    "text_encoder": {**_QWEN, "hidden_size": 2560, "intermediate_size": 9728}
    | {"tie_word_embeddings": True},
}
_NINE = {
    "transformer": {**_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
    | {"joint_attention_dim": 12288},
    "text_encoder": {**_QWEN, "hidden_size": 4096, "intermediate_size": 12288}
    | {"tie_word_embeddings": False},
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "flux.1-krea-dev": {
        "transformer": {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38}
        | {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
        | {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
        "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
        "text_encoder_2": {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24}
        | {"num_heads": 64, "feed_forward_proj": "gated-gelu"},
        "vae": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        | {"block_out_channels": [128, 256, 512, 512], "force_upcast": True},
    },
    "flux.2-klein-4b": _FOUR,
    "flux.2-klein-base-4b": _FOUR,
    "flux.2-klein-9b": _NINE,
    "flux.2-klein-base-9b": _NINE,
}


@pytest.mark.parametrize(("name", "part"), [(n, part) for n in sorted(SIZES) for part in SIZES[n]])
def test_a_shipped_network_has_the_published_sizes(name: str, part: str) -> None:
    shipped = json.loads((ARCHITECTURES / name / part / "config.json").read_text())
    assert {key: shipped[key] for key in SIZES[name][part]} == SIZES[name][part]


# Of the 4-step kleins from their own page and a copy of 9B's (huggingface.co/ModelsLab). The base
# models leave the key out, which is False (a copy of 4B's: huggingface.co/YuCollection).
@pytest.mark.parametrize("name", ["klein-4b", "klein-9b", "klein-base-4b", "klein-base-9b"])
def test_the_four_step_kleins_alone_say_that_they_are_distilled(name: str) -> None:
    index = json.loads((ARCHITECTURES / f"flux.2-{name}" / "model_index.json").read_text())
    assert index["is_distilled"] is ("base" not in name)


def test_every_published_model_has_steps_and_guidance_of_its_own() -> None:
    without = {PUBLISHED[name] for name in PUBLISHED if own_sampling(ModelConfig(id=name)) is None}
    assert without == set()
    # Of distilled models no guidance is left.
    for name in ("flux.2-klein-4b", "flux.1-schnell", "z-image-turbo", "sdxl-turbo", "sd-turbo"):
        (hub_id,) = (hub_id for hub_id, place in PUBLISHED.items() if place == name)
        found = own_sampling(ModelConfig(id=hub_id))
        assert found is not None
        assert found[0] <= 8
        assert found[1] <= 1.0
