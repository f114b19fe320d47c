"""A LoRA in a network: put it in, take it out, merge it, read and write its weights.

A layer's weight becomes W + (alpha / rank) B A, with A of shape (rank, in) and B of shape
(out, rank), both in float32 whatever the precision of W. rsLoRA and DoRA: see factors.py.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from alignprop_cli.lora import fit
from alignprop_cli.lora.dora import start_magnitudes
from alignprop_cli.lora.factors import adapter_settings, whole
from alignprop_cli.lora.files import Adapter
from alignprop_cli.lora.linear import ADAPTER, LoraLinear, take_over
from alignprop_cli.lora.settings import is_quick
from alignprop_cli.models.quantized import QuantizedLinear

ALL_LINEAR = "all-linear"
"""Instead of names of layers: every linear layer of the network."""

P = ParamSpec("P")
R = TypeVar("R")


def inject(
    network: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    seed: int,
    rslora: bool = False,
    dora: bool = False,
) -> list[torch.nn.Parameter]:
    """Put a fresh LoRA into the network; everything else is frozen.

    A is normal with standard deviation 1 / rank, B is zero, and the magnitudes of a DoRA are those
    of the weights: the network's output is unchanged.

    Args:
        network: Changed in place.
        rank: Rows of A and columns of B.
        alpha: Numerator of the scaling.
        target_modules: Endings of the names of the layers to change, one regular expression for
            their whole names, or `all-linear`.
        seed: Seed of A's values.
        rslora: Whether the scaling is alpha / sqrt(rank).
        dora: Whether it is a DoRA.

    Returns:
        The trainable parameters, float32, in a fixed order.

    Raises:
        ConfigError: If `target_modules` names no layer, or anything but linear layers and
            convolutions.
    """
    network.requires_grad_(False)
    # To plan with: there are no values to draw.
    on_meta = all(parameter.is_meta for parameter in network.parameters())
    # Not left to peft, which keeps the short name in the header: other readers do not know it.
    is_short = target_modules == ALL_LINEAR
    named = _all_linear(network) if is_short else _as_peft_takes_it(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=whole(alpha),  # type: ignore[arg-type]
        target_modules=named,
        init_lora_weights=False if on_meta else "gaussian",
        use_rslora=rslora,
        use_dora=dora,
    )
    try:
        inject_adapter_in_model(config, network, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta)
    except (ValueError, re.error) as error:
        raise _no_targets(named, error) from error
    # diffusers reads this flag before it saves, switches or unloads adapters.
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    start_magnitudes(network)
    _draw(network, rank, seed)
    take_over(network)
    return trainable(network)


def _draw(network: torch.nn.Module, rank: int, seed: int) -> None:
    """Make the LoRA float32, and draw A's values anew, keyed by the index of the parameter."""
    # peft draws them from the global generator, in the network's precision.
    for index, (name, parameter) in enumerate(_named(network)):
        parameter.data = parameter.data.float()
        if ".lora_A." in name and not parameter.is_meta:
            draw = rng.image_noise(seed, "lora", [(index,)], parameter.shape)[0]
            parameter.data.copy_(draw / rank)


def _all_linear(network: torch.nn.Module) -> list[str]:
    """Return the names of all linear layers."""
    return [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]


