"""A LoRA as numbers: two factors per layer, and the scaling of their product."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The LoRA of one layer: delta = scaling up @ down.

    The weight becomes W + delta; as a DoRA, m (W + delta) / |W + delta|, where the norm is that of
    each row, all that goes into one output.

    Args:
        down: A, shape (r, in) of a linear layer, (r, in, kh, kw) of a convolution.
        up: B, shape (out, r), or (out, r, 1, 1).
        alpha: Numerator of the scaling.
        rank_stabilised: Whether the scaling is alpha / sqrt(r), as in rsLoRA; else it is alpha / r.
        magnitude: m of a DoRA, shape (out,), or (1, out, 1, 1) of a convolution; None for a LoRA.

    Source of DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """

    down: Tensor
    up: Tensor
    alpha: float
    rank_stabilised: bool = False
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return r, the number of rows of down."""
        return self.down.shape[0]

    @property
    def scaling(self) -> float:
        """Return the factor on up @ down."""
        return scaling(self.alpha, self.rank, rank_stabilised=self.rank_stabilised)

    def folded(self) -> Factors:
        """Return the same update with the scaling in up, so that it is 1: alpha is the rank."""
        up = self.up if self.scaling == 1.0 else self.scaling * self.up.float()
        return replace(self, up=up, alpha=float(self.rank), rank_stabilised=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight: (out, in) or (out, in, kh, kw)."""
        return self.up.shape[0], *self.down.shape[1:]

    def delta(self) -> Tensor:
        """Return the weight's update, float64, shape (out, in) or (out, in, kh, kw)."""
        # (out, r) @ (r, in kh kw): as a convolution's up is 1 x 1, this holds for it too.
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (self.scaling * product).view(self.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight W with the LoRA or DoRA in it, float64, of the same shape."""
        whole = weight.double() + self.delta()
        if self.magnitude is None:
            return whole
        lengths = self.magnitude.double().flatten() / whole.flatten(1).norm(dim=1)
        return lengths.view(-1, *[1] * (whole.ndim - 1)) * whole


Layers = Mapping[str, Factors]
"""A whole LoRA: the factors of every layer it changes, by the layer's name in the network."""


def is_dora(layers: Layers) -> bool:
    """Return whether a LoRA is a DoRA; all of its layers are then."""
    return any(factors.magnitude is not None for factors in layers.values())


def scaling(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """Return the factor on up @ down: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
        arXiv:2312.03732.
    """
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def not_finite(layers: Layers) -> str | None:
    """Return which layer of a LoRA holds NaN or infinity, in words; None if none does."""
    for name, factors in layers.items():
        # As float32, which every use of them is: a larger number in float64 would become infinite.
        parts = (factors.down, factors.up, factors.magnitude)
        finite = all(bool(torch.isfinite(p.float()).all()) for p in parts if p is not None)
        if not finite or not math.isfinite(factors.alpha):
            return f"layer {name} holds NaN or infinity"
    return None


def adapter_settings(layers: Layers) -> dict[str, Any]:
    """Return rank and alpha of every layer as fields of peft's `LoraConfig`.

    Returns:
        `r` and `lora_alpha` of most layers, `rank_pattern` and `alpha_pattern` of the others,
        `use_rslora` and `use_dora`.
    """
    # The most common pair is the default, so that most files have no patterns at all.
    kinds = Counter((factors.rank, factors.alpha) for factors in layers.values())
    (rank, alpha), _ = kinds.most_common(1)[0]
    other_ranks = {n: f.rank for n, f in sorted(layers.items()) if f.rank != rank}
    other_alphas = {n: whole(f.alpha) for n, f in sorted(layers.items()) if f.alpha != alpha}
    return {
        "r": rank,
        "lora_alpha": whole(alpha),
        "rank_pattern": {_pattern(name, layers): value for name, value in other_ranks.items()},
        "alpha_pattern": {_pattern(name, layers): value for name, value in other_alphas.items()},
        "use_rslora": any(factors.rank_stabilised for factors in layers.values()),
        "use_dora": is_dora(layers),
    }


def whole(alpha: float) -> float:
    """Return alpha as peft writes it: an integer where it is one, so that it round-trips."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(name: str, layers: Layers) -> str:
    """Return a pattern for peft that means this layer alone."""
    # peft matches the ends of names: `conv_in` would also mean `encoder.conv_in`.
    ambiguous = any(other.endswith(f".{name}") for other in layers)
    return f"^{re.escape(name)}" if ambiguous else name
