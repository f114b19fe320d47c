"""The language of the embedded model: its prompts, and drawings of them.

A prompt is "<count> <size> <colour> <shape> on a <background> background", for instance
"two small red circles on a dark blue background". The positions of the objects are free. torch is
not used, so that prompts can be listed and checked without loading it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 48

COUNTS = ("one", "two", "three", "four")
SIZES = {"small": (4.5, 5.1), "large": (6.4, 7.0)}
"""Range of the radius in pixels; for other shapes, that of a circle of the same area."""
COLOURS = {
    "red": (222, 40, 40),
    "yellow": (246, 214, 40),
    "green": (46, 178, 70),
    "blue": (56, 122, 242),
    "purple": (160, 62, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS = {
    "black": (16, 16, 20),
    "grey": (128, 128, 128),
    "dark blue": (22, 30, 92),
    "brown": (96, 60, 34),
    "pink": (248, 172, 188),
}

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

# Colours of a drawing differ from those above by up to this, of 255.
_SHADE = 6.0
# In radii: the distance of a triangle's tip from its centre, sqrt(4 pi / (3 sqrt(3))) = 1.555, the
# longest of all shapes, and the least distance of two centres, so that objects do not touch.
_REACH = 1.56
_APART = 3.0
# Inner over outer radius of a star.
_STAR_INNER = 0.45


@dataclass(frozen=True)
class Scene:
    """The parts of a prompt."""

    count: int
    size: str
    colour: str
    shape: str
    background: str

    @property
    def prompt(self) -> str:
        """Return the scene as a prompt."""
        plural = "s" if self.count > 1 else ""
        return (
            f"{COUNTS[self.count - 1]} {self.size} {self.colour} {self.shape}{plural} "
            f"on a {self.background} background"
        )


def scenes() -> list[Scene]:
    """Return every scene of the language, in a fixed order."""
    product = itertools.product(range(1, 5), SIZES, COLOURS, SHAPES, BACKGROUNDS)
    return [Scene(*values) for values in product]


def is_heldout(scene: Scene) -> bool:
    """Return whether training never sees this count of this shape in this colour.

    16 of the 96 triples (count, colour, shape) are held out, one colour for each count and shape.
    Every two words of a held-out triple are seen together in other triples.
    """
    # For each count and shape this is true for exactly one colour.
    triple = scene.count + list(COLOURS).index(scene.colour) + SHAPES.index(scene.shape)
    return triple % len(COLOURS) == 0


def train_prompts() -> list[str]:
    """Return the 800 prompts that training sees."""
    return [scene.prompt for scene in scenes() if not is_heldout(scene)]


def heldout_prompts() -> list[str]:
    """Return the 160 prompts that training never sees."""
    return [scene.prompt for scene in scenes() if is_heldout(scene)]


# All 960 prompts, so that parsing is a look-up.
_BY_PROMPT = {scene.prompt: scene for scene in scenes()}


def parse(prompt: str) -> Scene:
    """Return the scene of a prompt.

    Raises:
        ValueError: If the prompt is not of the language.
    """
    scene = _BY_PROMPT.get(" ".join(prompt.lower().split()))
    if scene is None:
        raise ValueError(f"not a prompt of the embedded model's language: {prompt!r}")
    return scene


def is_language(prompt: str) -> bool:
    """Return whether `parse` understands a prompt."""
    return " ".join(prompt.lower().split()) in _BY_PROMPT


def draw(prompt: str | Scene, rng: np.random.Generator) -> Pixels:
    """Draw a prompt.

    Args:
        prompt: A prompt of the language, or its scene.
        rng: Source of positions, radii and shades.

    Returns:
        Shape (48, 48, 3), uint8, anti-aliased.
    """
    scene = prompt if isinstance(prompt, Scene) else parse(prompt)
    background = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-_SHADE, _SHADE, 3)
    colour = np.array(COLOURS[scene.colour]) + rng.uniform(-_SHADE, _SHADE, 3)
    radius = rng.uniform(*SIZES[scene.size])
    drawing = np.broadcast_to(background, (SIZE_PX, SIZE_PX, 3)).copy()
    for centre in _place(scene.count, radius, rng):
        # Only the square around the object is computed, a fraction of the drawing.
        top_left = np.floor(centre - _REACH * radius - 1.0).astype(int).clip(0)
        bottom_right = np.ceil(centre + _REACH * radius + 1.0).astype(int).clip(max=SIZE_PX)
        size = bottom_right - top_left
        cover = coverage(scene.shape, centre - top_left, radius, (int(size[1]), int(size[0])))
        part = drawing[top_left[1] : bottom_right[1], top_left[0] : bottom_right[0]]
        part += cover[..., None] * (colour - part)
    return np.clip(np.rint(drawing), 0, 255).astype(np.uint8)


def draw_many(prompts: Sequence[str], count: int, seed: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Draw randomly chosen prompts.

    Returns:
        Drawings, shape (count, 48, 48, 3), uint8, and the index of each one's prompt, shape
        (count,).
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(prompts), size=count)
    parsed = [parse(prompt) for prompt in prompts]
    return np.stack([draw(parsed[i], rng) for i in chosen]), chosen


def coverage(shape: str, centre: Floats, radius: float, size: tuple[int, int]) -> Floats:
    """Return how much of each pixel a shape covers.

    All shapes have the area of a circle of this radius, so that the area does not give the shape
    away.

    Args:
        shape: One of `SHAPES`.
        centre: (x, y) in pixels from the top left corner.
        radius: In pixels.
        size: (height, width) of the result in pixels.

    Returns:
        Shape (height, width), in [0, 1].
    """
    # Coordinates of the pixels' middles, from the centre of the shape: (height, width).
    x, y = np.meshgrid(np.arange(size[1]) + 0.5 - centre[0], np.arange(size[0]) + 0.5 - centre[1])
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius * np.sqrt(np.pi) / 2.0
    else:
        distance = _polygon_distance(x, y, _corners(shape, radius))
    # Anti-aliased: coverage falls from 1 to 0 over the pixel that the edge runs through.
    return np.clip(0.5 - distance, 0.0, 1.0)


def _corners(shape: str, radius: float) -> Floats:
    """Return the corners of a triangle or star, shape (corners, 2), tip up, y pointing down."""
    # Distances of the corners from the centre follow from the area: 3 sqrt(3) / 4 r^2 for an
    # equilateral triangle, 5 sin(pi / 5) r_outer r_inner for a star of five tips.
    area = np.pi * radius**2
    if shape == "triangle":
        angles = np.arange(3) * 2.0 * np.pi / 3.0
        radii = np.full(3, np.sqrt(area * 4.0 / (3.0 * np.sqrt(3.0))))
    else:
        angles = np.arange(10) * np.pi / 5.0
        outer = np.sqrt(area / (5.0 * _STAR_INNER * np.sin(np.pi / 5.0)))
        radii = np.where(np.arange(10) % 2 == 0, outer, _STAR_INNER * outer)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _polygon_distance(x: Floats, y: Floats, corners: Floats) -> Floats:
    """Return the signed distance to a polygon, negative inside, shape of x."""
    # Edges from a to b, one for each corner: (corners, 1, 1), against pixels (height, width).
    ax, ay = corners[:, 0, None, None], corners[:, 1, None, None]
    after = np.roll(corners, -1, axis=0)
    bx, by = after[:, 0, None, None], after[:, 1, None, None]
    # The nearest point of an edge is a + along e, with `along` clipped to its ends.
    ex, ey = bx - ax, by - ay
    along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex**2 + ey**2), 0.0, 1.0)
    distance = np.hypot(x - ax - along * ex, y - ay - along * ey).min(axis=0)
    # Inside if a ray to the right crosses an odd number of edges. Horizontal edges, which divide by
    # zero, never cross it.
    crosses = (ay > y) != (by > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = x < ex * (y - ay) / ey + ax
    inside = np.logical_xor.reduce(crosses & left, axis=0)
    return np.where(inside, -distance, distance)


def _place(count: int, radius: float, rng: np.random.Generator) -> Floats:
    """Return centres (x, y), shape (count, 2), so that objects are inside and do not touch."""
    # Drop random candidates that are too close to an earlier one. 12 tries of 16 candidates suffice
    # for small objects and for few, but seldom for four large ones.
    margin, apart = _REACH * radius + 0.3, _APART * radius + 1.0
    for _ in range(12):
        tries = rng.uniform(margin, SIZE_PX - margin, size=(16, 2))
        centres: list[Floats] = []
        for candidate in tries:
            if all(np.hypot(*(candidate - other)) >= apart for other in centres):
                centres.append(candidate)
            if len(centres) == count:
                return np.array(centres)
    # If not, one in each quarter, moved inwards by at most what keeps them apart.
    slack = max(SIZE_PX - 2.0 * margin - apart, 0.0) / 2.0
    inset = margin + rng.uniform(0.0, slack, size=(4, 2))
    far = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=bool)
    quarters = np.where(far, SIZE_PX - inset, inset)
    return quarters[rng.permutation(4)[:count]]
