"""Mix LoRAs: by default exactly, so that the update is the weighted sum of the weight updates.

A LoRA changes a weight by delta = scaling up @ down (see factors.py). The sum of such updates is
one LoRA of the summed rank:

    sum_i c_i s_i up_i @ down_i = [c_1 s_1 up_1, c_2 s_2 up_2, ...] @ [down_1; down_2; ...]

peft's `cat` is the same for adapters inside a network; the exact mix needs no network and rounds to
float32 once. `svd` reduces that sum to a lower rank and reports what is lost. `ties` and
`dare_linear` prune the updates before they are added. `factor` averages each factor by itself, as
the AlignProp reference does: mean(up) @ mean(down) contains the cross terms up_i @ down_j, so it is
another model than the mean of the updates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.errors import RunError
from alignprop_cli.lora.factors import Factors, Layers, not_finite
from alignprop_cli.lora.recipe import PRUNING, Method

_linalg: Any = torch.linalg


@dataclass(frozen=True)
class Mixed:
    """A mix of LoRAs.

    Args:
        layers: Factors in float32 on the CPU, contiguous, with alpha equal to the rank.
        error: What a lower rank left out: the L2 distance from the exact updates over all layers,
            divided by their norm. 0 where the rank is not lowered.
    """

    layers: dict[str, Factors]
    error: float = 0.0


def mix(
    members: Sequence[Layers],
    coefficients: Sequence[float],
    method: Method = "exact",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Mixed:
    """Mix LoRAs with the coefficients c_i.

    The base model is not passed: its delta is 0. A member changes nothing in a layer that it lacks.

        exact: sum_i c_i delta_i, the ranks concatenated; coefficients and scalings are folded into
            up. A member with coefficient 0 adds no rank.
        svd: The exact mix, reduced to `rank` by keeping the largest singular values.
        factor: up = sum_i c_i up_i and down = sum_i c_i down_i.
        ties: Each update keeps the share `density` of its values, the largest; where members differ
            in sign, the heavier sign wins; c_i delta_i is averaged over the members that are left.
        dare_linear: Each update keeps a random share `density`, divided by it; then the sum.

    Args:
        members: At least one. Layers in several members have equal shapes; ranks may differ.
        coefficients: c_i, one per member, of any sign and sum.
        method: One of the above.
        rank: Rank for svd, ties and dare_linear; None is the largest among a layer's members.
        density: Share in (0, 1] that ties and dare_linear keep.
        seed: Seed of dare_linear.

    Raises:
        ValueError: If shapes or numbers differ, one is not finite, or `factor` gets members of
            different ranks or scalings.
        RunError: If a number of the mix is too large for float32.

    Source: ties: Yadav et al. 2023, arXiv:2306.01708, algorithm 1, with a coefficient on each
        update; dare: Yu et al. 2023, arXiv:2311.03099, eq. 3.
    """
    _check(members, coefficients)
    square_error = square_norm = 0.0
    layers: dict[str, Factors] = {}
    for number, name in enumerate(sorted({name for member in members for name in member})):
        pairs = zip(members, coefficients, strict=True)
        parts = [(member[name], c) for member, c in pairs if name in member]
        wanted = rank or max(factors.rank for factors, _ in parts)
        # A pruned update has no small factors any more, so it is made whole; the others never are.
        if method in PRUNING:
            update = _prune(parts, method, density, (seed, number))
            _check_finite(name, update.float())
            layers[name], lost, kept = _factorise(update, wanted)
        else:
            whole = _average_factors(parts, name) if method == "factor" else _concatenate(parts)
            _check_finite(name, whole.down, whole.up)
            lower = method == "svd"
            layers[name], lost, kept = _truncate(whole, wanted) if lower else (whole, 0.0, 0.0)
        _check_finite(name, layers[name].down, layers[name].up)
        square_error += lost
        square_norm += lost + kept
    return Mixed(layers, math.sqrt(square_error / square_norm) if square_norm else 0.0)


def _check(members: Sequence[Layers], coefficients: Sequence[float]) -> None:
    if not members or len(members) != len(coefficients):
        raise ValueError(f"got {len(coefficients)} coefficients for {len(members)} LoRAs")
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"coefficients must be finite, got {list(coefficients)}")
    for index, member in enumerate(members):
        problem = not_finite(member)
        problem = problem or next(
            filter(None, (other_shape(first, member) for first in members[:index])), None
        )
        if problem:
            raise ValueError(f"LoRA {index}: {problem}")


def missing(first: Layers, other: Layers) -> str | None:
    """Return which layers only one of two LoRAs changes, in words; None if both change the same."""
    odd = sorted(first.keys() ^ other.keys())
    if not odd:
        return None
    side = "only the first" if odd[0] in first else "only this one"
    return f"{len(odd)} layers are not in both; {side} has {odd[0]}"


def other_shape(first: Layers, other: Layers) -> str | None:
    """Return which layer has different shapes in two LoRAs, in words; None if none has."""
    for name in first.keys() & other.keys():
        mine, yours = first[name].shape, other[name].shape
        if mine != yours:
            return f"layer {name} is {yours} (out, in) here and {mine} in the first"
    return None


def _check_finite(layer: str, *mix: Tensor) -> None:
    # Members are finite, so anything else has overflowed.
    if not all(bool(torch.isfinite(tensor).all()) for tensor in mix):
        raise RunError(
            f"soup: the mix of layer {layer} holds numbers that are too large for float32",
            hint="give smaller shares",
        )


def _from_halves(down: Tensor, up: Tensor) -> Factors:
    """Return factors of scaling 1 in float32 on the CPU."""
    rank = float(down.shape[0])
    return Factors(down.float().cpu().contiguous(), up.float().cpu().contiguous(), rank)


def _concatenate(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Return one layer of the exact mix."""
    # Where all coefficients are 0 one member stays, so that the layer still has a LoRA.
    parts = [(f, c) for f, c in parts if c != 0.0] or list(parts[:1])
    down = torch.cat([factors.down for factors, _ in parts], dim=0)  # (sum r, in)
    # In float64 the product of the three numbers is rounded once, when it becomes float32.
    up = torch.cat([c * factors.scaling * factors.up.double() for factors, c in parts], dim=1)
    return _from_halves(down, up)


