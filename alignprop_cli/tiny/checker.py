"""Read an image of the embedded model's language back, without any network.

Background: the median colour of what is not an object. Objects: what differs from the border's
colour, in connected pieces. Colour: the nearest of the language's. Shape: the template that
overlaps a piece best, by majority over the pieces.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from alignprop_cli.tiny.language import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE_PX,
    Floats,
    Pixels,
    coverage,
    is_language,
    parse,
)

# Smaller pieces are specks, not objects: about a third of the smallest object's area.
_SMALLEST_PX = 22
# Pieces are compared with templates on a window of this many pixels.
_WINDOW_PX = 33


@dataclass(frozen=True)
class Check:
    """Which parts of a prompt an image has right."""

    background: bool
    colour: bool
    shape: bool
    count: bool

    @property
    def all_right(self) -> bool:
        """Return whether nothing is wrong."""
        return self.background and self.colour and self.shape and self.count


@dataclass(frozen=True)
class Seen:
    """What is in an image; colour and shape are empty where there is no object."""

    background: str
    colour: str
    shape: str
    count: int


def check(images: Pixels, prompts: Sequence[str]) -> list[Check]:
    """Compare images with their prompts.

    Args:
        images: Shape (B, 48, 48, 3), uint8.
        prompts: B prompts of the language.

    Raises:
        ValueError: If a prompt is not of the language.
    """
    result: list[Check] = []
    for image, prompt in zip(images, prompts, strict=True):
        seen, scene = look(image), parse(prompt)
        result.append(
            Check(
                background=seen.background == scene.background,
                colour=seen.colour == scene.colour,
                shape=seen.shape == scene.shape,
                count=seen.count == scene.count,
            )
        )
    return result


def check_parts(images: Pixels, prompts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return which images have each part of their prompt right, shape (N,) each.

    Empty where a prompt is not of the language or the images are not of its size.
    """
    if images.shape[1:3] != (SIZE_PX, SIZE_PX) or not all(map(is_language, prompts)):
        return {}
    found = check(images, prompts)
    parts = {part: part for part in ("background", "colour", "shape", "count")}
    return {
        name: np.array([getattr(one, part) for one in found])
        for name, part in (parts | {"all": "all_right"}).items()
    }


def look(image: Pixels) -> Seen:
    """Read one image, shape (48, 48, 3), uint8."""
    pixels = ndimage.gaussian_filter(image.astype(np.float64), (0.5, 0.5, 0.0))
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    away = np.sqrt(((pixels - ground) ** 2).sum(axis=-1))
    core = away > 0.75 * max(float(np.quantile(away, 0.985)), 50.0)
    background = _nearest(ground, BACKGROUNDS)
    if not core.any():
        return Seen(background, "", "", 0)
    paint = np.median(pixels[core], axis=0)
    # How far along the way from the ground's colour to the objects': coverage, anti-aliased.
    way = paint - ground
    cover = ((pixels - ground) @ way / (way @ way)).clip(0.0, 1.0)
    labels, found = ndimage.label(cover > 0.5)
    areas = ndimage.sum_labels(np.ones_like(cover), labels, np.arange(1, found + 1))
    pieces = [number for number, area in enumerate(areas, start=1) if area >= _SMALLEST_PX]
    shapes = Counter(_shape(cover, labels, number) for number in pieces)
    shape = shapes.most_common(1)[0][0] if shapes else ""
    return Seen(background, _nearest(paint, COLOURS), shape, len(pieces))


def _nearest(colour: Floats, named: Mapping[str, tuple[int, int, int]]) -> str:
    """Return the name of the nearest colour."""
    return min(named, key=lambda name: float(((colour - np.array(named[name])) ** 2).sum()))


def _shape(cover: Floats, labels: NDArray[np.int32], number: int) -> str:
    """Return the shape whose template overlaps a piece best."""
    # One pixel more than the piece, for its anti-aliased rim.
    mine = ndimage.binary_dilation(labels == number)
    piece = np.where(mine, cover, 0.0)
    area = float(piece.sum())
    radius = round(float(np.sqrt(area / np.pi)) * 4.0) / 4.0
    y, x = ndimage.center_of_mass(piece)
    half = _WINDOW_PX // 2
    padded = np.pad(piece, half)
    top, left = round(y), round(x)
    window = padded[top : top + _WINDOW_PX, left : left + _WINDOW_PX]
    shift = (round((x - left) * 4.0) / 4.0, round((y - top) * 4.0) / 4.0)
    overlap = {
        shape: float(np.minimum(window, template).sum() / np.maximum(window, template).sum())
        for shape in SHAPES
        for template in [_template(shape, radius, shift)]
    }
    return max(overlap, key=lambda shape: overlap[shape])


@functools.lru_cache(maxsize=4096)
def _template(shape: str, radius: float, shift: tuple[float, float]) -> Floats:
    """Return a shape whose centre of mass is `shift` pixels from the window's middle."""
    middle = _WINDOW_PX // 2 + 0.5
    centre = np.array([middle + shift[0], middle + shift[1]])
    return coverage(shape, centre, radius, (_WINDOW_PX, _WINDOW_PX))
