"""Self-contained HTML pages: one file with everything inside, and every text escaped.

Prompts are untrusted. The templates escape all values; data for scripts is JSON in a script element
of its own, in which no `<` is left; and each page forbids the browser to fetch anything.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignprop_cli import __version__
from alignprop_cli.evaluation import plots
from alignprop_cli.storage import write_text

TemplateError = jinja2.TemplateError
"""A mistake in one of our templates."""

# A page holds hundreds of thumbnails: at this size and quality each takes some 15 kB.
_LARGEST_PX = 256
_QUALITY = 85
# Up to this size the pixels of an image are what there is to see: enlarged, they stay sharp.
_PIXELATED_PX = 96


@dataclass(frozen=True)
class Thumbnail:
    """A small image inside the page.

    Args:
        source: The image as a `data:` address.
        file: The file of the full image, relative to the page; empty where there is none.
        width: Of the thumbnail, in pixels; with the height it keeps the page from jumping.
        height: As the width.
    """

    source: str
    file: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """Return whether its pixels are to stay sharp when it is enlarged."""
        return is_small((self.width, self.height))


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


def is_small(size: tuple[int, int]) -> bool:
    """Return whether an image of this width and height is shown with sharp pixels."""
    return max(size) <= _PIXELATED_PX


def thumbnail(image: NDArray[np.uint8], path: str = "") -> Thumbnail:
    """Return an image (H, W, 3) for a page, shrunk if it is large."""
    shown, buffer, kind = Image.fromarray(image), io.BytesIO(), "image/png"
    # A shrunk image has lost its pixels anyway, so JPEG does. PNG keeps those of a small one.
    if max(shown.size) > _LARGEST_PX:
        shown.thumbnail((_LARGEST_PX, _LARGEST_PX))
        shown.save(buffer, "JPEG", quality=_QUALITY)
        kind = "image/jpeg"
    else:
        shown.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:{kind};base64,{data}", path, *shown.size)


def write(
    path: Path,
    template: str,
    *,
    groups: Sequence[plots.Group] = (),
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> None:
    """Fill a template of alignprop_cli/evaluation/templates and write the page whole.

    Args:
        path: The file; its folder exists.
        template: Name of the template.
        groups: Plots, in the order in which the template shows them.
        data: For the page's script; numbers are finite.
        **values: Values for the template; all texts are escaped.
    """
    shown = [plot.plain() for _, group in groups for plot in group]
    environment = _environment()
    text = environment.get_template(template).render(
        version=__version__,
        # Our own, and Plotly's: the only texts that the template does not escape.
        style=_part("style.css"),
        script=_part("page.js"),
        plotly=plots.plotly_source() if shown else "",
        groups=groups,
        data={"plots": shown, **(data or {})},
        **values,
    )
    # A prompt of a JSON file may hold half a surrogate pair, which no file can.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


# Kept, since a report is written again and again: compiling takes as long as the rest.
@functools.cache
def _environment() -> jinja2.Environment:
    # Strict: a value that is missing is a mistake in the code, not an empty text.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignprop_cli.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    # In the order of the rewards, without blanks; `tojson` escapes what could end a script.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


@functools.cache
def _part(name: str) -> str:
    """Return one of our own files as it is: `{{` and `<` in it are not jinja's."""
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]
