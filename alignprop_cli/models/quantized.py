"""Frozen linear layers that hold their weights in 8 or 4 bits: what `model.quantize` means.

What is saved is the memory of the weights, nothing else: every call unpacks the weight of a layer,
uses it in the precision of the network and frees it, and backward unpacks it again. Layers of the
quantisation libraries are not used, since they do not all do that: one that leaves an unpacked
weight to autograd holds the whole network unpacked between forward and backward.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignprop_cli.errors import AssetError, ConfigError, first_line
from alignprop_cli.models.base import Source

How = Literal["none", "int8", "nf4"]
"""How weights are held; `none` is as they are."""

BLOCK = 64
"""Weights that share a scale in `nf4`, as in QLoRA (arXiv:2305.14314)."""

# The language head of a text encoder: nothing here calls it, and it may be the embedding itself.
_KEPT = ("lm_head",)


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer with a packed weight: y = x W^T + b. Differentiable in x.

    int8: W = scale x levels, one float32 scale a row, levels -127 to 127. nf4: the 4-bit levels of
    QLoRA with a float32 scale for every 64 weights, by bitsandbytes.

    Args:
        linear: The layer whose weight is packed; its bias is taken over.
        how: `int8` or `nf4`.
        device: Where the weight is packed and stays; None is where it is.
    """

    def __init__(
        self, linear: torch.nn.Linear, how: How, device: torch.device | None = None
    ) -> None:
        # Not Linear's own, which would make a weight.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.how: How = how
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        weight = linear.weight.detach()
        packed, scale = pack(weight if device is None else weight.to(device), how)
        # Buffers, as a network's precision is read from its parameters.
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight, (out, in)."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight, unpacked anew, (out, in)."""
        return unpack(*self.held, self.dtype)

    @property
    def held(self) -> tuple[Tensor, Tensor | None, How, tuple[int, int]]:
        """Return what `unpack` takes, but for the precision."""
        return cast(Tensor, self.packed), cast(Tensor, self.scale), self.how, self.shape

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output. Differentiable in the input."""
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _Frozen.apply(input, self.bias, *self.held))
        return torch.nn.functional.linear(input, self.weight, self.bias)


class _Frozen(torch.autograd.Function):
    """A linear layer of which backward needs the packed weight alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        scale: Tensor | None,
        how: How,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.how, ctx.shape = how, shape
        return torch.nn.functional.linear(x, unpack(packed, scale, how, shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        packed, scale = ctx.saved_tensors
        weight = unpack(packed, scale, ctx.how, ctx.shape, grad.dtype)
        return grad @ weight, None, None, None, None, None


def pack(weight: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Return a weight (out, in) in fewer bits, and its scales; on the meta device only shapes.

    Returns:
        For `int8` (out, in) and (out, 1), for `nf4` ((out x in) / 2, 1) and (out x in) / 64 of
        them, both rounded up. The scales are float32.
    """
    count, empty = weight.numel(), weight.new_empty
    if weight.is_meta and how == "int8":
        scale = empty((len(weight), 1), dtype=torch.float32)
        return empty(weight.shape, dtype=torch.int8), scale
    if weight.is_meta:
        scale = empty(math.ceil(count / BLOCK), dtype=torch.float32)
        return empty((math.ceil(count / 2), 1), dtype=torch.uint8), scale
    if how == "int8":
        # No row of zeros may divide by 0.
        largest = weight.abs().amax(dim=1, keepdim=True).float()
        scale = (largest / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
        return (weight.float() / scale).round_().to(torch.int8), scale
    from bitsandbytes.functional import quantize_4bit  # pyright: ignore[reportMissingImports]

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def unpack(
    held: Tensor,
    scale: Tensor | None,
    how: How,
    shape: tuple[int, int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return a weight in the precision `dtype`.

    Args:
        held: As `pack` returned it; with `none` the weight itself, which is returned.
        scale: The same.
        how: How it is held.
        shape: Of the weight.
        dtype: Of the result.
    """
    if how == "none":
        return held
    assert scale is not None
    assert shape is not None
    if how == "int8":
        # Scaled in place, so that there is one copy; in float32, so that it is rounded once.
        return held.to(dtype).mul_(scale)
    if held.is_meta:
        return held.new_empty(shape, dtype=dtype)
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        QuantState,
        dequantize_4bit,
    )

    # As one row: on the CPU bitsandbytes 0.50 begins a block anew in every row, and returns wrong
    # numbers where rows are no multiple of a block.
    row = torch.Size((1, math.prod(shape)))
    state = QuantState(absmax=scale, shape=row, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(held, state).reshape(shape)


def quantize(module: Any, how: How, device: torch.device | None = None) -> Any:
    """Pack the weights of a frozen network's linear layers, in place, one after the other.

    As in diffusers and transformers, layers stay as they are that the class of the network keeps in
    float32; so do language heads.

    Args:
        module: The network; a text encoder or what is sampled with, never an autoencoder.
        how: How its weights are held; `none` changes nothing.
        device: Where the packed weights go; None leaves them where they are.

    Returns:
        The network.
    """
    if how == "none":
        return module
    kept = {*_KEPT, *(getattr(module, "_keep_in_fp32_modules", None) or ())}
    for path, layer in list(module.named_modules()):
        # Subclasses may do something else with their weight.
        if type(layer) is torch.nn.Linear and not kept & set(path.split(".")):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, QuantizedLinear(layer, how, device))
    return module


def is_present(network: torch.nn.Module) -> bool:
    """Return whether the network has quantised layers."""
    return any(isinstance(layer, QuantizedLinear) for layer in network.modules())


def quantize_part(network: Any, source: Source, name: str) -> Any:
    """Return a part of a pipeline, quantised as its source says; an autoencoder never is."""
    # It has few linear layers, and their rounding would show in every pixel.
    return network if name == "vae" else quantize(network, source.config.quantize, source.device)


def full_shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's parameters by name, as if nothing was quantised."""
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    for path, layer in network.named_modules():
        if isinstance(layer, QuantizedLinear):
            shapes[f"{path}.weight"] = layer.shape
    return shapes


def check(how: How, device: torch.device) -> None:
    """Refuse what cannot be done on a device, by trying it on one small weight.

    Raises:
        AssetError: If a library is missing or cannot be loaded.
        ConfigError: If it does not work on the device.
    """
    if how != "nf4":
        return
    try:
        import bitsandbytes.functional  # noqa: F401 # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else f"cannot be loaded: {first_line(error)}"
        raise AssetError(
            f"model.quantize: nf4 needs bitsandbytes, which {reason}",
            hint="pip install 'alignprop[quantize]'; int8 needs nothing",
        ) from error
    try:
        weight = torch.ones(BLOCK, BLOCK, device=device)
        right = torch.equal(unpack(*pack(weight, how), how, (BLOCK, BLOCK), weight.dtype), weight)
        reason = "" if right else "it returns wrong numbers"
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        reason = first_line(error)
    if reason:
        raise ConfigError(
            f"model.quantize: nf4 does not work on {device}: {reason}",
            hint="int8 works everywhere",
        )
