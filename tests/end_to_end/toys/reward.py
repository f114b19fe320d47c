"""A reward from outside the package: how red an image is, minus how blue."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def warmth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images[:, 0] - images[:, 2]).mean(dim=(1, 2))
