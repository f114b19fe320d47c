"""peft's LoRA of a linear layer, with fewer operators and without a float32 copy of its input.

In half precision peft casts the input to float32, multiplies it by A and B, scales, adds and casts
back: six operators a layer, and autograd keeps the copy of every input for backward. Here they are
two, in the precision of the layer, and autograd keeps the input itself. A weight that is held in
fewer bits is unpacked for each product.
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

    y = x W^T + b + (x A^T) (s B)^T with s = alpha / rank. A and B are float32; they are rounded to
    the precision of W, in which the products are taken, and their gradients are float32.
    """

    _casts: tuple[Tensor, Tensor] | None = None
    _ready = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output. Differentiable in x and in the factors."""
        base = cast(torch.nn.Linear, self.base_layer)
        held = _held(base)
        usual = args or kwargs or self.disable_adapters or self.merged_adapters
        if usual or x.dtype != self._dtype or held[0].requires_grad:
            return super().forward(x, *args, **kwargs)
        # The casts of this step, where there are any; otherwise those of this call.
        down, up = self._casts if self._ready and self._casts is not None else self._cast()
        if not torch.is_grad_enabled():
            return _forward(x, unpack(*held, x.dtype), base.bias, down, up)[0]
        factors = (half[ADAPTER].weight for half in self._halves)
        scale = self.scaling[ADAPTER]
        return cast(Tensor, _Product.apply(x, base.bias, *factors, down, up, scale, *held))

    @property
    def _halves(self) -> tuple[torch.nn.ModuleDict, torch.nn.ModuleDict]:
        return self.lora_A, self.lora_B

    @property
    def _dtype(self) -> torch.dtype:
        base = cast(torch.nn.Linear, self.base_layer)
        return base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype

    def _cast(self) -> tuple[Tensor, Tensor]:
        """Return A and s B in the precision of the layer."""
        dtype, scale = self._dtype, self.scaling[ADAPTER]
        down, up = (cast(Tensor, half[ADAPTER].weight).detach() for half in self._halves)
        # Scaled first, so that the product is rounded once.
        return down.to(dtype), (up if scale == 1.0 else scale * up).to(dtype)

    def prepare(self) -> None:
        """Cast the factors now, for all calls until `release`; they must not change meanwhile."""
        if self._dtype == self.lora_A[ADAPTER].weight.dtype:
            return
        new = self._cast()
        # In place, where they are: a recorded call reads them there.
        if self._casts is not None and all(map(_alike, self._casts, new)):
            for kept, cast_now in zip(self._casts, new, strict=True):
                kept.copy_(cast_now)
        else:
            self._casts = new
        self._ready = True

    def release(self) -> None:
        """Cast the factors in every call again."""
        self._ready = False

    @property
    def casts(self) -> tuple[Tensor, ...]:
        """Return the factors as `prepare` has cast them; none before."""
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


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output (..., out) and the hidden product (N, r) of N rows."""
    hidden = x.reshape(-1, x.shape[-1]) @ down.T
    out = torch.nn.functional.linear(x, weight, bias)
    # Into the output that was just made: one operator, and no memory.
    out.view(-1, out.shape[-1]).addmm_(hidden, up.T)
    return out, hidden


class _Product(torch.autograd.Function):
    """`_forward` with gradient: what is kept for backward is the input and N x r numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_down: Tensor,
        lora_up: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        held: Tensor,
        held_scale: Tensor | None,
        how: How,
        shape: tuple[int, int] | None,
    ) -> Tensor:
        out, hidden = _forward(x, unpack(held, held_scale, how, shape, x.dtype), bias, down, up)
        ctx.save_for_backward(x, hidden, down, up, held, held_scale)
        ctx.scale, ctx.dtypes = scale, (lora_down.dtype, lora_up.dtype)
        ctx.how, ctx.shape = how, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        x, hidden, down, up, held, held_scale = ctx.saved_tensors
        needs_x, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (N, out)
        back = rows @ up  # (N, r): the gradient of `hidden`, s included
        grad_x = grad_down = grad_up = None
        if needs_x:
            weight = unpack(held, held_scale, ctx.how, ctx.shape, x.dtype)
            grad_x = (rows @ weight).addmm_(back, down).view(x.shape)
        if needs_down:
            grad_down = _outer(back, x.reshape(-1, x.shape[-1]), ctx.dtypes[0])
        if needs_up:
            # `hidden` has no s.
            grad_up = _outer(rows, hidden, ctx.dtypes[1])
            grad_up = grad_up if ctx.scale == 1.0 else ctx.scale * grad_up
        return grad_x, None, grad_down, grad_up, *[None] * 7


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left^T right, summed over the rows and given in `dtype`."""
    if left.dtype == dtype:
        return left.T @ right
    # A GPU sums in float32 anyway; here it also does not round the sum to half precision.
    half = left.dtype in (torch.float16, torch.bfloat16)
    if half and dtype == torch.float32 and left.device.type in ("cuda", "meta"):
        mm: Any = torch.mm
        return mm(left.T, right, out_dtype=dtype)
    return left.to(dtype).T @ right.to(dtype)
