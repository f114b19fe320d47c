"""Rewards that need no weights: for first experiments and for tests.

All are cheap and easily exploited: a model that maximises brightness ends at white images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import without_network

# Rec. 601 luma, the weights of JPEG's Y channel.
_LUMA = (0.299, 0.587, 0.114)


def _luma(images: Tensor) -> Tensor:
    """Return brightness per pixel, (B, H, W), of images (B, 3, H, W)."""
    # Autocast would compute the product in half precision, coarser than the differences that count.
    weights = torch.tensor(_LUMA, dtype=images.dtype, device=images.device)
    with without_autocast(images.device):
        return torch.einsum("bchw,c->bhw", images, weights)


@without_network
def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the mean luma, in [0, 1]. Differentiable in images."""
    return _luma(images).mean(dim=(1, 2))


@without_network
def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return mean red minus mean of green and blue, in [-1, 1]. Differentiable in images."""
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2.0).mean(dim=(1, 2))


@without_network
def contrast(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the standard deviation of luma, in [0, 0.5]. Differentiable in images."""
    variance = _luma(images).flatten(1).var(dim=1, correction=0)  # (B,)
    # Without the offset the gradient at a flat image would be NaN, infinity times 0; with it, 0.
    return torch.sqrt(variance + 1e-12)


@without_network
def colourfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return how strongly colours are spread, about 0 (grey) to 1 (vivid).

    sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G, yb = (R + G) / 2 - B.

    Source: Hasler & Suesstrunk 2003, "Measuring colourfulness in natural images", on [0, 1]
        instead of [0, 255]. Differentiable in images.
    """
    red, green, blue = images.unbind(dim=1)
    # The paper's two opponent axes, red-green and yellow-blue: (B, 2, H W).
    axes = torch.stack([red - green, (red + green) / 2.0 - blue], dim=1).flatten(2)
    # Both roots need the offset of `contrast`: grey images have neither spread nor shift.
    spread = torch.sqrt(axes.var(dim=2, correction=0).sum(dim=1) + 1e-12)
    shift = torch.sqrt(axes.mean(dim=2).square().sum(dim=1) + 1e-12)
    return spread + 0.3 * shift


@without_network
def symmetry(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return minus the mean absolute difference to the mirror image, in [-1, 0].

    0 is an image that equals its left-right mirror image. Differentiable in images.
    """
    return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))
