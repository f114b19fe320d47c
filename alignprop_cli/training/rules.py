"""The update rules: AdamW of torch, 8-bit AdamW of bitsandbytes, and Prodigy of prodigyopt.

Each is its library's own optimiser. What is said here of it is how it is made, and what it keeps
from step to step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignprop_cli.config.train import OptimizerName
from alignprop_cli.errors import AssetError, ConfigError, first_line
from alignprop_cli.planning.trained import SMALLEST_8BIT

Parameters = Sequence[torch.nn.Parameter]
Shape = tuple[int, ...]
_HINT = "pip install 'alignprop[optimizers]', or leave train.optimizer at adamw"


@dataclass(frozen=True)
class RuleSettings:
    """Settings of an update rule.

    Args:
        betas: Decay of the two moments.
        epsilon: Offset of the denominator.
        weight_decay: Decoupled, on the LoRA's weights.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1.0e-8
    weight_decay: float = 1.0e-4


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Args:
        build: Makes the optimiser of some parameters, with a learning rate that `step` replaces.
        kept: The tensors that it keeps of a parameter, by name, each with the shapes it may have.
            `step`, the number of updates, comes on top.
        package: What has to be installed.
        common: Names of the numbers that it keeps of all parameters together.
        constants: Tensors of a parameter's state that are the same in every run.
    """

    build: Callable[[Parameters, RuleSettings], torch.optim.Optimizer]
    kept: Callable[[torch.nn.Parameter], Mapping[str, Sequence[Shape]]]
    package: str | None = None
    common: tuple[str, ...] = ()
    constants: Callable[[torch.optim.Optimizer, Tensor], dict[str, Tensor]] = field(
        default=lambda optimizer, parameter: {}
    )


def check(name: OptimizerName) -> None:
    """Refuse an update rule whose package is missing.

    Raises:
        AssetError: With what to install.
    """
    package = RULES[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise AssetError(
            f"train.optimizer: {name} needs {package}, which is not installed", hint=_HINT
        )


def advice(name: OptimizerName, learning_rate: float) -> str | None:
    """Return a warning about a learning rate that can hardly be meant; None where there is none."""
    if name != "prodigy" or learning_rate >= 0.1:
        return None
    return (
        f"train.learning_rate is {learning_rate:g}: Prodigy finds the rate by itself, and "
        "multiplies it by this number: usually 1"
    )


def make(name: OptimizerName, parameters: Parameters, settings: RuleSettings) -> Any:
    """Return the optimiser of some parameters, after trying it on their device.

    Raises:
        AssetError: If its package is missing or cannot be loaded.
        ConfigError: If it does not work on the device.
    """
    check(name)
    rule, device = RULES[name], parameters[0].device
    if rule.package is not None:
        # Large enough for 8 bits. On some devices its kernels are missing, or fail when they run.
        tried = torch.nn.Parameter(torch.ones(SMALLEST_8BIT, device=device))
        tried.grad = torch.ones_like(tried)
        try:
            rule.build([tried], settings).step()
        except (ImportError, OSError) as error:
            raise AssetError(
                f"train.optimizer: {rule.package} cannot be loaded: {first_line(error)}", hint=_HINT
            ) from error
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"train.optimizer: {name} does not work on {device}: {first_line(error)}",
                hint="adamw works everywhere",
            ) from error
    return rule.build(parameters, settings)


def state_of(
    name: OptimizerName, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return copies of all that an optimiser keeps, on the CPU.

    Args:
        name: The rule.
        optimizer: Its optimiser.
        parameters: Its parameters by name.

    Returns:
        `<parameter>.<name>` of each tensor, and the rule's common numbers as `<rule>.<name>`.
    """
    # By name rather than by index, as torch's own state_dict has it: independent of the order.
    tensors: dict[str, Tensor] = {}
    for key, parameter in parameters.items():
        constant = RULES[name].constants(optimizer, parameter)
        for part, value in optimizer.state[parameter].items():
            if part not in constant:
                tensors[f"{key}.{part}"] = torch.as_tensor(value).detach().cpu().clone()
    group = optimizer.param_groups[0]
    for part in RULES[name].common if tensors else ():
        kind = torch.int64 if isinstance(group[part], int) else torch.float64
        tensors[f"{name}.{part}"] = torch.tensor(group[part], dtype=kind)
    return tensors


