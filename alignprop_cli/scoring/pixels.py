"""The pixels of an image file in any of Pillow's modes as bytes of red, green and blue."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST_PIXELS = 25_000_000
"""Pixels up to which an image is measured as it is; a larger one is scaled down by 2, 3, ..."""

Pixels = NDArray[np.uint8]

# Rows of the scaled image that are made at a time.
_ROWS = 16
# Tags of TIFF and EXIF by their numbers, and values of them.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 0x0112
_WHITE_IS_ZERO, _SIGNED = 0, 2
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def factor_of(size: tuple[int, int]) -> int:
    """Return by how much an image of (width, height) is scaled down; 1 leaves it as it is."""
    return math.ceil(math.sqrt(size[0] * size[1] / MOST_PIXELS))


def to_rgb(image: Image.Image) -> Pixels:
    """Return the pixels of a loaded image, shape (H, W, 3), upright, transparent parts white.

    Integers are scaled from their full range, floats from [0, 1]. A large image is scaled down:
    each pixel is the mean of a square of whole pixels.

    Raises:
        ValueError: If the file does not tell which value is white.
    """
    convert, factor = _converter(image), factor_of(image.size)
    if factor == 1:
        flat = convert(image)
    else:
        # In stripes, so that no second copy of a large image is made.
        width, height = image.size
        flat = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, factor * _ROWS):
            stripe = image.crop((0, top, width, min(top + factor * _ROWS, height)))
            flat.paste(convert(stripe).reduce(factor), (0, top // factor))
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return np.asarray(flat if turn is None else flat.transpose(turn))


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return the function that makes RGB of an image's mode."""
    tags = cast(Any, getattr(image, "tag_v2", {}))
    # Pillow reads the numbers of these as they are, whatever they stand for.
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("signed integers do not tell which value is white")
    negative = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if image.mode.startswith("I;16"):
        most = 2 ** min(tags.get(_BITS, (16,))) - 1
        return lambda part: _grey(_values(part) / most, part, negative=negative)
    if image.mode == "F":
        return lambda part: _grey(_unit(_values(part)), part, negative=negative)
    if image.mode == "I":
        raise ValueError("integers of 32 bits do not tell which value is white")
    if image.mode == "LAB":
        raise ValueError("LAB colours are not converted")
    return _flatten


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image).astype(np.float64)


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values in [0, 1] unchanged."""
    # Floats may also go from 0 to 255, or be radiances without an upper end. NaN fails too.
    if not bool(((values >= 0.0) & (values <= 1.0)).all()):
        raise ValueError(
            f"floating point values from {values.min():g} to {values.max():g}: outside [0, 1] "
            "they do not tell which value is white"
        )
    return values


def _grey(values: NDArray[np.float64], image: Image.Image, *, negative: bool) -> Image.Image:
    """Return a grey image of values in [0, 1], shape (H, W)."""
    scaled = (255.0 * (1.0 - values if negative else values)).round().astype(np.uint8)
    # One grey value may stand for transparent.
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled[np.asarray(image) == transparent] = 255
    return Image.fromarray(scaled).convert("RGB")


def _flatten(image: Image.Image) -> Image.Image:
    """Return an image of bytes as RGB, transparent parts white."""
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
