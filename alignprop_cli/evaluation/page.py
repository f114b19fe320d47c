"""Self-contained HTML pages: everything inside one file, every text escaped.

Prompts are untrusted. The templates escape what they are given, and data for scripts stands in
attributes, never inside a script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignprop_cli import __version__
from alignprop_cli.storage import write_text

_LARGEST_PX = 256
_QUALITY = 85


@dataclass(frozen=True)
class Thumbnail:
    """A small image inside the page, and the file of the large one, relative to the page."""

    source: str
    file: str


@dataclass(frozen=True)
class Card:
    """One prompt on a page.

    Args:
        prompt: As it is.
        images: By model.
        captions: By model.
        sorts: What the page can be sorted by.
    """

    prompt: str
    images: Mapping[str, Thumbnail]
    captions: Mapping[str, str]
    sorts: Mapping[str, float]


def thumbnail(image: NDArray[np.uint8], path: str) -> Thumbnail:
    """Return an image (H, W, 3) small enough for a page; small ones stay as they are."""
    shown, buffer = Image.fromarray(image), io.BytesIO()
    # JPEG where a photograph was shrunk anyway; PNG keeps every pixel of a small image.
    if max(shown.size) > _LARGEST_PX:
        shown.thumbnail((_LARGEST_PX, _LARGEST_PX))
        shown.save(buffer, "JPEG", quality=_QUALITY)
        return Thumbnail(_inline("image/jpeg", buffer.getvalue()), path)
    shown.save(buffer, "PNG")
    return Thumbnail(_inline("image/png", buffer.getvalue()), path)


def file(path: Path) -> str:
    """Return a PNG file as an address that holds it."""
    return _inline("image/png", path.read_bytes())


def write(path: Path, template: str, **values: Any) -> None:
    """Fill a template of alignprop_cli/evaluation/templates and write it whole.

    Args:
        path: The file; its folder exists.
        template: Name of the template.
        **values: What it shows; all texts are escaped.
    """
    # Strict: a template that names what it is not given is a mistake, not an empty text.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignprop_cli.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(template).render(version=__version__, **values)
    write_text(path, text)


def _inline(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
