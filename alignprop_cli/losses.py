"""From rewards to a loss: where the sign, the scale and the target of a reward live."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["maximise", "target", "hinge"]


def reward_loss(
    rewards: Tensor, kind: LossKind = "maximise", *, target: float | None = None, scale: float = 1.0
) -> Tensor:
    """Turn the reward of each image into the loss of each image.

    maximise: -scale r.  target: scale |r - target|.  hinge: scale max(0, target - r).

    No mean is taken here: the caller divides by the global batch, so splitting it changes nothing.

    Args:
        rewards: r, shape (B,), higher is better.
        kind: Which of the three.
        target: In the units of the reward: the value aimed at (target), or the value from which on
            the loss is 0 (hinge).
        scale: Dimensionless factor, > 0.

    Returns:
        losses, shape (B,), same dtype. Differentiable in rewards; at r = target the gradient is 0.

    Raises:
        ValueError: If kind is unknown, or target or hinge is asked without a target.

    Source: target: the aesthetic loss of the AlignProp reference (target 10, scale 0.01);
        hinge: Xu et al. 2023, arXiv:2304.05977 (ReFL, target 2, scale 1e-3).
    """
    if kind == "maximise":
        return -scale * rewards
    if target is None:
        raise ValueError(f"loss kind {kind!r} needs a target, got None")
    if kind == "target":
        return scale * (rewards - target).abs()
    if kind == "hinge":
        return scale * torch.relu(target - rewards)
    raise ValueError(f"unknown loss kind {kind!r}; expected maximise, target or hinge")
