"""A base model without its weights: the same code on the meta device, to plan with.

Everything has its shape and no numbers. Nothing is downloaded for the published architectures,
whose configurations (numbers, no weights) are in `architectures/`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.models import loading
from alignprop_cli.models.base import MetaModel, Source
from alignprop_cli.models.families import ARCHITECTURES, PUBLISHED, find


def meta_model(config: ModelConfig, dtype: torch.dtype, device_type: str) -> MetaModel:
    """Return the model that a configuration names, on the meta device.

    Text encoders are not part of it: they are dropped before the network is loaded.

    Args:
        config: The `model` section.
        dtype: Precision of the frozen weights.
        device_type: Where it will run: `cuda` or `cpu`.

    Raises:
        AssetError: As `families.find`, or if the configurations of an unknown model cannot be had.
        ConfigError: If the model cannot be trained.
    """
    family, path = find(config)
    source = Source(config, _configurations(config, path), dtype)
    return family.on_meta(source, device_type)


def _configurations(config: ModelConfig, path: Path | None) -> Path:
    """Return the folder with the configurations of a model's parts."""
    if path is None:
        if config.id in PUBLISHED:
            return ARCHITECTURES / PUBLISHED[config.id]
        return loading.download_configurations(config)
    if path.is_dir():
        return path
    # A single file does not say; most are fine-tuned from Stable Diffusion 1.5.
    return Path(config.config).expanduser() if config.config else ARCHITECTURES / "sd-1.5"
