"""What the header of a file tells user interfaces: ModelSpec 1.0.1, and the least of kohya's keys.

ModelSpec should have an author and a date. Neither is known here: a date would make every file
another one. Source: https://github.com/Stability-AI/ModelSpec; kohya-ss/sd-scripts,
library/sai_model_spec.py and SS_METADATA_MINIMUM_KEYS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from alignprop_cli.lora.factors import Layers
from alignprop_cli.lora.names import NETWORKS
from alignprop_cli.lora.tensor_file import tensors_sha256
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.parsing import ParseError, read_json

_SPEC = "1.0.1"
# Whose code the names of the tensors follow.
_ORIGINAL, _DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"

# Names of architectures as kohya's sd-scripts and musubi-tuner write them, by the name in
# `published.PUBLISHED`.
_SD1, _SDXL = "stable-diffusion-v1", "stable-diffusion-xl-v1-base"
_KLEIN_4B, _KLEIN_9B = "Flux.2-klein-4b", "Flux.2-klein-9b"
_ARCHITECTURES = {
    "sd-1.5": _SD1,
    "lcm-dreamshaper-v7": _SD1,
    "sd-2.1": "stable-diffusion-v2-768-v",
    "sd-2.1-base": "stable-diffusion-v2-512",
    "sd-turbo": "stable-diffusion-v2-512",
    "sdxl": _SDXL,
    "sdxl-turbo": _SDXL,
    "sd-3-medium": "stable-diffusion-3-m",
    "sd-3.5-medium": "stable-diffusion-3-5-medium",
    "sd-3.5-large": "stable-diffusion-3-5-large",
    "flux.1-dev": "flux-1-dev",
    "flux.1-krea-dev": "flux-1-dev",
    "flux.1-schnell": "flux-1-schnell",
    "flux.2-klein-4b": _KLEIN_4B,
    "flux.2-klein-base-4b": _KLEIN_4B,
    "flux.2-klein-9b": _KLEIN_9B,
    "flux.2-klein-base-9b": _KLEIN_9B,
    "z-image-turbo": "Z-Image",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image",
    "krea-2-raw": "Krea-2",
    "krea-2-turbo": "Krea-2",
}
# Of any other model the layers show it: a U-Net by the width of the text embeddings that it attends
# to, a transformer by a part of a name that no other family has. The first match counts.
_BY_WIDTH = {768: _SD1, 1024: "stable-diffusion-v2", 2048: _SDXL}
_BY_NAME = {
    ".attn.to_qkv_mlp_proj": "Flux.2",
    "single_transformer_blocks.": "flux-1",
    ".attention.to_": "Z-Image",
    ".attn.to_gate": "Krea-2",
    ".attn2.": "stable-diffusion-3",
}
_UNKNOWN = "unknown"

# kohya's names of base models, by the beginning of the architecture.
_KOHYA = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl": "sdxl_base_v1-0",
    "stable-diffusion-3": "sd3",
    "flux-1": "flux1",
}


def architecture(layers: Layers, prefix: str, base_model: str | None) -> str:
    """Return ModelSpec's name of the base model of a LoRA; `unknown` where nothing shows it.

    Args:
        layers: The LoRA.
        prefix: One of `NETWORKS`.
        base_model: The id of the base model, if the file records it.
    """
    known = _ARCHITECTURES.get(PUBLISHED.get(base_model or "", ""))
    if known is not None:
        return known
    if prefix == NETWORKS[0]:
        ends = ("attn2.to_k", "attn2.to_v")
        widths = {factors.shape[1] for name, factors in layers.items() if name.endswith(ends)}
        return _BY_WIDTH.get(next(iter(widths), 0), _UNKNOWN) if len(widths) == 1 else _UNKNOWN
    # Which transformer it is shows in names that only one family has.
    found = (kind for part, kind in _BY_NAME.items() if any(part in name for name in layers))
    return next(found, _UNKNOWN)


def of_lora(
    layers: Layers,
    tensors: Mapping[str, Tensor],
    prefix: str,
    header: Mapping[str, str],
    title: str,
) -> dict[str, str]:
    """Return the texts for the header of a LoRA file; a function of its arguments alone.

    Args:
        layers: The LoRA.
        tensors: What is written of it.
        prefix: One of `NETWORKS`.
        header: The other texts of the header, from which base model and rewards are taken.
        title: What an interface shows.
    """
    kind = architecture(layers, prefix, header.get("alignprop.base_model"))
    digest = tensors_sha256(tensors)
    rewards = header.get("alignprop.rewards")
    made = "trained" if rewards else "made"
    found = {
        "modelspec.sai_model_spec": _SPEC,
        "modelspec.architecture": f"{kind}/lora",
        "modelspec.implementation": _ORIGINAL if prefix == NETWORKS[0] else _DIFFUSERS,
        "modelspec.title": title,
        "modelspec.description": f"LoRA {made} with alignprop"
        + (f" to raise {rewards.replace(',', ', ')}" if rewards else ""),
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        **_least_of_kohya(layers, kind),
    }
    if sources := _members(header.get("alignprop.merged_from")):
        found["modelspec.merged_from"] = sources
    return found


def of_model(kind: str, title: str, size: tuple[int, int], prediction: str) -> dict[str, str]:
    """Return the texts for the header of a whole model in the original layout.

    Args:
        kind: Its `architecture`.
        title: What an interface shows.
        size: (width, height) in pixels that it samples by itself.
        prediction: The scheduler's `prediction_type`.
    """
    found = {
        "modelspec.sai_model_spec": _SPEC,
        "modelspec.architecture": kind,
        "modelspec.implementation": _ORIGINAL,
        "modelspec.title": title,
        "modelspec.resolution": f"{size[0]}x{size[1]}",
        "modelspec.description": "merged with alignprop",
    }
    # Without a hash, for which the whole model would have to be in memory once more.
    known = {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction)
    return found | ({"modelspec.prediction_type": known} if known else {})


def _least_of_kohya(layers: Layers, kind: str) -> dict[str, str]:
    """Return kohya's least set of keys; all values are texts."""
    # Alpha as kohya counts it, whatever the scaling of the LoRA is called here.
    ranks = {factors.rank for factors in layers.values()}
    alphas = {factors.scaling * factors.rank for factors in layers.values()}
    base = next((name for start, name in _KOHYA.items() if kind.startswith(start)), kind)
    return {
        "ss_v2": str(base == "sd_v2"),
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        # kohya's word for a LoRA whose layers differ.
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
    }


def _members(merged_from: str | None) -> str | None:
    """Return the names of a soup's members, separated by commas, without their folders."""
    try:
        names = [Path(str(one["name"])).name for one in read_json(merged_from or "[]")]
    except (ParseError, LookupError, TypeError, ValueError):
        return None  # somebody else's
    return ", ".join(name.replace(",", " ") for name in names)
