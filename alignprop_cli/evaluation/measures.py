"""What is measured on a set of images besides their rewards: what shows that a model went too far.

Everything becomes a `Quantity`: one value for each prompt, since the images of one prompt are alike
and a comparison must not count them as independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignprop_cli.config.guard import RIGHT
from alignprop_cli.evaluation.compare import DIVERSITY, VENDI, checks, diversity, vendi
from alignprop_cli.evaluation.draw import Floats, Sample, Samples

# Side of the pixel embedding.
_CELLS = 8


@dataclass(frozen=True)
class Quantity:
    """One measure of one model.

    Args:
        by_prompt: Its mean over the images of each prompt, shape (P,).
        spread: Its standard deviation over the images (over the prompts, where it is measured on
            all images of a prompt together).
    """

    by_prompt: Floats
    spread: float

    @property
    def mean(self) -> float:
        """Return the mean over the prompts."""
        return float(self.by_prompt.mean())


def measure(sampled: Samples) -> dict[str, Quantity]:
    """Return all measures of a model's images: rewards, checker, diversity and pixels.

    `diversity` and `vendi` are of the features, or of the pixels where there are none;
    `pixel_diversity` is of the pixels in any case: to a network images may still look different
    that all look the same to people. All three are left out where no prompt repeats, the checker
    where none knows the prompts.
    """
    # 1. What each image has.
    per_image: dict[str, Floats] = {**sampled.rewards, **pixels(sampled.images)}
    found = checks({"": sampled})
    if "all" in found:
        per_image[RIGHT] = found["all"][""]
    quantities = {
        name: Quantity(_by_prompt(sampled.samples, values), float(values.std()))
        for name, values in per_image.items()
    }
    # 2. What the images of one prompt have together.
    images = torch.from_numpy(sampled.images).permute(0, 3, 1, 2)
    by_pixels = replace(sampled, features=pixel_features(images / 255.0).double().numpy())
    seen = by_pixels if sampled.features is None else sampled
    for name, function, of in (
        (DIVERSITY, diversity, seen),
        ("pixel_diversity", diversity, by_pixels),
        (VENDI, vendi, seen),
    ):
        _, values = function(of)
        if len(values):
            quantities[name] = Quantity(values, float(values.std()))
    return quantities


def pixels(images: NDArray[np.uint8]) -> dict[str, Floats]:
    """Return how saturated and how clipped N images (N, H, W, 3) are.

    Returns:
        saturation: The mean of (max - min) / max over the red, green and blue of a pixel (the S of
            HSV), 0 where it is black; in [0, 1], shape (N,).
        clipped: The share of red, green and blue values that are 0 or 255, in [0, 1], shape (N,).
    """
    largest, smallest = images.max(axis=-1).astype(np.float64), images.min(axis=-1)  # (N, H, W)
    saturation = (largest - smallest) / np.maximum(largest, 1.0)
    clipped = (images == 0) | (images == 255)
    return {
        "saturation": saturation.mean(axis=(1, 2)),
        "clipped": clipped.mean(axis=(1, 2, 3), dtype=np.float64),
    }


def pixel_features(images: Tensor) -> Tensor:
    """Embed images by their pixels alone.

    The images are averaged down to 8 x 8 pixels, in [-1, 1], divided by the root of their number,
    with a constant 1 behind them; then scaled to unit length. Without the constant grey would have
    no direction. Cosines are in [0, 1]: 1 for equal images, 0 for a black and a white one.

    Args:
        images: Shape (B, 3, H, W), in [0, 1].

    Returns:
        Features of unit length, shape (B, 193). Differentiable in images.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), _CELLS).flatten(1)
    centred = (2.0 * small - 1.0) / small.shape[1] ** 0.5
    features = torch.cat([centred, torch.ones_like(centred[:, :1])], dim=1)
    return torch.nn.functional.normalize(features, dim=1)


def means(quantities: Mapping[str, Quantity]) -> dict[str, float]:
    """Return the mean of every quantity."""
    return {name: quantity.mean for name, quantity in quantities.items()}


def _by_prompt(samples: Sequence[Sample], values: Floats) -> Floats:
    """Return the mean of values (N,) over the images of each prompt, in the prompts' order."""
    indices = np.array([sample.prompt_index for sample in samples])
    _, group, counts = np.unique(indices, return_inverse=True, return_counts=True)
    return np.bincount(group, weights=values) / counts
