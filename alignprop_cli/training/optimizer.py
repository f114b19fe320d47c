"""The optimiser of the LoRA: update rule, rate, loss scale, average, and their state by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.config.train import OptimizerName
from alignprop_cli.errors import RunError
from alignprop_cli.planning.trained import state_bytes
from alignprop_cli.training import rules
from alignprop_cli.training.ema import Average
from alignprop_cli.training.rates import Rates
from alignprop_cli.training.rules import RuleSettings

_SCALE, _SCALE_AGE = "loss_scale", "loss_scale_age"
# The average of a parameter by its name and this, and how many updates are in it.
_AVERAGE, _AVERAGED = ".ema", "ema_updates"


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimiser.

    Args:
        rates: The learning rate of each step.
        kind: The update rule.
        rule: Its settings.
        max_grad_norm: A gradient with a larger L2 norm is scaled down to it; None leaves all.
        ema_decay: Of the average of the weights; None keeps none.
    """

    rates: Rates
    kind: OptimizerName = "adamw"
    rule: RuleSettings = field(default_factory=RuleSettings)
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None


class Optimizer:
    """An update rule over named parameters, with loss scaling where the network is in float16.

    Args:
        parameters: The LoRA's parameters by name, float32.
        settings: Settings of the rule, the learning rate and the average.
        scaled: Whether the loss is scaled: the gradient of a mean over many images is near 1e-7,
            too small for float16.

    Attributes:
        rule: The library's optimiser.
        average: The average of the parameters; None without one.

    Raises:
        AssetError, ConfigError: As `rules.make`.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        settings: OptimizerSettings,
        *,
        scaled: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        listed = list(self.parameters.values())
        self.rule: torch.optim.Optimizer = rules.make(settings.kind, listed, settings.rule)
        decay = settings.ema_decay
        self.average = None if decay is None else Average(self.parameters, decay)
        self.scaler = torch.amp.GradScaler(listed[0].device.type, enabled=scaled)
        # It has a scale from its first use on, and a first step without a finite image has no loss.
        self.scaler.scale(torch.zeros((), device=listed[0].device))
        # Before the present step made it smaller; None where it has not.
        self._scale_before: float | None = None

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that the rule will keep from its first update on, and does not yet."""
        numels = [parameter.numel() for parameter in self.parameters.values()]
        return 0 if self.rule.state else state_bytes(self.settings.kind, numels)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.rule.zero_grad(set_to_none=True)

    def reduce_and_clip(self, accelerator: Accelerator) -> float:
        """Finish the gradient: sum over processes, undo the loss scale, clip the norm.

        Returns:
            The L2 norm before clipping; infinite or NaN if the gradient overflowed.
        """
        # A sum: the loss was divided by the global batch already. A parameter without gradient gets
        # zeros, since all processes have to take part in each reduction.
        for parameter in self.parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if accelerator.num_processes > 1:
                gradient = cast(Tensor, accelerator.reduce(gradient, "sum"))
            parameter.grad = gradient
        self.scaler.unscale_(self.rule)
        limit = self.settings.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def overflowed(self, norm: float) -> bool:
        """Return whether float16 overflowed, so that the step has to be repeated.

        Args:
            norm: Norm of the gradient.
        """
        if math.isfinite(norm) or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1.0:
            return False
        if self._scale_before is None:
            self._scale_before = self.scaler.get_scale()
        # `unscale_` has found the overflow; `update` halves the scale.
        self.scaler.update()
        return True

    def skip(self) -> None:
        """Leave the parameters as they are: this step's gradient is not used."""
        if self.scaler.is_enabled():
            # No scale was right, so none is to blame: halved each time, it would take thousands of
            # steps to grow back, with gradients that float16 rounds to 0.
            self.scaler.update(self._scale_before or self.scaler.get_scale())
        self._scale_before = None
        self.zero_grad()

    def is_finite(self) -> bool:
        """Return whether the parameters, their average and the moments are finite; a sync point."""
        tensors = [p.detach() for p in self.parameters.values()]
        tensors += [] if self.average is None else self.average.values.values()
        kept = (value for state in self.rule.state.values() for value in state.values())
        tensors += [v for v in kept if isinstance(v, Tensor) and v.is_floating_point()]
        # The largest magnitude: NaN and infinity stay what they are, and squares cannot overflow.
        return bool(torch.stack([t.abs().max().float() for t in tensors]).isfinite().all())

    def step(self, number: int) -> float:
        """Update the parameters and their average.

        Returns:
            The learning rate of this step, counted from 0; with Prodigy times what it has found.
        """
        rate = self.settings.rates(number)
        for group in self.rule.param_groups:
            group["lr"] = rate
        self.scaler.step(self.rule)
        self.scaler.update()
        self._scale_before = None
        if self.average is not None:
            self.average.update()
        return rate * self.rule.param_groups[0].get("d", 1.0)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of everything that the next step depends on, on the CPU.

        The names are those of `rules.state_of`; with loss scaling also `loss_scale` and
        `loss_scale_age`, with an average `<parameter>.ema` and `ema_updates`.
        """
        tensors = rules.state_of(self.settings.kind, self.rule, self.parameters)
        if self.average is not None:
            for name, value in self.average.values.items():
                tensors[name + _AVERAGE] = value.cpu().clone()
            tensors[_AVERAGED] = torch.tensor(self.average.updates)
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors[_SCALE] = torch.tensor(scaler["scale"], dtype=torch.float64)
            tensors[_SCALE_AGE] = torch.tensor(scaler["_growth_tracker"])
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            RunError: If it belongs to other parameters.
        """
        kind = self.settings.kind
        # 1. Exactly the tensors of these parameters, in their shapes; nothing is loaded otherwise.
        averages = {} if self.average is None else {n: n + _AVERAGE for n in self.average.values}
        others = {_SCALE, _SCALE_AGE, _AVERAGED, *averages.values()}
        found = {name: value for name, value in state.items() if name not in others}
        whole = (_AVERAGED in state) == bool(averages) and all(
            key in state and state[key].shape == self.parameters[name].shape
            for name, key in averages.items()
        )
        # The rule keeps none before the first update, as where all steps were skipped.
        if not whole or (found and not rules.fits(kind, found, self.parameters)):
            raise RunError("the checkpoint's optimiser does not fit the LoRA of this run")
        # 2. The rule and the average.
        if found:
            rules.load_state(kind, self.rule, found, self.parameters)
        if self.average is not None:
            for name, key in averages.items():
                self.average.values[name].copy_(state[key])
            self.average.updates = int(state[_AVERAGED])
        # 3. The loss scale, which a run in another precision has not saved.
        if self.scaler.is_enabled() and _SCALE in state:
            scaler = self.scaler.state_dict()
            scaler["scale"] = float(state[_SCALE])
            scaler["_growth_tracker"] = int(state[_SCALE_AGE])
            self.scaler.load_state_dict(scaler)
