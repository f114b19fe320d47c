"""Read from an image of the embedded model what it shows, without a neural network.

The background is the median colour of the border. Objects are the connected pieces that differ from
it. The colour is the nearest one of the language. The shape is that of the template that overlaps a
piece best, by majority over the pieces.
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

# Area of the smallest object, about a third of that in a drawing; smaller pieces are specks.
_SMALLEST_PX = 22
# Side of the window on which pieces and templates are compared. The widest shape of a drawing takes
# 22 pixels, so pieces may be larger. Odd, so that there is a pixel in the middle.
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
        """Return whether all parts are right."""
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
    """Return for each part of the prompts which of the N images have it right, shape (N,).

    Empty if a prompt is not of the language or the images have another size than its drawings.
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
    # 1. Smooth the noise a little, less than the width of an edge.
    pixels = ndimage.gaussian_filter(image.astype(np.float64), (0.5, 0.5, 0.0))
    # 2. The background: objects rarely reach the two outer pixels, and the median ignores a few.
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    # 3. The colour of the objects, from the pixels that differ most. 98.5 % as a maximum without
    # outliers; at least 50, so that noise on an empty image is not taken for an object.
    away = np.sqrt(((pixels - ground) ** 2).sum(axis=-1))
    core = away > 0.75 * max(float(np.quantile(away, 0.985)), 50.0)
    background = _nearest(ground, BACKGROUNDS)
    if not core.any():
        return Seen(background, "", "", 0)
    paint = np.median(pixels[core], axis=0)
    # 4. The pieces. Coverage is how far a pixel's colour is on the line from the background to the
    # objects; half covered is the edge.
    way = paint - ground
    cover = ((pixels - ground) @ way / (way @ way)).clip(0.0, 1.0)
    labels, found = ndimage.label(cover > 0.5)  # (48, 48), numbered from 1
    areas = ndimage.sum_labels(np.ones_like(cover), labels, np.arange(1, found + 1))
    pieces = [number for number, area in enumerate(areas, start=1) if area >= _SMALLEST_PX]
    # 5. One shape for all, since a prompt has only one.
    shapes = Counter(_shape(cover, labels, number) for number in pieces)
    shape = shapes.most_common(1)[0][0] if shapes else ""
    return Seen(background, _nearest(paint, COLOURS), shape, len(pieces))


def _nearest(colour: Floats, named: Mapping[str, tuple[int, int, int]]) -> str:
    """Return the name of the nearest colour."""
    return min(named, key=lambda name: float(((colour - np.array(named[name])) ** 2).sum()))


def _shape(cover: Floats, labels: NDArray[np.int32], number: int) -> str:
    """Return the shape whose template overlaps a piece best."""
    # Only this piece, with one more pixel around it for its anti-aliased edge.
    mine = ndimage.binary_dilation(labels == number)
    piece = np.where(mine, cover, 0.0)
    area = float(piece.sum())
    # A template of the same area and centre. Both are rounded to quarter pixels, so that the cache
    # of templates is used.
    radius = round(float(np.sqrt(area / np.pi)) * 4.0) / 4.0
    y, x = ndimage.center_of_mass(piece)
    half = _WINDOW_PX // 2
    padded = np.pad(piece, half)
    top, left = round(y), round(x)
    window = padded[top : top + _WINDOW_PX, left : left + _WINDOW_PX]
    shift = (round((x - left) * 4.0) / 4.0, round((y - top) * 4.0) / 4.0)
    # Intersection over union, with coverages for areas.
    overlap = {
        shape: float(np.minimum(window, template).sum() / np.maximum(window, template).sum())
        for shape in SHAPES
        for template in [_template(shape, radius, shift)]
    }
    return max(overlap, key=lambda shape: overlap[shape])


@functools.lru_cache(maxsize=4096)
def _template(shape: str, radius: float, shift: tuple[float, float]) -> Floats:
    """Return the coverage of a shape whose centre is `shift` pixels from the window's middle."""
    middle = _WINDOW_PX // 2 + 0.5
    centre = np.array([middle + shift[0], middle + shift[1]])
    return coverage(shape, centre, radius, (_WINDOW_PX, _WINDOW_PX))
