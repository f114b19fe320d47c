"""peft's LoRA of a linear layer, with fewer operators and without a float32 copy of its input.

In half precision peft casts the input to float32, multiplies it by A and B, scales, adds and casts
back: six operators a layer, and autograd keeps the copy of every input for backward. Here calls of
the roll-out take two, in the precision of the layer. Calls with gradient compute in float32 what
peft does, and keep the input itself. A weight that is held in fewer bits is unpacked for each
product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignprop_cli.models.quantized import How, QuantizedLinear, unpack

ADAPTER = "default"
"""peft's name for the only adapter that a network has here."""


class LoraLinear(Linear):
    """peft's layer with another `forward`; everything else of it stays as it is.

    y = x W^T + b + s x A^T B^T with s = alpha / rank. A and B are float32, as are the products with
    them and their gradients, whatever the precision of W. Where `rounded`, A and s B are rounded to
    the precision of W and so are the products: for calls without gradient, which are most.
    """

    rounded = False
    _casts: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output. Differentiable in x and in the factors."""
        base = cast(torch.nn.Linear, self.base_layer)
        held = _held(base)
        usual = args or kwargs or self.disable_adapters or self.merged_adapters
        if usual or x.dtype != self._dtype or held[0].requires_grad:
            return super().forward(x, *args, **kwargs)
        if self.rounded and self._casts is not None and not torch.is_grad_enabled():
            down, up = self._casts
            out = torch.nn.functional.linear(x, unpack(*held, x.dtype), base.bias)
            # Into the output that was just made: one operator, and no memory.
            out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down.T, up.T)
            return out
        factors = (half[ADAPTER].weight for half in (self.lora_A, self.lora_B))
        scale = self.scaling[ADAPTER]
        return cast(Tensor, _Product.apply(x, base.bias, *factors, scale, *held))

    @property
    def _dtype(self) -> torch.dtype:
        base = cast(torch.nn.Linear, self.base_layer)
        return base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype

    def prepare(self) -> None:
        """Round the factors now, for all calls while `rounded`; they must not change meanwhile."""
        dtype = self._dtype
        down, up = (
            cast(Tensor, half[ADAPTER].weight).detach() for half in (self.lora_A, self.lora_B)
        )
        if down.dtype == dtype:
            return
        # Scaled first, so that the product is rounded once.
        scale = self.scaling[ADAPTER]
        new = down.to(dtype), (up if scale == 1.0 else scale * up).to(dtype)
        # In place, where they are: a recorded call reads them there.
        if self._casts is not None and all(map(_alike, self._casts, new)):
            for kept, cast_now in zip(self._casts, new, strict=True):
                kept.copy_(cast_now)
        else:
            self._casts = new

    @property
    def casts(self) -> tuple[Tensor, ...]:
        """Return the factors as `prepare` has rounded them; none before."""
        return self._casts or ()


def _held(base: torch.nn.Linear) -> tuple[Tensor, Tensor | None, How, tuple[int, int] | None]:
    """Return how the weight of a layer is held, as `unpack` takes it."""
    return base.held if isinstance(base, QuantizedLinear) else (base.weight, None, "none", None)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def take_over(network: torch.nn.Module) -> None:
    """Make every plain LoRA of a linear layer a `LoraLinear`; all other layers stay peft's."""
    for layer in network.modules():
        # Not what does more than a product (DoRA and others), nor what drops out or has a bias.
        if (
            type(layer) is Linear
            and type(layer.base_layer) in (torch.nn.Linear, QuantizedLinear)
            and list(layer.lora_A) == [ADAPTER]
            and not layer.lora_variant
            and not layer.fan_in_fan_out
            and not layer.lora_bias[ADAPTER]
            and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
        ):
            layer.__class__ = LoraLinear


class _Product(torch.autograd.Function):
    """The layer with gradient: what is kept for backward is the input and N x r numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_down: Tensor,
        lora_up: Tensor,
        scale: float,
        held: Tensor,
        held_scale: Tensor | None,
        how: How,
        shape: tuple[int, int] | None,
    ) -> Tensor:
        weight = unpack(held, held_scale, how, shape, x.dtype)
        out = torch.nn.functional.linear(x, weight, bias)
        # 1. s x A^T, (N, r). The cast of the input is dropped at once.
        hidden = _rows(x, lora_down.dtype) @ lora_down.T
        hidden = hidden if scale == 1.0 else hidden.mul_(scale)
        # 2. Into the output that was just made, which is rounded once.
        _add_product(out.view(-1, out.shape[-1]), hidden, lora_up.T)
        ctx.save_for_backward(x, hidden, lora_down, lora_up, held, held_scale)
        ctx.scale, ctx.how, ctx.shape = scale, how, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        x, hidden, down, up, held, held_scale = ctx.saved_tensors
        needs_x, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        grad_x = grad_down = grad_up = None
        rows = _rows(grad, up.dtype)  # (N, out)
        # 1. The gradient of x A^T, (N, r).
        back = rows @ up
        back = back if ctx.scale == 1.0 else back.mul_(ctx.scale)
        # 2. The factors' gradients, summed over the rows.
        if needs_up:
            grad_up = rows.T @ hidden
        del rows
        if needs_down:
            grad_down = back.T @ _rows(x, down.dtype)
        # 3. The input's, in its own precision.
        if needs_x:
            weight = unpack(held, held_scale, ctx.how, ctx.shape, x.dtype)
            grad_x = _rows(grad, grad.dtype) @ weight
            _add_product(grad_x, back, down)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, grad_down, grad_up, *[None] * 5


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor (..., D) as (N, D) in a precision."""
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, which may be of another precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