def _no_targets(named: list[str] | str, error: Exception) -> ConfigError:
    """Return the error to show for peft's error about target modules."""
    if isinstance(error, re.error):
        return ConfigError(f"lora.target_modules: '{named}' is no regular expression: {error}")
    if "not supported" in str(error):
        # After the bracket peft prints the module and the list of everything it supports.
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
    """Put the LoRA of a file into the network, float32 and frozen: exactly the file's layers.

    Args:
        network: Changed in place; has no LoRA yet.
        adapter: As `files.read` returned it.
        model_id: The model's id as the user gave it, for messages.

    Raises:
        ConfigError: If the network lacks a layer of the LoRA or has it in another shape. Nothing is
            changed then.
    """
    if is_present(network):
        raise ValueError("the network has a LoRA already")
    fit.check(network, adapter, model_id)
    # 1. Which layers. The file's own target modules are short and go into the header of the next
    #    file; they are kept only if in this network they mean exactly the layers of the file.
    targets = _as_peft_takes_it(adapter.target_modules or sorted(adapter.layers))
    slow = isinstance(targets, str) and not is_quick(targets)
    if slow or _selected(network, targets) != adapter.layers.keys():
        targets = sorted(adapter.layers)
    config = LoraConfig(**adapter_settings(adapter.layers), target_modules=targets)
    # 2. The injection. With `state_dict` peft changes the layers that it names and no others.
    names = {f"{name}.lora_A.weight": factors.down for name, factors in adapter.layers.items()}
    inject_adapter_in_model(config, network, adapter_name=ADAPTER, state_dict=names)
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    network.requires_grad_(False)
    # 3. The values. peft creates the factors in the network's precision, which may round the file's
    #    numbers, so they are replaced as a whole.
    for name, factors in adapter.layers.items():
        layer = network.get_submodule(name)
        parts = {"lora_A": factors.down, "lora_B": factors.up}
        if factors.magnitude is not None:
            parts["lora_magnitude_vector"] = factors.magnitude
        for part, value in parts.items():
            parameter = layer.get_submodule(part).get_parameter(f"{ADAPTER}.weight")
            parameter.data = value.to(parameter.device, torch.float32, copy=True)
    take_over(network)


def unload(network: torch.nn.Module) -> None:
    """Take the LoRA out of the network and put the original layers back."""
    for path, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, layer.get_base_layer())
    # What peft and diffusers left on the network itself.
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        network.__dict__.pop(attribute, None)


def _as_peft_takes_it(target_modules: Sequence[str] | str) -> list[str] | str:
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def _selected(network: torch.nn.Module, target_modules: list[str] | str) -> set[str]:
    """Return the names of the modules of this network that `target_modules` means."""
    config = LoraConfig(target_modules=target_modules)
    return {n for n, _ in network.named_modules() if n and check_target_module_exists(config, n)}


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the LoRA's parameters in a fixed order."""
    return [parameter for _, parameter in _named(network)]


