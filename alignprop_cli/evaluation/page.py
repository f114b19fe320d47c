"""Self-contained HTML pages: one file with everything inside, and every text escaped.

Prompts are untrusted. The templates escape all values, and data for scripts is in attributes, never
inside a script.
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

# A page holds hundreds of thumbnails: at this size and quality each takes some 15 kB.
_LARGEST_PX = 256
_QUALITY = 85


@dataclass(frozen=True)
class Thumbnail:
    """A small image inside the page.

    Args:
        source: The image as a `data:` address.
        file: The file of the full image, relative to the page.
    """

    source: str
    file: str


@dataclass(frozen=True)
class Card:
    """One prompt on a page.

    Args:
        prompt: The prompt, not escaped.
        images: Thumbnail by model.
        captions: Caption by model.
        sorts: The card's value for each name that the page can be sorted by.
    """

    prompt: str
    images: Mapping[str, Thumbnail]
    captions: Mapping[str, str]
    sorts: Mapping[str, float]


def thumbnail(image: NDArray[np.uint8], path: str) -> Thumbnail:
    """Return an image (H, W, 3) for a page, shrunk if it is large."""
    shown, buffer = Image.fromarray(image), io.BytesIO()
    # A shrunk image has lost its pixels anyway, so JPEG does. PNG keeps those of a small one.
    if max(shown.size) > _LARGEST_PX:
        shown.thumbnail((_LARGEST_PX, _LARGEST_PX))
        shown.save(buffer, "JPEG", quality=_QUALITY)
        return Thumbnail(_inline("image/jpeg", buffer.getvalue()), path)
    shown.save(buffer, "PNG")
    return Thumbnail(_inline("image/png", buffer.getvalue()), path)


def file(path: Path) -> str:
    """Return the content of a PNG file as a `data:` address."""
    return _inline("image/png", path.read_bytes())


def write(path: Path, template: str, **values: Any) -> None:
    """Fill a template of alignprop_cli/evaluation/templates and write the page whole.

    Args:
        path: The file; its folder exists.
        template: Name of the template.
        **values: Values for the template; all texts are escaped.
    """
    # Strict: a value that is missing is a mistake in the code, not an empty text.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignprop_cli.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(template).render(version=__version__, **values)
    write_text(path, text)


def _inline(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
