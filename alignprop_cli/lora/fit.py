"""Whether a LoRA fits a network, by the names and shapes of its layers."""

from __future__ import annotations

import torch

from alignprop_cli.errors import ConfigError
from alignprop_cli.lora.files import Adapter


def check(network: torch.nn.Module, adapter: Adapter, model_id: str) -> None:
    """Refuse a LoRA whose layers do not fit this network.

    Raises:
        ConfigError: With the first layer that does not, and both shapes.
    """
    why = misfit(network, adapter)
    if why is not None:
        raise ConfigError(
            f"{adapter.file}: this LoRA does not belong to model {model_id}: {why}",
            hint="give the model it was trained on with --model",
        )


def misfit(network: torch.nn.Module, adapter: Adapter) -> str | None:
    """Return why a LoRA does not fit a network, which may be on the meta device; else None."""
    layers = dict(network.named_modules())
    for name, factors in adapter.layers.items():
        layer = layers.get(name)
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            return f"it has a layer {name}, which this model lacks"
        if layer.weight.shape[1] != factors.shape[1]:
            # Mostly the width of the text embeddings, in which SD 1.x and 2.x differ.
            channels = f"{layer.weight.shape[1]} channels here, {factors.shape[1]} there"
            return f"{name} takes {channels}"
        if tuple(layer.weight.shape) != factors.shape:
            return f"{name} is {tuple(layer.weight.shape)} here, {factors.shape} there"
    return None
