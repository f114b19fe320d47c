"""A base model without its weights: the same code on the meta device, to plan with.

Everything has its shape and no numbers, so nothing is downloaded for the published architectures,
whose configurations (numbers, no weights) are in `architectures/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from transformers import CLIPTextConfig, CLIPTextModel

from alignprop_cli import hub
from alignprop_cli.config import ModelConfig
from alignprop_cli.models.base import Conditioning
from alignprop_cli.models.registry import PUBLISHED, find
from alignprop_cli.models.sd import StableDiffusion

_SHIPPED = Path(__file__).parent / "architectures"


def outline(config: ModelConfig, dtype: torch.dtype, device_type: str) -> StableDiffusion:
    """Return the model that a configuration names, on the meta device.

    Args:
        config: The `model` section.
        dtype: Precision of the frozen weights.
        device_type: Where it will run: `cuda` or `cpu`.

    Raises:
        AssetError, ConfigError: As `registry.find` and `tile_decoder`; AssetError too if the
            configurations of an unknown model cannot be had.
    """
    model = build(_folder(config), dtype, config.id, device_type)
    model.tile_decoder(config.vae_tile_size)
    return model


def build(folder: Path, dtype: torch.dtype, name: str, device_type: str) -> StableDiffusion:
    """Return the model whose configurations are in a folder in diffusers format.

    Args:
        folder: With unet/, vae/, text_encoder/ and scheduler/; weights and tokenizer are not read.
        dtype: Precision of the frozen weights.
        name: What to call it.
        device_type: Where it will run: `cuda` or `cpu`.

    Raises:
        AssetError: If a configuration is missing or damaged.
    """
    with hub.loading("model.id", str(folder)), torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(folder, subfolder="unet")
        )
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    # Not their own `to`, which warns of modules that there are none of.
    pipeline = StableDiffusionPipeline(
        vae=torch.nn.Module.to(vae, dtype),
        text_encoder=torch.nn.Module.to(text_encoder, dtype),
        tokenizer=None,  # type: ignore[arg-type]
        unet=torch.nn.Module.to(unet, dtype),
        scheduler=scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    return StableDiffusion(pipeline, name, device_type)


def conditioning(model: StableDiffusion, batch_size: int) -> Conditioning:
    """Return embeddings of the right shape and no content for so many prompts."""
    text = model.pipeline.text_encoder.config
    shape = (batch_size, text.max_position_embeddings, text.hidden_size)
    embeds = torch.empty(shape, dtype=model.network.dtype, device=model.device)
    return Conditioning(embeds, embeds)


def _folder(config: ModelConfig) -> Path:
    """Return the folder of a model's configurations."""
    path = find(config)
    if path is None and config.id in PUBLISHED:
        return _SHIPPED / PUBLISHED[config.id]
    if path is not None and path.is_dir():
        return path
    if path is not None:
        return Path(config.config).expanduser() if config.config else _SHIPPED / "sd-1.5"
    with hub.loading("model.id", config.id):
        return Path(
            snapshot_download(config.id, revision=config.revision, allow_patterns="*/*.json")
        )
