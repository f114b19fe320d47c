"""Mix LoRAs exactly: the mixed weight update is the weighted sum of the weight updates.

A LoRA changes a weight by delta = scaling up @ down, with scaling alpha / rank (rsLoRA:
alpha / sqrt(rank)). The sum of such updates is one LoRA of the summed rank:

    sum_i c_i s_i up_i @ down_i = [c_1 s_1 up_1, c_2 s_2 up_2, ...] @ [down_1; down_2; ...]

Averaging the factors instead, mean(up) @ mean(down), adds the cross terms up_i @ down_j and is a
different model; nothing here does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The LoRA of one layer: delta = scaling up @ down.

    Args:
        down: A, shape (r, in) of a linear layer, (r, in, kh, kw) of a convolution.
        up: B, shape (out, r), or (out, r, 1, 1).
        scaling: The factor on up @ down.
    """

    down: Tensor
    up: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Return r, the number of rows of down."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return the weight's update, float64, shape (out, in) or (out, in, kh, kw)."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (self.scaling * product).view(self.up.shape[0], *self.down.shape[1:])


Layers = Mapping[str, Factors]
"""A whole LoRA: the factors of every layer it changes, by the layer's name."""


def scaling(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """Return the factor on up @ down: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
        arXiv:2312.03732.
    """
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def mix(members: Sequence[Layers], coefficients: Sequence[float]) -> dict[str, Factors]:
    """Return the LoRA whose updates are sum_i c_i delta_i.

    Exact but for rounding to float32: ranks are concatenated, and coefficients and scalings are
    folded into up, so that the result's scaling is 1. A member with coefficient 0 adds no rank.
    The base model is the LoRA with delta 0: leave it out.

    Args:
        members: At least one, all with the same layers of the same shapes; ranks may differ.
        coefficients: c_i, one per member, of any sign and sum.

    Returns:
        Factors in float32 on the CPU, scaling 1, of contiguous memory. Not differentiable.

    Raises:
        ValueError: If layers or shapes differ, a weight or coefficient is not finite, or there is
            not one coefficient per member.
    """
    if not members or len(members) != len(coefficients):
        raise ValueError(f"got {len(coefficients)} coefficients for {len(members)} LoRAs")
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"coefficients must be finite, got {list(coefficients)}")
    for index, member in enumerate(members):
        problem = not_finite(member) or mismatch(members[0], member)
        if problem:
            raise ValueError(f"LoRA {index}: {problem}")
    weighted = [(m, c) for m, c in zip(members, coefficients, strict=True) if c != 0.0]
    # Nothing but zeros: keep one, so that there still is a LoRA.
    weighted = weighted or [(members[0], 0.0)]
    return {name: _concatenate([(m[name], c) for m, c in weighted]) for name in members[0]}


def mismatch(first: Layers, other: Layers) -> str | None:
    """Return in words where two LoRAs change different layers or shapes, None where nowhere."""
    odd = sorted(first.keys() ^ other.keys())
    if odd:
        side = "only the first" if odd[0] in first else "only this one"
        return f"{len(odd)} layers are not in both; {side} has {odd[0]}"
    for name, mine in first.items():
        yours = other[name]
        shapes = [(f.up.shape[0], *f.down.shape[1:]) for f in (mine, yours)]
        if shapes[0] != shapes[1]:
            return f"layer {name} is {shapes[1]} (out, in) here and {shapes[0]} in the first"
    return None


def not_finite(layers: Layers) -> str | None:
    """Return in words where a LoRA holds NaN or infinity, None where nowhere."""
    for name, factors in layers.items():
        finite = torch.isfinite(factors.down).all() and torch.isfinite(factors.up).all()
        if not bool(finite) or not math.isfinite(factors.scaling):
            return f"layer {name} holds NaN or infinity"
    return None


def _concatenate(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Return one layer of the mix."""
    down = torch.cat([factors.down.float().cpu() for factors, _ in parts], dim=0)
    # fp64: one rounding instead of two.
    ups = [(c * f.scaling * f.up.double()).float().cpu() for f, c in parts]
    return Factors(down.contiguous(), torch.cat(ups, dim=1).contiguous(), 1.0)
