"""The trained weights: inject a LoRA into a network, list it, copy it out and in.

The only importer of peft. A layer's weight becomes W + (alpha / rank) B A, with A of shape
(rank, in), B of shape (out, rank), both float32 whatever the precision of W.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.errors import ConfigError

ADAPTER = "default"


def inject(
    network: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int,
) -> list[torch.nn.Parameter]:
    """Put a fresh LoRA into the network; everything else is frozen.

    A is normal with standard deviation 1 / rank, B is zero: the network's output is unchanged.

    Args:
        network: Changed in place.
        rank: Columns of B.
        alpha: Numerator of the scaling.
        target_modules: Name endings of the layers to change.
        seed: Of A's values.

    Returns:
        The trainable parameters, float32, in a fixed order.

    Raises:
        ConfigError: If no layer's name ends so.
    """
    network.requires_grad_(False)
    # peft writes alpha as an integer elsewhere; a float of the same value would not round-trip.
    whole = int(alpha) if float(alpha).is_integer() else alpha
    config = LoraConfig(
        r=rank,
        lora_alpha=whole,  # type: ignore[arg-type]
        target_modules=list(target_modules),
        init_lora_weights="gaussian",
    )
    try:
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(
            f"lora.target_modules: no layer of the model ends with any of {list(target_modules)}",
            hint="attention projections are to_q, to_k, to_v, to_out.0",
        ) from error
    # diffusers looks here before it saves, switches or unloads adapters.
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    for index, (name, parameter) in enumerate(_named(network)):
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            draw = rng.image_noise(seed, "lora", [(index,)], parameter.shape)[0]
            parameter.data.copy_(draw / rank)
    return trainable(network)


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the LoRA's parameters in a fixed order."""
    return [parameter for _, parameter in _named(network)]


def make_trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Freeze everything but the LoRA that is loaded, and return its parameters as float32."""
    network.requires_grad_(False)
    for _, parameter in _named(network):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trainable(network)


def _named(network: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return sorted((n, p) for n, p in network.named_parameters() if ".lora_" in n)


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the LoRA's weights on the CPU, named as peft names them."""
    state: Mapping[str, Tensor] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def set_weights(network: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights, as `weights` returned them, into the LoRA of the network.

    Raises:
        ConfigError: If names or shapes differ from the LoRA that is injected.
    """
    have = {name: tuple(value.shape) for name, value in weights(network).items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if have != given:
        odd = sorted(
            name for name in have.keys() | given.keys() if have.get(name) != given.get(name)
        )
        raise ConfigError(
            f"the LoRA in the checkpoint does not fit this run: {len(odd)} tensors differ, "
            f"first {odd[0]}: {given.get(odd[0])} in the file, {have.get(odd[0])} in the run",
            hint="lora.rank, lora.target_modules and the model must be those of the checkpoint",
        )
    set_peft_model_state_dict(network, dict(state), adapter_name=ADAPTER)


def adapter_metadata(network: torch.nn.Module) -> dict[str, Any]:
    """Return the adapter's configuration as plain values, for the header of its file."""
    config = network.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr,index,operator]
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.loads(json.dumps(plain, default=str, sort_keys=True))


def norm(network: torch.nn.Module) -> float:
    """Return the L2 norm over all LoRA parameters; 0 where there is none."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in trainable(network)))


def is_present(network: torch.nn.Module) -> bool:
    """Return whether the network carries a LoRA."""
    return bool(_named(network))


@contextmanager
def disabled(network: torch.nn.Module):
    """Switch the LoRA off inside the block: the base model's output, exactly."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def set_strength(network: torch.nn.Module, strength: float) -> None:
    """Multiply the LoRA's update by a factor; 1 is as trained, 0 the base model."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            layer.set_scale(ADAPTER, strength)


class Merged:
    """The network with the LoRA added to its weights, for calls that carry no gradient.

    Inside the block each LoRA layer is replaced by its base layer with the weights
    W + (alpha / r) B A of the moment this object was made: the same output up to rounding, without
    the LoRA's own operations. Afterwards the very layers from before are back, bit for bit. The
    block may be entered many times.

    Nothing is replaced in half precision, where a small LoRA would vanish in the rounding of W, nor
    where the LoRA is switched off or is more than a product of two matrices (DoRA).

    Args:
        network: With a LoRA.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._layers: list[tuple[torch.nn.Module, str, torch.nn.Module, torch.nn.Module]] = []
        for path, layer in list(network.named_modules()):
            if not _mergeable(layer):
                continue
            parent, _, name = path.rpartition(".")
            base: torch.nn.Module = layer.get_base_layer()  # type: ignore[operator]
            weight = base.get_parameter("weight")
            with torch.no_grad():
                delta: Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[operator]
                # clone() keeps the memory layout.
                together = weight.detach().clone().add_(delta.to(weight.dtype))
            # A copy of the layer that shares everything but its weight.
            own = {id(p): p for p in base.parameters()}
            own[id(weight)] = torch.nn.Parameter(together, requires_grad=False)
            plain = copy.deepcopy(base, own)
            self._layers.append((network.get_submodule(parent), name, layer, plain))

    @property
    def bytes(self) -> int:
        """Return the memory of the weights that are held."""
        weights = (plain.get_parameter("weight") for *_, plain in self._layers)
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def __enter__(self) -> None:
        for parent, name, _, plain in self._layers:
            setattr(parent, name, plain)

    def __exit__(self, *exception: object) -> None:
        for parent, name, layer, _ in self._layers:
            setattr(parent, name, layer)


def _mergeable(layer: torch.nn.Module) -> bool:
    if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A or layer.lora_variant:
        return False
    dtype = layer.get_base_layer().get_parameter("weight").dtype
    off: bool = layer.disable_adapters  # type: ignore[attr-defined]
    return dtype in (torch.float32, torch.float64) and not off
