"""Which adapter serves which model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from alignprop_cli.config import ModelConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.models.base import DiffusionModel

TINY = Path(__file__).parent.parent / "tiny" / "pipeline"
"""The embedded model, in diffusers format."""

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd-1.5",
    "runwayml/stable-diffusion-v1-5": "sd-1.5",
    "CompVis/stable-diffusion-v1-4": "sd-1.5",
    "stabilityai/stable-diffusion-2-1": "sd-2.1",
    "stabilityai/stable-diffusion-2-1-base": "sd-2.1-base",
}
"""Which of the shipped architectures (models/architectures) a hub id has."""


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the frozen weights; `auto` depends on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def load_model(config: ModelConfig, device: torch.device) -> DiffusionModel:
    """Load the base model that the configuration names.

    Raises:
        AssetError: If a file is missing or damaged, or the hub cannot be reached or refuses.
        ConfigError: If the model is of a family that is not supported.
    """
    from alignprop_cli.models import loading

    return loading.load(config, find(config), device)


def find(config: ModelConfig) -> Path | None:
    """Return the local folder or file that a configuration names; None is a hub id.

    Raises:
        AssetError: If it looks like a path and is not there, or is no folder in diffusers format.
        ConfigError: If the model is of a family that is not supported.
    """
    path = TINY if config.id == "tiny" else Path(config.id).expanduser()
    if path.is_dir():
        _check_family(path)
    elif not path.exists() and _looks_like_a_path(config.id):
        raise AssetError(
            f"model.id: no such file or folder: {config.id}",
            hint="give a folder in diffusers format, a .safetensors file, or a hub id; "
            "`--preset tiny` works without any download",
        )
    return path if path.exists() else None


def _looks_like_a_path(name: str) -> bool:
    owner_and_name = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    return not owner_and_name or Path(name).suffix in {".safetensors", ".ckpt"}


def _check_family(path: Path) -> None:
    index = path / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(
            f"{path}: not a model in diffusers format: cannot read {index.name}",
            hint="the folder must hold model_index.json, unet/, vae/, text_encoder/, tokenizer/, "
            "scheduler/",
        ) from error
    if name != "StableDiffusionPipeline":
        raise ConfigError(
            f"model.id: {path} is a {name}; supported is StableDiffusionPipeline (1.x and 2.x)"
        )