def fits(
    name: OptimizerName, state: Mapping[str, Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> bool:
    """Return whether `state` is the whole state of these parameters under this rule."""
    shapes = {
        f"{key}.{part}": allowed
        for key, parameter in parameters.items()
        for part, allowed in {**RULES[name].kept(parameter), "step": [()]}.items()
    }
    shapes |= {f"{name}.{part}": [()] for part in RULES[name].common}
    return state.keys() == shapes.keys() and all(
        tuple(state[key].shape) in allowed for key, allowed in shapes.items()
    )


def load_state(
    name: OptimizerName,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
) -> None:
    """Continue from what `state_of` returned, which `fits`."""
    rule = RULES[name]
    for key, parameter in parameters.items():
        # torch's AdamW keeps its count as a tensor, fused AdamW on the parameter's device; the
        # others keep numbers, which were saved as integers.
        found: dict[str, Any] = {
            part: state[f"{key}.{part}"].clone().to(parameter.device)
            for part in (*rule.kept(parameter), "step")
        }
        if found["step"].dtype == torch.int64:
            found["step"] = int(found["step"])
        optimizer.state[parameter] = {**found, **rule.constants(optimizer, parameter)}
    for part in rule.common:
        for group in optimizer.param_groups:
            group[part] = state[f"{name}.{part}"].item()


def _adamw(parameters: Parameters, settings: RuleSettings) -> torch.optim.Optimizer:
    # One kernel for all parameters: a LoRA has hundreds of small ones.
    return torch.optim.AdamW(
        list(parameters),
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _adamw8bit(parameters: Parameters, settings: RuleSettings) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(
        list(parameters),
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        min_8bit_size=SMALLEST_8BIT,
    )


def _prodigy(parameters: Parameters, settings: RuleSettings) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

    # The two switches are what its authors recommend for diffusion models. It prints a line, and
    # standard output is for the result.
    with contextlib.redirect_stdout(io.StringIO()):
        return Prodigy(
            list(parameters),
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )


def _kept_by_adamw(parameter: torch.nn.Parameter) -> dict[str, list[Shape]]:
    shape = tuple(parameter.shape)
    return {"exp_avg": [shape], "exp_avg_sq": [shape]}


def _kept_by_adamw8bit(parameter: torch.nn.Parameter) -> dict[str, list[Shape]]:
    shape, blocks = tuple(parameter.shape), math.ceil(parameter.numel() / 256)
    kept: dict[str, list[Shape]] = {"state1": [shape], "state2": [shape]}
    scales: dict[str, list[Shape]] = {"absmax1": [(blocks,)], "absmax2": [(blocks,)]}
    return kept | scales if parameter.numel() >= SMALLEST_8BIT else kept


def _kept_by_prodigy(parameter: torch.nn.Parameter) -> dict[str, list[Shape]]:
    # Of a parameter that was all zeros at first, as B is, it keeps a single 0.
    flat = (parameter.numel(),)
    return {**_kept_by_adamw(parameter), "s": [flat], "p0": [flat, ()]}


def _levels(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Return the values that the 8 bits of the two moments stand for."""
    if parameter.numel() < SMALLEST_8BIT:
        return {}
    names = {"qmap1": "dynamic", "qmap2": "udynamic"}
    return {key: optimizer.name2qmap[name].to(parameter.device) for key, name in names.items()}


RULES: Mapping[OptimizerName, Rule] = {
    "adamw": Rule(_adamw, _kept_by_adamw),
    "adamw8bit": Rule(_adamw8bit, _kept_by_adamw8bit, "bitsandbytes", constants=_levels),
    "prodigy": Rule(
        _prodigy,
        _kept_by_prodigy,
        "prodigyopt",
        common=("d", "d_max", "d_numerator", "k"),
    ),
}
"""The update rules by name."""
