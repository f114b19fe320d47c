"""Find image files, and decode them as people see them."""

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

# Of Pillow's other formats some run programs (EPS), and some are not images.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
# Scaled to the height that a model reads, an image longer than this would fill the memory.
_LONGEST_RATIO = 50
# What Pillow's readers raise on files that are damaged, not images, or too large.
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
# Tags of EXIF, by their numbers in the standard.
_EXIF_FOLDER = 0x8769
_USER_COMMENT = 0x9286
# A comment begins with eight bytes that name its encoding. Zeros leave it open: UTF-8 is tried.
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
        texts: The texts in the file: those of a PNG by their key, and EXIF's `UserComment`.
    """

    pixels: Pixels
    texts: dict[str, str]

    def digest(self) -> str:
        """Return 32 hexadecimal digits that are the same for images of equal size and pixels."""
        # With the shape: images of 2 x 3 and 3 x 2 pixels may have the same bytes.
        hashed = hashlib.blake2b(str(self.pixels.shape).encode(), digest_size=16)
        hashed.update(np.ascontiguousarray(self.pixels).data)
        return hashed.hexdigest()


def expand_names(names: Iterable[str]) -> list[str]:
    """Return the names, with each dash replaced by the lines of standard input."""
    found: list[str] = []
    for name in names:
        if name == "-":
            # Read as bytes: file names need not be UTF-8.
            lines = sys.stdin.buffer.read().split(b"\n")
            found += [os.fsdecode(line) for line in lines if line]
        else:
            found.append(name)
    return found


def find_images(names: Iterable[str]) -> list[Found]:
    """Return the image files that names stand for: files, folders with all below them, patterns.

    A file that is named is taken whatever its suffix. Those of a folder or a pattern are sorted,
    and no file is returned twice.

    Raises:
        AssetError: If a name cannot be read, or is neither a file or folder nor a pattern that
            matches one.
        RunError: If there are no images at all.
    """
    found: dict[str, Found] = {}
    for name in names:
        # A file may be called ~name, so only ~/ is expanded.
        path = Path(name).expanduser() if name.startswith("~/") else Path(name)
        try:
            # A file may be called cat[1].png, so names come before patterns.
            places = _below(path) if path.exists() else _matches(path)
        except (OSError, ValueError) as error:
            raise AssetError(f"{name}: cannot be read: {error}") from error
        if places is None:
            raise AssetError(f"{name}: no such file or folder, and no pattern that matches one")
        for place in places:
            found.setdefault(named(place.path), place)
    if not found:
        raise RunError(
            "nothing was measured: no images were found",
            hint=f"folders are searched for {', '.join(SUFFIXES)}",
        )
    return list(found.values())


def named(path: Path) -> str:
    """Return the absolute name of a file; a link keeps its own name."""
    return os.path.normpath(path.absolute())


def _below(path: Path) -> list[Found]:
    """Return a file, or the image files in and below a folder."""
    if not path.is_dir():
        return [Found(path, path.parent)]
    # scandir raises if the folder cannot be read, which Path.rglob() would ignore.
    with os.scandir(path):
        return [Found(each, path) for each in sorted(filter(is_image, path.rglob("*")))]


def is_image(path: Path) -> bool:
    """Return whether a path is a file with the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _matches(pattern: Path) -> list[Found] | None:
    """Return the image files that a pattern matches, sorted; None where it matches nothing.

    * matches within a name, ** any folders. Folders that match are searched too.
    """
    wild = [part for part in pattern.parts if glob.has_magic(part)]
    if not wild:
        return None
    # File names in tables may be relative to the root, the folder before the first wildcard.
    first = pattern.parts.index(wild[0])
    root = Path(*pattern.parts[:first])
    matching = sorted(root.glob(str(Path(*pattern.parts[first:]))))
    inside = (p for p in matching if p.is_dir() or is_image(p))
    found = [each for p in inside for each in (_below(p) if p.is_dir() else [Found(p, root)])]
    return [Found(each.path, root) for each in found] or None


def read_image(path: Path) -> Decoded:
    """Decode an image.

    Raises:
        ValueError: If the image cannot be read, is animated or is too long; says why.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            # An MPO is a JPEG whose further images are previews or other views of the first.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError(f"animated, {getattr(image, 'n_frames', 0)} frames")
            if max(image.size) > _LONGEST_RATIO * min(image.size):
                raise ValueError(f"{image.width} x {image.height} px: too long for its width")
            image.load()  # all of it, so that a truncated file is refused here
            # Pillow keeps the texts of a PNG in `info`, together with values of other types.
            texts = {
                k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)
            }
            if (comment := _user_comment(image)) is not None:
                texts["UserComment"] = comment
            return Decoded(np.asarray(_flatten(ImageOps.exif_transpose(image))), texts)
    except _UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def _user_comment(image: Image.Image) -> str | None:
    """Return the comment of EXIF; None if there is none, or its encoding is unknown."""
    value = image.getexif().get_ifd(_EXIF_FOLDER).get(_USER_COMMENT)
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else None
    encoding = _CHARACTER_CODES.get(value[:8])
    if encoding is None:
        return None
    text = value[8:].decode(encoding, errors="replace")
    # The standard does not give the byte order, and programs differ.
    if encoding == "utf-16-be" and _swapped(value[8:]):
        text = value[8:].decode("utf-16-le", errors="replace")
    return text.strip("\0 ")


def _swapped(data: bytes) -> bool:
    """Return whether UTF-16 is little-endian."""
    # The high byte of a Latin letter, of which most texts have many, is 0.
    return data[1::2].count(0) > data[::2].count(0)


def _flatten(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, transparent parts white."""
    if image.mode.startswith("I"):
        # 16 bits, 65535 = 257 x 255. Pillow's own conversion would clip instead of scale.
        values = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
