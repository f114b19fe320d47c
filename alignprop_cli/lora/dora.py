"""The start of a DoRA, whose layers run by peft's own code, and whether a network has one."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from alignprop_cli.lora.linear import ADAPTER


def start_magnitudes(network: torch.nn.Module) -> None:
    """Set the magnitudes of a fresh DoRA to the norms of the weights, in float32."""
    # peft takes the norms in the network's precision, whose rounding would change the output.
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_magnitude_vector:
            magnitude: Any = layer.lora_magnitude_vector[ADAPTER]
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            # The update is 0, as B is.
            magnitude.weight.data = magnitude.get_weight_norm(weight, 0.0, 1.0)


def is_present(network: torch.nn.Module) -> bool:
    """Return whether the network's LoRA is a DoRA."""
    layers = (layer for layer in network.modules() if isinstance(layer, LoraLayer))
    return any(ADAPTER in layer.lora_magnitude_vector for layer in layers)
