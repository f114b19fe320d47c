"""What one part of a step needs: bytes as a function of the batch, operations, launches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Affine:
    """Bytes as a function of the batch: fixed + each x images."""

    fixed: float
    each: float

    def __call__(self, images: int) -> float:
        """Return the bytes for a batch of this many images."""
        return self.fixed + self.each * images


@dataclass(frozen=True)
class Work:
    """What one part of a step needs; the fields mean the same as in `meter.Cost`.

    Bytes are functions of the batch, operations are those of one image, and launches are the same
    for any batch.
    """

    saved: Affine
    forward: Affine
    backward: Affine
    forward_flops: float
    backward_flops: float
    forward_launches: int = 0
    backward_launches: int = 0

    @property
    def flops(self) -> float:
        """Return the operations of one image, forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def launches(self) -> int:
        """Return the operators that are launched, forward and backward."""
        return self.forward_launches + self.backward_launches


NO_WORK = Work(*[Affine(0.0, 0.0)] * 3, forward_flops=0.0, backward_flops=0.0)
"""What a part needs that is left out."""
