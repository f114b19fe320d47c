"""The optimiser of the LoRA: AdamW, its learning rate, loss scaling, and its state by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.errors import RunError


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and of its learning rate.

    Args:
        learning_rate: The largest learning rate.
        warmup_steps: Steps over which it rises linearly.
        decay_steps: N, steps after the warmup over which it falls linearly to 1 / N of the largest;
            None keeps it constant.
        betas: Decay of the two moments.
        epsilon: Offset of the denominator.
        weight_decay: Weight decay of the LoRA's weights.
        max_grad_norm: A gradient with a larger L2 norm is scaled down to it; None leaves all.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1.0e-8
    weight_decay: float = 1.0e-4
    max_grad_norm: float | None = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        # The number of steps of the run is not part of it: resumed with more steps, a run is the
        # same as one that had them from the start.
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.decay_steps is None:
            return self.learning_rate
        done = min(step - self.warmup_steps, self.decay_steps - 1) / self.decay_steps
        return self.learning_rate * (1.0 - done)


class Optimizer:
    """AdamW over named parameters, with loss scaling where the network is in float16.

    Args:
        parameters: The LoRA's parameters by name, float32.
        settings: Settings of AdamW.
        scaled: Whether the loss is scaled: the gradient of a mean over many images is near 1e-7,
            too small for float16.
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
        self.adamw = torch.optim.AdamW(
            listed,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            # One kernel for all parameters: a LoRA has hundreds of small ones.
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(listed[0].device.type, enabled=scaled)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad(set_to_none=True)

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
        self.scaler.unscale_(self.adamw)
        limit = self.settings.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def overflowed(self, norm: float) -> bool:
        """Return whether float16 overflowed, so that the step has to be repeated.

        Args:
            norm: Norm of the gradient.
        """
        if math.isfinite(norm) or not self.scaler.is_enabled() or self.scaler.get_scale() <= 1.0:
            return False
        # `unscale_` has found the overflow; `update` halves the scale.
        self.scaler.update()
        return True

    def skip(self) -> None:
        """Leave the parameters as they are: this step's gradient is not used."""
        if self.scaler.is_enabled():
            self.scaler.update()
        self.zero_grad()

    def is_finite(self) -> bool:
        """Return whether the parameters and both moments are finite; a sync point."""
        tensors = [p.detach() for p in self.parameters.values()]
        tensors += [v for state in self.adamw.state.values() for v in state.values()]
        # The largest magnitude: NaN and infinity stay what they are, and squares cannot overflow.
        return bool(torch.stack([t.abs().max().float() for t in tensors]).isfinite().all())

    def step(self, number: int) -> float:
        """Update the parameters; return the learning rate of this step, counted from 0."""
        rate = self.settings.learning_rate_at(number)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.scaler.step(self.adamw)
        self.scaler.update()
        return rate

    def state(self) -> dict[str, Tensor]:
        """Return a copy of everything that the next step depends on, on the CPU.

        The names are `<parameter>.<step, exp_avg or exp_avg_sq>`, and with loss scaling also
        `loss_scale` and `loss_scale_age`.
        """
        # By name rather than by index, as AdamW's own state_dict has it: independent of the order.
        tensors = {
            f"{name}.{key}": value.detach().cpu().clone()
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state[parameter].items()
        }
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors["loss_scale"] = torch.tensor(scaler["scale"], dtype=torch.float64)
            tensors["loss_scale_age"] = torch.tensor(scaler["_growth_tracker"])
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            RunError: If it belongs to other parameters.
        """
        # 1. Exactly the tensors of these parameters, in their shapes; nothing is loaded otherwise.
        keys = ("step", "exp_avg", "exp_avg_sq")
        wanted = {f"{name}.{key}" for name in self.parameters for key in keys}
        found = state.keys() - {"loss_scale", "loss_scale_age"}
        shapes = all(
            state[f"{name}.{key}"].shape == parameter.shape
            for name, parameter in self.parameters.items()
            for key in keys[1:]
            if f"{name}.{key}" in found
        )
        # There are none before the first update, as where all steps were skipped.
        if found and (found != wanted or not shapes):
            raise RunError("the checkpoint's optimiser does not fit the LoRA of this run")
        # 2. The moments. Fused AdamW needs the step count on the device of the parameter as well.
        for name, parameter in self.parameters.items() if found else ():
            self.adamw.state[parameter] = {
                key: state[f"{name}.{key}"].clone().to(parameter.device) for key in keys
            }
        # 3. The loss scale, which a run in another precision has not saved.
        if self.scaler.is_enabled() and "loss_scale" in state:
            scaler = self.scaler.state_dict()
            scaler["scale"] = float(state["loss_scale"])
            scaler["_growth_tracker"] = int(state["loss_scale_age"])
            self.scaler.load_state_dict(scaler)
