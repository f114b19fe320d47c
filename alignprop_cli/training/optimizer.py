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
    """What AdamW is told.

    Args:
        learning_rate: Its largest value.
        warmup_steps: Steps over which it rises linearly.
        decay_steps: N, steps after the warmup over which it falls linearly to 1 / N of itself;
            None keeps it.
        betas: Decay of the two moments.
        epsilon: Offset of the denominator.
        weight_decay: On the LoRA's weights.
        max_grad_norm: L2 norm to which the gradient is scaled down; None leaves it.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1.0e-8
    weight_decay: float = 1.0e-4
    max_grad_norm: float | None = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        It does not look at the number of steps of the run, so a run that is resumed with more steps
        is the run that had them from the start.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.decay_steps is None:
            return self.learning_rate
        done = min(step - self.warmup_steps, self.decay_steps - 1) / self.decay_steps
        return self.learning_rate * (1.0 - done)


class Optimizer:
    """AdamW over named parameters, with loss scaling where the network is in float16.

    Args:
        parameters: The LoRA's, by name, float32.
        settings: What AdamW is told.
        scaled: Whether the loss is scaled: gradients of a mean over many images are near 1e-7,
            below what float16 can hold.
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
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(listed[0].device.type, enabled=scaled)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def reduce_and_clip(self, accelerator: Accelerator) -> float:
        """Finish the gradient: sum over processes, undo the loss scale, clip to the largest norm.

        Returns:
            The L2 norm before clipping; infinite or NaN where it overflowed.
        """
        for parameter in self.parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if accelerator.num_processes > 1:
                gradient = cast(Tensor, accelerator.reduce(gradient, "sum"))
            parameter.grad = gradient
        self.scaler.unscale_(self.adamw)
        limit = self.settings.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def can_use(self, norm: float, step: int, seed: int) -> bool:
        """Return whether a gradient is finite, or the step is to be repeated with a smaller scale.

        Args:
            norm: Of the gradient.
            step: Counted from 0, for the message.
            seed: Of the run, for the message.

        Raises:
            RunError: If it is not finite and the loss scale is not to blame.
        """
        if math.isfinite(norm):
            return True
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1.0:
            self.scaler.update()
            return False
        raise RunError(
            f"step {step + 1}: the gradient is not finite (train.seed {seed}); nothing was updated "
            "in this step",
            hint="try fewer backpropagated steps, a lower train.learning_rate, or model.dtype "
            "bfloat16 or float32",
        )

    def step(self, number: int) -> float:
        """Update the parameters in a step, counted from 0, and return its learning rate."""
        rate = self.settings.learning_rate_at(number)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.scaler.step(self.adamw)
        self.scaler.update()
        return rate

    def state(self) -> dict[str, Tensor]:
        """Return a copy of everything that the next step depends on, on the CPU.

        Named `<parameter>.<step, exp_avg or exp_avg_sq>`, and `loss_scale` and `loss_scale_age`
        where the loss is scaled.
        """
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
        keys = ("step", "exp_avg", "exp_avg_sq")
        wanted = {f"{name}.{key}" for name in self.parameters for key in keys}
        found = state.keys() - {"loss_scale", "loss_scale_age"}
        shapes = all(
            state[f"{name}.{key}"].shape == parameter.shape
            for name, parameter in self.parameters.items()
            for key in keys[1:]
            if f"{name}.{key}" in found
        )
        if found != wanted or not shapes:
            raise RunError("the checkpoint's optimiser does not fit the LoRA of this run")
        for name, parameter in self.parameters.items():
            self.adamw.state[parameter] = {
                # AdamW in one kernel wants even its step count beside the parameter.
                key: state[f"{name}.{key}"].clone().to(parameter.device)
                for key in keys
            }
        if self.scaler.is_enabled() and "loss_scale" in state:
            scaler = self.scaler.state_dict()
            scaler["scale"] = float(state["loss_scale"])
            scaler["_growth_tracker"] = int(state["loss_scale_age"])
            self.scaler.load_state_dict(scaler)