def named_trainable(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA's parameters by the names that `weights` uses, ordered by name."""
    return {name.replace(f".{ADAPTER}.", "."): parameter for name, parameter in _named(network)}


def make_trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Freeze everything but the loaded LoRA, and return its parameters, which become float32."""
    network.requires_grad_(False)
    for _, parameter in _named(network):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trainable(network)


def _named(network: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    # Sorted, since the order decides the seeds of A's values and must not depend on peft.
    return sorted((n, p) for n, p in network.named_parameters() if ".lora_" in n)


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the LoRA's weights on the CPU, named as peft names them."""
    state: Mapping[str, Tensor] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def set_weights(network: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights, as `weights` returned them, into the LoRA of the network.

    Raises:
        ConfigError: If names or shapes differ from those of the network's LoRA.
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
    # Sets in a fixed order, and enums as texts, so that the same LoRA gives the same header.
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.loads(json.dumps(plain, default=str, sort_keys=True))


def norm(network: torch.nn.Module) -> float:
    """Return the L2 norm over all LoRA parameters; 0 where there is none."""
    # On the CPU: not every device has float64.
    weights = (p.detach().cpu().double() for p in trainable(network))
    return math.sqrt(sum(float(weight.square().sum()) for weight in weights))


def is_present(network: torch.nn.Module) -> bool:
    """Return whether the network has a LoRA."""
    return bool(_named(network))


@contextmanager
def disabled(network: torch.nn.Module):
    """Switch the LoRA off inside the block: the base model's output, exactly."""
    # peft's `enable_adapters` also freezes the parameters, which may be in a graph just then.
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def set_strength(network: torch.nn.Module, strength: float) -> None:
    """Set the factor on the LoRA's update; 1 is as trained, 0 the base model."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            layer.set_scale(ADAPTER, strength)


class Merged:
    """The network with the LoRA merged into its weights, for calls without gradient.

    Inside the block each LoRA layer is replaced by a plain one whose weight is W + (alpha / r) B A
    as it was when this object was created. The output is the same up to rounding, without the
    LoRA's own operations. After the block the original layers are back, bit for bit. The block can
    be entered many times.

    A layer stays as it is in half precision, where a small update would vanish in the rounding of
    W; where W is held in fewer bits; and where the LoRA is switched off or is more than a product
    of two matrices (DoRA).

    Args:
        network: A network with a LoRA.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._layers: list[tuple[torch.nn.Module, str, torch.nn.Module, torch.nn.Module]] = []
        for path, layer in list(network.named_modules()):
            if not _mergeable(layer):
                continue
            parent, _, name = path.rpartition(".")
            base: torch.nn.Module = layer.get_base_layer()  # type: ignore[operator]
            # 1. The merged weight; clone() keeps the memory layout, on which the speed depends.
            weight = base.get_parameter("weight")
            with torch.no_grad():
                delta: Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[operator]
                together = weight.detach().clone().add_(delta.to(weight.dtype))
            # 2. A copy of the layer that shares everything but the weight: deepcopy takes what is
            #    in its memo instead of copying.
            memo = {id(p): p for p in base.parameters()}
            memo[id(weight)] = torch.nn.Parameter(together, requires_grad=False)
            plain = copy.deepcopy(base, memo)
            self._layers.append((network.get_submodule(parent), name, layer, plain))
        self._linear = _linear(network)
        casts = (tensor for layer in self._linear for tensor in layer.casts)
        self._casts = sum(tensor.numel() * tensor.element_size() for tensor in casts)

    @property
    def is_empty(self) -> bool:
        """Return whether no layer is merged."""
        return not self._layers

    @property
    def bytes(self) -> int:
        """Return the bytes of the merged weights, and of factors that are cast meanwhile."""
        weights = (plain.get_parameter("weight") for *_, plain in self._layers)
        return sum(weight.numel() * weight.element_size() for weight in weights) + self._casts

    def around(self, call: Callable[P, R]) -> Callable[P, R]:
        """Return a function that makes the same call inside the block."""

        def merged(*arguments: P.args, **options: P.kwargs) -> R:
            with self:
                return call(*arguments, **options)

        return merged

    def __enter__(self) -> None:
        for layer in self._linear:
            layer.rounded = True
        for parent, name, _, plain in self._layers:
            setattr(parent, name, plain)

    def __exit__(self, *exception: object) -> None:
        for parent, name, layer, _ in self._layers:
            setattr(parent, name, layer)
        for layer in self._linear:
            layer.rounded = False


@contextmanager
def prepared(network: torch.nn.Module) -> Iterator[Merged]:
    """Make all calls inside the block cheaper; the LoRA must not change meanwhile.

    What can be merged is merged for calls without gradient. Where it cannot, in half precision, the
    factors are cast once instead of in every call.
    """
    for layer in _linear(network):
        layer.prepare()
    yield Merged(network)


def addresses(network: torch.nn.Module) -> tuple[int, ...]:
    """Return where the memory begins that the network's calls read: weights, LoRA and its casts."""
    casts = (tensor for layer in _linear(network) for tensor in layer.casts)
    return tuple(t.data_ptr() for t in (*network.parameters(), *network.buffers(), *casts))


def _linear(network: torch.nn.Module) -> list[LoraLinear]:
    return [layer for layer in network.modules() if isinstance(layer, LoraLinear)]


def _mergeable(layer: torch.nn.Module) -> bool:
    # `lora_variant` holds what is more than a product, such as DoRA.
    if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A or layer.lora_variant:
        return False
    base = layer.get_base_layer()
    # A merged weight would have to be held in full.
    if isinstance(base, QuantizedLinear):
        return False
    dtype = base.get_parameter("weight").dtype
    off: bool = layer.disable_adapters  # type: ignore[attr-defined]
    return dtype in (torch.float32, torch.float64) and not off
