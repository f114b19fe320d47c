"""Networks that run the same block many times, shortened for counting.

A transformer has up to sixty equal blocks in a row. Each needs the same memory and operations, so a
few of them are run, and one of those counts for all that were left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

# Of equal blocks in a row: three until all streams carry gradient, where the LoRA begins in one of
# them; the one that counts for all that are left out; and the last, where backward begins.
_KEPT = 5
_COUNTED = 3

_PLAIN = (int, float, bool, str, type(None))
# Z-Image's blocks know which they are, and never read it.
_PLACES = {"layer_id"}


@dataclass(frozen=True)
class Rows:
    """The rows of equal blocks of a network.

    Args:
        kept: By list of blocks, those that are run.
        times: How many times each of these counts.
    """

    kept: Mapping[nn.ModuleList, Sequence[nn.Module]]
    times: Mapping[nn.Module, int]


def find_rows(network: nn.Module) -> Rows:
    """Find out of which blocks five are enough.

    Args:
        network: One of diffusers' models, whose class says which of its blocks are repeated. With
            its LoRA, if it gets one; recomputation and merging treat equal blocks alike.
    """
    model: Any = network
    # Stable Diffusion 3 says it by the second name alone.
    names = (
        getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", ()) or ()
    )
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    kept: dict[nn.ModuleList, list[nn.Module]] = {}
    times: dict[nn.Module, int] = {}
    for row in lists:
        if not any(type(block).__name__ in names for block in row):
            continue
        kept[row] = []
        for _, run in groupby(row, _kind):
            equal = list(run)
            left_out = max(0, len(equal) - _KEPT)
            chosen = equal[: _KEPT - 1] + equal[_KEPT - 1 :][-1:]
            times |= {block: 1 + left_out * (i == _COUNTED) for i, block in enumerate(chosen)}
            kept[row] += chosen
    return Rows(kept, times)


@contextmanager
def shortened(rows: Rows) -> Iterator[None]:
    """Leave out all but five of many equal blocks in a row, inside the block."""
    whole = {row: list(row) for row in rows.kept}
    try:
        for row, blocks in rows.kept.items():
            row._modules = {str(i): block for i, block in enumerate(blocks)}
        yield
    finally:
        for row, blocks in whole.items():
            row._modules = {str(i): block for i, block in enumerate(blocks)}


def _kind(block: nn.Module) -> Any:
    """Return what blocks have in common that need the same."""
    parts = [
        (path, type(part), [(k, v) for k, v in vars(part).items() if _decides(k, v)])
        for path, part in block.named_modules()
    ]
    tensors = [
        (path, t.shape, t.dtype, t.requires_grad)
        for path, t in [*block.named_parameters(), *block.named_buffers()]
    ]
    return parts, tensors


def _decides(name: str, value: Any) -> bool:
    # Scales of a LoRA are in a dictionary: of them 1 alone needs no product.
    values = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(each, _PLAIN) for each in values) and name not in _PLACES
