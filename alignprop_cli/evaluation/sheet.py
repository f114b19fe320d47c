"""Images for people: a contact sheet with prompts and rewards, files with metadata, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CURVES = "curves.png"
"""The file of a run's curves."""

# Sizes in pixels; a sheet of this width fits the screen of a laptop.
_TILE = 192
_MARGIN = 24
_PAIR_GAP = 8
_CELL_GAP = 28
_WIDTH = 1680
_PROMPT_LINES = 3
_CAPTION_LINES = 3

_PAPER = (255, 255, 255)
_INK = (24, 24, 27)
_GREY = (110, 110, 118)


@dataclass(frozen=True)
class Cell:
    """One prompt on a contact sheet.

    Args:
        prompt: Its text, wrapped under the images.
        images: One per title of the sheet, each of shape (H, W, 3), uint8.
        captions: A text under each image, such as its rewards.
    """

    prompt: str
    images: tuple[Pixels, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Text:
    """A font and the height of one line of it."""

    font: Font
    line: int

    @classmethod
    def of_size(cls, size: int) -> _Text:
        return cls(ImageFont.load_default(size=size), round(size * 1.35))


def contact_sheet(cells: Sequence[Cell], path: Path, *, titles: Sequence[str]) -> None:
    """Write a PNG with all cells in rows, the images of a cell side by side.

    Args:
        cells: At least one, each with as many images and captions as there are titles.
        path: The file; its folder exists.
        titles: Titles of the images of a cell, such as ("base", "tuned").

    Raises:
        ValueError: If there is no cell, or the numbers of images, captions and titles differ.
    """
    if not cells:
        raise ValueError("a contact sheet needs at least one cell")
    for index, cell in enumerate(cells):
        if not len(cell.images) == len(cell.captions) == len(titles):
            raise ValueError(
                f"cell {index} has {len(cell.images)} images and {len(cell.captions)} captions "
                f"for {len(titles)} titles"
            )
    # 1. Sizes: cells in a row, and the height of the text below the images of each row.
    heading, body, small = _Text.of_size(17), _Text.of_size(14), _Text.of_size(12)
    cell_width = len(titles) * (_TILE + _PAIR_GAP) - _PAIR_GAP
    fitting = (_WIDTH - 2 * _MARGIN + _CELL_GAP) // (cell_width + _CELL_GAP)
    # Rows as equal as possible: eight cells where seven fit become two rows of four.
    columns = math.ceil(len(cells) / math.ceil(len(cells) / max(1, fitting)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    captions = [_caption_height(row, small) for row in rows]
    heights = [
        _TILE + caption + body.line * max(len(_prompt_lines(c, body, cell_width)) for c in row)
        for row, caption in zip(rows, captions, strict=True)
    ]
    top = _MARGIN + heading.line + _PAIR_GAP
    width = 2 * _MARGIN + columns * (cell_width + _CELL_GAP) - _CELL_GAP
    height = top + sum(heights) + _CELL_GAP * (len(rows) - 1) + _MARGIN
    # 2. The empty sheet, with the titles above the first row.
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns if len(titles) > 1 else 1):
        for index, title in enumerate(titles):
            left = _left(column, cell_width) + index * (_TILE + _PAIR_GAP)
            draw.text((left, _MARGIN), _one_line(title), fill=_INK, font=heading.font)
    # 3. Row by row: images, captions, prompts.
    for row, caption, row_height in zip(rows, captions, heights, strict=True):
        for column, cell in enumerate(row):
            left, below = _left(column, cell_width), top + _TILE + caption
            _draw_images(sheet, cell, (left, top), small)
            for number, line in enumerate(_prompt_lines(cell, body, cell_width)):
                draw.text((left, below + number * body.line), line, fill=_INK, font=body.font)
        top += row_height + _CELL_GAP
    sheet.save(path, format="PNG", optimize=True)


def save_image(image: Pixels, path: Path, metadata: Mapping[str, str]) -> None:
    """Write one image as PNG with text chunks.

    Args:
        image: Shape (H, W, 3), uint8.
        path: The file; its folder exists.
        metadata: Keys of 1 to 79 Latin characters, texts of any kind.
    """
    info = PngInfo()
    for key, value in metadata.items():
        # In a PNG a NUL would end the text.
        info.add_text(key, value.replace("\0", ""))
    Image.fromarray(image).save(path, format="PNG", pnginfo=info)


def _left(column: int, cell_width: int) -> int:
    return _MARGIN + column * (cell_width + _CELL_GAP)


def _fit(image: Pixels) -> Image.Image:
    """Return the image, scaled so that its longer side fills a tile."""
    shown = Image.fromarray(image)
    scale = _TILE / max(shown.size)
    size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
    # Small images are enlarged without smoothing: their pixels are what there is to see.
    return shown.resize(
        size, Image.Resampling.NEAREST if scale >= 2.0 else Image.Resampling.LANCZOS
    )


def _prompt_lines(cell: Cell, body: _Text, cell_width: int) -> list[str]:
    return _wrap(cell.prompt, body.font, cell_width, _PROMPT_LINES)


def _caption_height(row: Sequence[Cell], small: _Text) -> int:
    """Return the height of the captions of a row, from its images to its prompts."""
    texts = [text for cell in row for text in cell.captions]
    lines = max(len(_wrap(text, small.font, _TILE, _CAPTION_LINES)) for text in texts)
    return 5 + lines * small.line + 3


def _draw_images(sheet: Image.Image, cell: Cell, corner: tuple[int, int], small: _Text) -> None:
    """Draw the images of a cell side by side, the caption under each."""
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(cell.images, cell.captions, strict=True)):
        shown = _fit(image)
        x = left + index * (_TILE + _PAIR_GAP)
        # Images that are not square are centred, at the bottom of their tile.
        sheet.paste(shown, (x + (_TILE - shown.width) // 2, top + _TILE - shown.height))
        for number, line in enumerate(_wrap(caption, small.font, _TILE, _CAPTION_LINES)):
            place = (x, top + _TILE + 5 + number * small.line)
            draw.text(place, line, fill=_GREY, font=small.font)


def _one_line(text: str) -> str:
    """Return a text with blanks for line breaks and unprintable characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _wrap(text: str, font: Font, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` pixels, with an ellipsis if it is cut.

    Words that are too long for a line are broken.
    """
    # By width, not by number of characters: an m is four times as wide as an i.
    lines: list[str] = []
    line = ""
    for word in _one_line(text).split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        # One line more than `most` is enough to know that the text has to be cut.
        while len(lines) <= most and font.getlength(word) > width:
            head = _longest_start(word, font, width)
            lines.append(head)
            word = word[len(head) :]
        line = word
        if len(lines) > most:
            break
    lines += [line] if line else []
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "..."]


def _longest_start(word: str, font: Font, width: int) -> str:
    """Return the longest beginning of a word that fits, at least one character."""
    end = 1
    while end < len(word) and font.getlength(word[: end + 1]) <= width:
        end += 1
    return word[:end]


def curves(
    xs: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    path: Path,
    *,
    x_title: str,
    level: Mapping[str, float] | None = None,
    mark: float | None = None,
) -> None:
    """Write a PNG with one small plot per measure, all over the same values of x.

    Args:
        xs: At least two values, rising.
        ys: By measure, one value for each x.
        path: The file; its folder exists.
        x_title: Title of the x axes.
        level: By measure, a value to compare with, drawn as a dashed line.
        mark: A value of x to mark in all plots.
    """
    # Imported here, since matplotlib takes a second and few commands plot anything.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(ys))
    rows = math.ceil(len(ys) / columns)
    figure: Any = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    # The grid may have more plots than there are measures; the others stay hidden.
    axes: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes, ys.items(), strict=False):
        axis.set_visible(True)
        axis.plot(xs, values, marker="o", color="#2563eb")
        if level is not None:
            axis.axhline(level[name], color="#6e6e76", linestyle="--", linewidth=1)
        if mark is not None:
            axis.axvline(mark, color="#16a34a", linestyle=":", linewidth=1.5)
        axis.set_title(name, fontsize=11, parse_math=False)
        axis.set_xlabel(x_title)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
