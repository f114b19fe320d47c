"""Find image files, and decode them as people see them."""

from __future__ import annotations

import fnmatch
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
from PIL import Image, UnidentifiedImageError, features

from alignprop_cli.config.schema import EMBEDDED_MODELS
from alignprop_cli.errors import AssetError, ConfigError, RunError, first_line
from alignprop_cli.paths import reason
from alignprop_cli.scoring.pixels import MOST_PIXELS, Pixels, factor_of, to_rgb

# Formats that are read, and the suffixes of their files in folders. Of Pillow's other formats some
# run programs (EPS), and some are not images.
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]
if features.check("avif"):
    _FORMATS.append("AVIF")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
    *(".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"),
)
# Images too, which are counted as skipped: a folder of them is not empty.
_OTHERS = (
    *(".heic", ".heif", ".hif", ".svg", ".svgz", ".jxl", ".psd", ".psb", ".ai", ".eps", ".ico"),
    *(".tga", ".dds", ".exr", ".hdr", ".pfm", ".pbm", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k"),
    *(".pcx", ".qoi", ".xcf", ".kra", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf"),
    *(".rw2", ".raf"),
)
# Formats whose readers hold several copies of an image.
_WHOLE = ("WEBP", "AVIF")
# Characters of a name in a message.
_SHOWN = 200
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

FIRST_FRAME = "animated: the first frame was measured"
SCALED = f"larger than {MOST_PIXELS / 1e6:.0f} megapixels: scaled down before it was measured"


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
        remark: What was done to it, `FIRST_FRAME` or `SCALED`; None if it is measured as it is.
    """

    pixels: Pixels
    texts: dict[str, str]
    remark: str | None = None

    def digest(self) -> str:
        """Return 32 hexadecimal digits that are the same for images of equal size and pixels."""
        # With the shape: images of 2 x 3 and 3 x 2 pixels may have the same bytes.
        hashed = hashlib.blake2b(str(self.pixels.shape).encode(), digest_size=16)
        hashed.update(np.ascontiguousarray(self.pixels).data)
        return hashed.hexdigest()


def expand_names(names: Iterable[str]) -> list[str]:
    """Return the names, with each dash replaced by the lines of standard input.

    Raises:
        ConfigError: If standard input is closed.
    """
    found: list[str] = []
    for name in names:
        if name == "-":
            # Python has none where the shell has closed it.
            if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise ConfigError("-: standard input is closed, and names were to be read from it")
            # Read as bytes: file names need not be UTF-8.
            lines = sys.stdin.buffer.read().split(b"\n")
            found += [os.fsdecode(line) for line in lines if line]
        else:
            found.append(name)
    return found


def find_images(names: Iterable[str]) -> list[Found]:
    """Return the image files that names stand for: files, folders with all below them, patterns.

    A file that is named is taken whatever its suffix. Those of a folder or a pattern are sorted,
    and no file is returned twice. Images of formats that are not read are among them, and folders
    in a folder that cannot be read, so that they are counted.

    Raises:
        AssetError: If a name cannot be read, is a pipe or a device, or is neither a file or folder
            nor a pattern that matches one.
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
            raise AssetError(f"{name[:_SHOWN]}: cannot be read: {reason(error)}") from error
        if places is None:
            raise AssetError(
                f"{name[:_SHOWN]}: no such file or folder, and no pattern that matches one"
            )
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
    if path.is_file():
        return [Found(path, path.parent)]
    if not path.is_dir():
        raise AssetError(f"{path} is a pipe or a device, expected a file or a folder")
    # scandir raises if the folder cannot be read, which walking would ignore.
    with os.scandir(path):
        pass
    # A folder in it that cannot be read takes the place of its images, and is counted as skipped.
    closed: list[OSError] = []
    places = os.walk(path, onerror=closed.append)
    walked = (Path(folder) / name for folder, _, names in places for name in names)
    images = [each for each in walked if is_image(each)]
    return [Found(each, path) for each in sorted([*images, *(Path(e.filename) for e in closed)])]


def is_image(path: Path) -> bool:
    """Return whether a path is a file with the suffix of an image, or a link that leads nowhere."""
    suffix = path.suffix.lower()
    return (suffix in SUFFIXES or suffix in _OTHERS) and (path.is_file() or path.is_symlink())


def _matches(pattern: Path) -> list[Found] | None:
    """Return the image files that a pattern matches, sorted; None where it matches nothing.

    * matches within a name, ** any folders. Folders that match are searched too.
    """
    wild = [part for part in pattern.parts if glob.has_magic(part)]
    if not wild:
        return None
    if any("**" in part and part != "**" for part in wild):
        # Python 3.13 takes it for a single *, and leaves out what is below.
        raise ValueError("** stands for folders, alone between two slashes, such as **/*.png")
    # File names in tables may be relative to the root, the folder before the first wildcard.
    first = pattern.parts.index(wild[0])
    root, parts = Path(*pattern.parts[:first]), pattern.parts[first:]
    matching = sorted(root.glob(str(Path(*parts))))
    inside = (p for p in matching if p.is_dir() or is_image(p))
    found = [each for p in inside for each in (_below(p) if p.is_dir() else [Found(p, root)])]
    # As in `_below`: glob passes over folders that cannot be read.
    places = sorted([*(each.path for each in found), *_closed(root, parts)])
    return [Found(each, root) for each in places] or None


def _closed(root: Path, parts: tuple[str, ...]) -> list[Path]:
    """Return the folders below which a pattern might match, and that cannot be read.

    Raises:
        OSError: If the root cannot be read; not if it is no folder.
    """
    found: list[Path] = []
    coming: list[tuple[str, ...]] = [()] if root.is_dir() else []
    while coming:
        names = coming.pop()
        folder = root.joinpath(*names)
        try:
            with os.scandir(folder) as entries:
                inside = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:
            if not names:
                raise
            found.append(folder)
        else:
            coming += [(*names, name) for name in inside if _leads_on((*names, name), parts)]
    return found


def _leads_on(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Return whether a pattern might match something below a folder, given by its names."""
    for name, part in zip(names, parts, strict=False):
        if part == "**":
            return True
        if not fnmatch.fnmatchcase(name, part):
            return False
    return len(names) < len(parts)


def read_image(path: Path) -> Decoded:
    """Decode an image.

    Raises:
        ValueError: If the image cannot be read, is animated and no GIF, is too long or too large,
            or does not tell which value is white; says why.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return _read(image)
    except UnidentifiedImageError as error:
        if path.suffix.lower() in _OTHERS:
            raise ValueError(f"{path.suffix} files are not read") from error
        raise ValueError(first_line(error)) from error
    except _UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def _read(image: Image.Image) -> Decoded:
    """Decode an opened image; raises whatever Pillow raises, or a ValueError."""
    size, frames, remark = image.size, getattr(image, "n_frames", 1), None
    # An MPO is a JPEG whose further images are previews or other views of the first.
    if frames > 1 and image.format != "MPO":
        if image.format != "GIF":
            raise ValueError(f"animated, {frames} frames")
        image.seek(0)
        remark = FIRST_FRAME
    if max(size) > _LONGEST_RATIO * min(size):
        raise ValueError(f"{size[0]} x {size[1]} px: too long for its width")
    if (factor := factor_of(size)) > 1:
        if image.format in _WHOLE and size[0] * size[1] > 2 * MOST_PIXELS:
            raise ValueError(f"{size[0]} x {size[1]} px: too large for a {image.format}")
        # Only readers of JPEG can scale while they read, by 2, 4 or 8.
        image.draft(None, (size[0] // factor, size[1] // factor))
        remark = SCALED
    image.load()  # all of it, so that a truncated file is refused here
    # Pillow keeps the texts of a PNG in `info`, together with values of other types.
    texts = {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}
    if (comment := _user_comment(image)) is not None:
        texts["UserComment"] = comment
    return Decoded(to_rgb(image), texts, remark)


def drawn_by_embedded(path: Path) -> bool:
    """Return whether an image says that this program drew it with an embedded model."""
    try:
        # The texts of a PNG come before its pixels, which are not read here.
        with Image.open(path, formats=("PNG",)) as image:
            made = str(image.info.get("Software", ""))
            return made.startswith("alignprop ") and image.info.get("model") in EMBEDDED_MODELS
    except _UNREADABLE:
        return False


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
    return text.strip("\0 \ufeff")


def _swapped(data: bytes) -> bool:
    """Return whether UTF-16 is little-endian."""
    # The high byte of a Latin letter, of which most texts have many, is 0.
    return data[1::2].count(0) > data[::2].count(0)
