"""The trained weights in a network: put a LoRA in, list it, copy its weights out and in.

A layer's weight becomes W + (alpha / rank) B A, with A of shape
(rank, in), B of shape (out, rank), both float32 whatever the precision of W.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.errors import ConfigError, first_line
from alignprop_cli.lora.factors import adapter_settings, whole
from alignprop_cli.lora.files import Adapter

ADAPTER = "default"
P = ParamSpec("P")
R = TypeVar("R")


def inject(
    network: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    seed: int,
) -> list[torch.nn.Parameter]:
    """Put a fresh LoRA into the network; everything else is frozen.

    A is normal with standard deviation 1 / rank, B is zero: the network's output is unchanged.

    Args:
        network: Changed in place.
        rank: Columns of B.
        alpha: Numerator of the scaling.
        target_modules: Endings of the names of the layers to change, or one regular expression
            for their whole names.
        seed: Of A's values.

    Returns:
        The trainable parameters, float32, in a fixed order.

    Raises:
        ConfigError: If it names no layer, or something else than linear layers and convolutions.
    """
    network.requires_grad_(False)
    named = _as_peft_takes_it(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=whole(alpha),  # type: ignore[arg-type]
        target_modules=named,
        init_lora_weights="gaussian",
    )
    try:
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    except (ValueError, re.error) as error:
        raise _no_targets(named, error) from error
    # diffusers looks here before it saves, switches or unloads adapters.
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    for index, (name, parameter) in enumerate(_named(network)):
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            draw = rng.image_noise(seed, "lora", [(index,)], parameter.shape)[0]
            parameter.data.copy_(draw / rank)
    return trainable(network)


def _no_targets(named: list[str] | str, error: Exception) -> ConfigError:
    """Return what to tell the user for an error of peft about target modules."""
    if isinstance(error, re.error):
        return ConfigError(f"lora.target_modules: '{named}' is no regular expression: {error}")
    if "not supported" in str(error):
        # peft goes on to print the module and the list of all that it supports.
        return ConfigError(
            f"lora.target_modules: {named} names more than linear layers and convolutions: "
            f"{first_line(error).partition('(')[0]}"
        )
    what = "whole name fits the pattern" if isinstance(named, str) else "name ends with any of"
    return ConfigError(
        f"lora.target_modules: no layer of the model is found: no {what} {named}",
        hint="attention projections are to_q, to_k, to_v, to_out.0",
    )


def load(network: torch.nn.Module, adapter: Adapter, model_id: str) -> None:
    """Put the LoRA of a file into the network, float32 and frozen: exactly its layers.

    Args:
        network: Changed in place; carries no LoRA.
        adapter: As `files.read` returned it.
        model_id: What the user calls the model, for messages.

    Raises:
        ConfigError: If the network lacks a layer of the LoRA, or has it in another shape; then
            nothing is changed.
    """
    if is_present(network):
        raise ValueError("the network carries a LoRA already")
    _check_fits(network, adapter, model_id)
    # The file's own target modules are kept for the header of the next file, where they are right.
    targets = _as_peft_takes_it(adapter.target_modules or sorted(adapter.layers))
    if _selected(network, targets) != adapter.layers.keys():
        targets = sorted(adapter.layers)
    config = LoraConfig(**adapter_settings(adapter.layers), target_modules=targets)
    # With `state_dict` peft goes by its names alone, whatever target_modules would match.
    names = {f"{name}.lora_A.weight": factors.down for name, factors in adapter.layers.items()}
    inject_adapter_in_model(config, network, adapter_name=ADAPTER, state_dict=names)
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    network.requires_grad_(False)
    # peft makes them in the precision of the network, in which the file's numbers would be rounded.
    for name, factors in adapter.layers.items():
        layer = network.get_submodule(name)
        for half, value in (("lora_A", factors.down), ("lora_B", factors.up)):
            parameter = layer.get_submodule(half).get_parameter(f"{ADAPTER}.weight")
            parameter.data = value.to(parameter.device, torch.float32, copy=True)


def unload(network: torch.nn.Module) -> None:
    """Take the LoRA out of the network: the very layers from before are back."""
    for path, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        network.__dict__.pop(attribute, None)


def _as_peft_takes_it(target_modules: Sequence[str] | str) -> list[str] | str:
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def _selected(network: torch.nn.Module, target_modules: list[str] | str) -> set[str]:
    """Return the names of the modules that target modules mean in this network."""
    config = LoraConfig(target_modules=target_modules)
    return {n for n, _ in network.named_modules() if n and check_target_module_exists(config, n)}


def _check_fits(network: torch.nn.Module, adapter: Adapter, model_id: str) -> None:
    """Refuse a LoRA whose layers are not this network's, before anything is changed."""
    layers = dict(network.named_modules())
    for name, factors in adapter.layers.items():
        layer = layers.get(name)
        why = None
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            why = f"it has a layer {name}, which this model lacks"
        elif layer.weight.shape[1] != factors.shape[1]:
            channels = f"{layer.weight.shape[1]} channels here, {factors.shape[1]} there"
            why = f"{name} takes {channels}"
        elif tuple(layer.weight.shape) != factors.shape:
            why = f"{name} is {tuple(layer.weight.shape)} here, {factors.shape} there"
        if why is not None:
            raise ConfigError(
                f"{adapter.file}: this LoRA does not belong to model {model_id}: {why}",
                hint="give the model it was trained on with --model",
            )


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the LoRA's parameters in a fixed order."""
    return [parameter for _, parameter in _named(network)]


def named_trainable(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA's parameters by the names that `weights` gives them, ordered by name."""
    return {name.replace(f".{ADAPTER}.", "."): parameter for name, parameter in _named(network)}


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

    def around(self, call: Callable[P, R]) -> Callable[P, R]:
        """Return a function that is made of the same calls inside the block."""

        def merged(*arguments: P.args, **options: P.kwargs) -> R:
            with self:
                return call(*arguments, **options)

        return merged

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
