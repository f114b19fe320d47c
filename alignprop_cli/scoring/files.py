"""Image files: find them, decode them as people see them."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alignprop_cli.errors import AssetError, RunError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Of Pillow's formats: others run programs (EPS) or are no images.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_LONGEST_RATIO = 50
# What Pillow's readers raise on files that are broken, no images, or too large.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_EXIF_FOLDER = 0x8769
_USER_COMMENT = 0x9286
# The standard's character codes, eight bytes each before the text.
_CHARACTER_CODES = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16-be", b"\0" * 8: "utf-8"}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """An image file, and the folder it was found through."""

    path: Path
    root: Path


@dataclass(frozen=True)
class Decoded:
    """An image as people see it.

    Args:
        pixels: RGB, shape (H, W, 3), uint8, upright, transparent parts white.
        texts: Those that the file holds: of a PNG by their key, of EXIF `UserComment`.
    """

    pixels: Pixels
    texts: dict[str, str]

    def digest(self) -> str:
        """Return 32 hexadecimal digits that images of the same size and pixels share."""
        hashed = hashlib.blake2b(str(self.pixels.shape).encode(), digest_size=16)
        hashed.update(np.ascontiguousarray(self.pixels).data)
        return hashed.hexdigest()


def expand_names(names: Iterable[str]) -> list[str]:
    """Return the names, with those that standard input has, a line each, instead of a dash."""
    found: list[str] = []
    for name in names:
        if name == "-":
            # As bytes: a file's name need not be UTF-8.
            lines = sys.stdin.buffer.read().split(b"\n")
            found += [os.fsdecode(line) for line in lines if line]
        else:
            found.append(name)
    return found


def find_images(names: Iterable[str]) -> list[Found]:
    """Return the image files that names stand for: files, folders with all below, patterns.

    Files that are named are taken whatever their ending; folders and patterns are sorted, and
    nothing comes twice.

    Raises:
        AssetError: If a name is neither a file nor a folder, or a pattern that fits nothing, or
            cannot be read.
        RunError: If there is no image among all of them.
    """
    found: dict[str, Found] = {}
    for name in names:
        # Not ~name, which may be a file's.
        path = Path(name).expanduser() if name.startswith("~/") else Path(name)
        try:
            # A file may well be called cat[1].png: a name comes before a pattern.
            places = _below(path) if path.exists() else _matches(path)
        except (OSError, ValueError) as error:
            raise AssetError(f"{name}: cannot be read: {error}") from error
        if places is None:
            raise AssetError(f"{name}: no such file or folder, and no pattern that fits one")
        for place in places:
            found.setdefault(named(place.path), place)
    if not found:
        raise RunError(
            "nothing was measured: no images were found",
            hint=f"folders are searched for {', '.join(SUFFIXES)}",
        )
    return list(found.values())


def named(path: Path) -> str:
    """Return the whole name of a file, without following links: what a link is called counts."""
    return os.path.normpath(path.absolute())


def _below(path: Path) -> list[Found]:
    """Return a file, or the image files in and below a folder."""
    if not path.is_dir():
        return [Found(path, path.parent)]
    # Path.rglob() would pass over it in silence.
    with os.scandir(path):
        return [Found(each, path) for each in sorted(filter(is_image, path.rglob("*")))]


def is_image(path: Path) -> bool:
    """Return whether a path is a file with the ending of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _matches(pattern: Path) -> list[Found] | None:
    """Return what a pattern fits, sorted; * within a name, ** for any folders.

    None where it fits nothing. The folder before the first such name is the one searched.
    """
    plain = [part for part in pattern.parts if glob.has_magic(part)]
    if not plain:
        return None
    # The folder before the first wildcard is the root from which tables of prompts name files.
    first = pattern.parts.index(plain[0])
    root = Path(*pattern.parts[:first])
    matching = sorted(root.glob(str(Path(*pattern.parts[first:]))))
    inside = (p for p in matching if p.is_dir() or is_image(p))
    found = [each for p in inside for each in (_below(p) if p.is_dir() else [Found(p, root)])]
    return [Found(each.path, root) for each in found] or None


def read_image(path: Path) -> Decoded:
    """Decode an image.

    Raises:
        ValueError: If it cannot be read, is animated, or a mere line; says why.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            # An MPO is a JPEG whose further images are previews or other views of the first.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError(f"animated, {getattr(image, 'n_frames', 0)} frames")
            if max(image.size) > _LONGEST_RATIO * min(image.size):
                # Scaled to a model's height it would fill the memory.
                raise ValueError(f"{image.width} x {image.height} px: too long for its width")
            image.load()  # all of it: a file that is cut short is refused here, not later
            texts = {
                k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)
            }
            if (comment := _user_comment(image)) is not None:
                texts["UserComment"] = comment
            return Decoded(np.asarray(_flatten(ImageOps.exif_transpose(image))), texts)
    except _UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def _user_comment(image: Image.Image) -> str | None:
    """Return the comment that EXIF holds; None where there is none in a known code."""
    value = image.getexif().get_ifd(_EXIF_FOLDER).get(_USER_COMMENT)
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else None
    encoding = _CHARACTER_CODES.get(value[:8])
    if encoding is None:
        return None
    text = value[8:].decode(encoding, errors="replace")
    if encoding == "utf-16-be" and _swapped(value[8:]):
        text = value[8:].decode("utf-16-le", errors="replace")
    return text.strip("\0 ")


def _swapped(data: bytes) -> bool:
    """Return whether UTF-16 is the other way round: most texts have many Latin letters."""
    return data[1::2].count(0) > data[::2].count(0)


def _flatten(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, transparent parts white."""
    if image.mode.startswith("I"):
        # 16 bits; Pillow's own conversion would clip instead of scale.
        values = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
