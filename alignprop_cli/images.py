"""Images: conversion to [0, 1] and to bytes, and the preprocessing of image models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _Saturate(torch.autograd.Function):
    """Clamp with a one-sided gradient outside the range; see `saturate`."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)  # type: ignore[attr-defined]
        return images.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        (images,) = cast(tuple[Tensor], ctx.saved_tensors)  # type: ignore[attr-defined]
        # Descent moves a pixel against its gradient: a positive one brings a pixel above 1 back, a
        # negative one a pixel below 0. The opposite signs would push it further out of range.
        outward = ((images > 1.0) & (grad_output < 0.0)) | ((images < 0.0) & (grad_output > 0.0))
        return grad_output.masked_fill(outward, 0.0)


def saturate(images: Tensor) -> Tensor:
    """Clamp images to [0, 1], but keep the gradient that leads back into the range.

    A plain clamp has no gradient at saturated pixels, so an image that has once become white or
    black stays so. Here a saturated pixel keeps its gradient if minimising the *loss* moves the
    pixel back into the range. A gradient that would move it further out is dropped, since the
    clamped image does not change.

    Args:
        images: Shape (B, 3, H, W), nominally in [0, 1].

    Returns:
        images in [0, 1], same shape and dtype. Differentiable inside the range; outside only
        towards it.
    """
    return _Saturate.apply(images)  # type: ignore[no-any-return]


def from_decoder(decoded: Tensor) -> Tensor:
    """Map the decoder's range [-1, 1] to [0, 1], clamped by `saturate`.

    Args:
        decoded: Output of the VAE decoder, shape (B, 3, H, W), nominally in [-1, 1].

    Returns:
        images, shape (B, 3, H, W), float32 (float64 stays float64), in [0, 1]. Differentiable as
        `saturate` is.
    """
    # float32 first: near 1, steps of bfloat16 are as coarse as those of bytes.
    decoded = decoded if decoded.dtype == torch.float64 else decoded.float()
    return saturate(decoded / 2.0 + 0.5)


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to bytes.

    Args:
        images: Shape (B, 3, H, W), float, in [0, 1]; values outside are clamped.

    Returns:
        Shape (B, H, W, 3), uint8, on the CPU. Not differentiable.
    """
    # Rounded, as diffusers does; a plain conversion to uint8 would cut the fraction off.
    scaled = images.detach().float().clamp(0.0, 1.0).mul(255.0).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()  # (B, H, W, 3)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation by channel of the images that CLIP was trained on."""


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std by channel, the normalisation of image models.

    Args:
        images: Shape (B, C, H, W), float.
        mean: C numbers.
        std: C numbers above 0.

    Returns:
        Same shape and dtype. Differentiable in images.
    """
    # (1, C, 1, 1) each
    shift, scale = (images.new_tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize the long edge to `size` and pad the short edge with black on both sides.

    Args:
        images: Shape (B, 3, H, W), any float dtype.
        size: Side of the square result in pixels.

    Returns:
        Shape (B, 3, size, size), float32 (float64 stays float64). Differentiable in images.

    Source: the preprocessing of tgxs002/HPSv2, `ResizeMaxSize`. It does not pad an image whose long
        edge is `size` already, which its network then refuses; here such an image is padded too.
    """
    images = images if images.dtype == torch.float64 else images.float()
    height, width = images.shape[-2:]
    if max(height, width) != size:
        scale = size / max(height, width)
        target = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = _bicubic(images, target)
    # Where the number of rows or columns to add is odd, the last one is at the bottom or right.
    rows, columns = size - images.shape[-2], size - images.shape[-1]
    top, left = rows // 2, columns // 2
    return torch.nn.functional.pad(images, (left, columns - left, top, rows - top))


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Resize the short edge to `size` and crop the centre, the preprocessing of most image models.

    Bicubic with antialiasing, the closest that torch has to Pillow's bicubic; values that overshoot
    [0, 1] are not clamped.

    Args:
        images: Shape (B, 3, H, W), any float dtype.
        size: Side of the square result in pixels.

    Returns:
        Shape (B, 3, size, size), float32 (float64 stays float64). Differentiable in images.
    """
    # Half precision has no antialiased kernel on the CPU.
    images = images if images.dtype == torch.float64 else images.float()
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = _bicubic(images, target)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def squash(images: Tensor, size: int) -> Tensor:
    """Resize both edges to `size`, whatever the proportions, as SigLIP was trained.

    Args:
        images: Shape (B, 3, H, W), any float dtype.
        size: Side of the square result in pixels.

    Returns:
        Shape (B, 3, size, size), float32 (float64 stays float64). Differentiable in images.
    """
    return resize(images, (size, size))


def resize(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Resize to a height and a width, bicubic with antialiasing; see `resize_and_crop`.

    Args:
        images: Shape (B, 3, H, W), any float dtype.
        target: Height and width of the result in pixels.

    Returns:
        Shape (B, 3, height, width), float32 (float64 stays float64). Differentiable in images.
    """
    images = images if images.dtype == torch.float64 else images.float()
    return images if images.shape[-2:] == target else _bicubic(images, target)


def _bicubic(images: Tensor, target: tuple[int, int]) -> Tensor:
    if images.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _bicubic_by_products(images, target)
    return torch.nn.functional.interpolate(
        images, target, mode="bicubic", antialias=True, align_corners=False
    )


def _bicubic_by_products(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Resize as two matrix products, whose backward repeats bit for bit; CUDA's own does not."""
    # Resizing is linear, and separately so in rows and columns: the weights of an axis are what it
    # makes of the unit matrix.
    weights: list[Tensor] = []
    for size, wanted in zip(images.shape[-2:], target, strict=True):
        unit = torch.eye(size, dtype=images.dtype, device=images.device)[None, None]
        weights.append(
            torch.nn.functional.interpolate(
                unit, (wanted, size), mode="bicubic", antialias=True, align_corners=False
            )[0, 0]  # (wanted, size)
        )
    return weights[0] @ images @ weights[1].T