def _average_factors(parts: Sequence[tuple[Factors, float]], name: str) -> Factors:
    """Return one layer with each factor averaged by itself."""
    kinds = {(factors.rank, factors.scaling) for factors, _ in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"layer {name}: factors can be averaged only where rank and scaling are the same, "
            f"got {', '.join(f'{rank} and {scale:g}' for rank, scale in sorted(kinds))}"
        )
    # The scaling goes into up, once: factors of scaling 1 are returned.
    down = sum((c * f.down.double() for f, c in parts), torch.zeros(()))
    up = sum((c * f.scaling * f.up.double() for f, c in parts), torch.zeros(()))
    return _from_halves(down, up)


def _truncate(whole: Factors, rank: int) -> tuple[Factors, float, float]:
    """Return the nearest LoRA of a rank, and the squared norms of what is lost and what is kept."""
    # The whole update (out, in) is never made: with up = Q1 R1 and down^T = Q2 R2, the r x r matrix
    # R1 R2^T has its singular values, and Q1, Q2 turn its singular vectors into the update's.
    left, core_left = _linalg.qr(whole.up.double().flatten(1))  # (out, r), (r, r)
    right, core_right = _linalg.qr(whole.down.double().flatten(1).T)  # (in, r), (r, r)
    u, values, v = _linalg.svd(core_left @ core_right.T)
    return _halves(left @ u, values, v @ right.T, whole, rank)


def _factorise(delta: Tensor, rank: int) -> tuple[Factors, float, float]:
    """As `_truncate`, for a whole update of shape (out, in) or (out, in, kh, kw)."""
    # `like` has the shapes of the factors to return, at rank 1, and no values.
    u, values, v = _linalg.svd(delta.flatten(1), full_matrices=False)
    like = Factors(delta.new_empty(1, *delta.shape[1:]), delta.new_empty(delta.shape[0], 1), 1.0)
    if delta.ndim == 4:
        like = Factors(like.down, like.up[..., None, None], 1.0)
    return _halves(u, values, v, like, rank)


def _halves(
    u: Tensor, values: Tensor, v: Tensor, like: Factors, rank: int
) -> tuple[Factors, float, float]:
    """Return factors u sqrt(s) and sqrt(s) v of the largest singular values."""
    # By Eckart and Young this is the nearest matrix of the rank, in the L2 norm of all its entries.
    kept, lost = values[:rank], values[rank:]
    root = kept.sqrt()
    up = (u[:, : len(kept)] * root).view(-1, len(kept), *like.up.shape[2:])
    down = (root[:, None] * v[: len(kept)]).view(len(kept), *like.down.shape[1:])
    return _from_halves(down, up), float(lost.square().sum()), float(kept.square().sum())


def _prune(
    parts: Sequence[tuple[Factors, float]], method: Method, density: float, key: tuple[int, int]
) -> Tensor:
    """Return the pruned and mixed update of one layer, float64."""
    deltas = [factors.delta() for factors, _ in parts]
    if method == "ties":
        # Imported here, since peft takes seconds and no other method needs it.
        from peft.utils import merge_utils

        weights = torch.tensor([c for _, c in parts], dtype=torch.float64)
        with warnings.catch_warnings():
            # peft warns that density 1 prunes nothing, which may be just what is wanted.
            warnings.simplefilter("ignore")
            return merge_utils.ties(deltas, weights, density)
    # Not peft's dare_linear, which draws from the global generator and so depends on earlier draws.
    seed, layer = key
    total = torch.zeros_like(deltas[0])
    for number, (delta, (_, c)) in enumerate(zip(deltas, parts, strict=True)):
        stays = torch.rand(delta.shape, generator=rng.generator(seed, "soup", layer, number))
        total += c / density * delta * (stays < density)
    return total
