"""A base model without its weights: the same code on the meta device, to plan with.

Tensors have shapes and no values. For the published models nothing is downloaded: their
configurations are shipped in `architectures/`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.models import loading
from alignprop_cli.models.base import Family, MetaModel, Source
from alignprop_cli.models.families import find
from alignprop_cli.models.published import ARCHITECTURES, PUBLISHED
from alignprop_cli.paths import user_path

# The model that most single files of a family are fine-tuned from.
_FINE_TUNED_FROM = {
    "StableDiffusionPipeline": "sd-1.5",
    "StableDiffusionXLPipeline": "sdxl",
}


def meta_model(config: ModelConfig, dtype: torch.dtype) -> MetaModel:
    """Return the model that a configuration names, on the meta device.

    Text encoders are not part of it: they are dropped before the network is loaded.

    Args:
        config: The `model` section.
        dtype: Precision of the frozen weights.

    Raises:
        AssetError: As `families.find`, or if the configurations cannot be read or downloaded.
        ConfigError: If the model cannot be trained.
    """
    family, path = find(config)
    source = Source(config, _configurations(config, path, family), dtype)
    return family.on_meta(source)


def _configurations(config: ModelConfig, path: Path | None, family: Family) -> Path:
    """Return the folder with the configurations of a model's parts."""
    if path is None:
        if config.id in PUBLISHED:
            return ARCHITECTURES / PUBLISHED[config.id]
        return loading.download_configurations(config)
    if path.is_dir():
        return path
    # A single file holds no configuration, and most are fine-tuned from Stable Diffusion 1.5 or XL.
    # A wrong guess makes the estimate wrong, nothing else: the weights are loaded by other code.
    if config.config is not None:
        return user_path(config.config, "model.config")
    return ARCHITECTURES / _FINE_TUNED_FROM[family.pipeline_class]
