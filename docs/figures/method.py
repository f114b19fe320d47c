"""Draw docs/figures/method.png: one training step, forward and backward.

Run:  python docs/figures/method.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FILE = Path(__file__).with_name("method.png")
INK, GRADIENT = "#1f2933", "#c2410c"
PLAIN, ROLLOUT, WINDOW, FROZEN = "#f3f4f6", "#dbeafe", "#ffedd5", "#e5e7eb"

Box = tuple[float, float, str, str]
BOXES: tuple[Box, ...] = (
    (0.0, 1.2, "noise,\nprompt", PLAIN),
    (1.8, 1.3, "network\n+ LoRA", ROLLOUT),
    (4.2, 1.3, "network\n+ LoRA", ROLLOUT),
    (6.1, 1.3, "network\n+ LoRA", WINDOW),
    (8.0, 1.3, "network\n+ LoRA", WINDOW),
    (10.3, 1.3, "decoder", FROZEN),
    (12.5, 1.3, "reward", FROZEN),
    (14.4, 1.0, "loss", PLAIN),
)
"""Left edge, width, text and colour, from noise to loss."""

BRACKETS = (
    (1.8, 5.5, "roll-out: no gradient,\nnothing stored", INK),
    (6.1, 9.3, "the last K calls,\nwith gradient", GRADIENT),
    (10.3, 13.8, "frozen, but differentiable", INK),
)


def box(axes: Axes, left: float, width: float, text: str, colour: str, height: float) -> None:
    """Draw a rounded box centred at a height."""
    style = "round,pad=0.0,rounding_size=0.1"
    axes.add_patch(
        FancyBboxPatch((left, height - 0.42), width, 0.84, boxstyle=style, fc=colour, ec=INK)
    )
    axes.text(left + width / 2, height, text, ha="center", va="center", color=INK, fontsize=10.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw an arrow between two points."""
    width = 1.3 if colour == INK else 2.0
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0.0, "shrinkB": 0.0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, lw=width, **style))


def main() -> None:
    """Draw the chain from left to right, and the gradient from right to left below it."""
    figure, axes = plt.subplots(figsize=(12.0, 4.0))
    axes.set(xlim=(-0.1, 15.5), ylim=(-1.75, 2.6))
    axes.axis("off")

    # 1. Forward: T network calls, of which the last K carry gradient, then decoder and reward.
    for left, width, text, colour in BOXES:
        box(axes, left, width, text, colour, 1.0)
    for (left, width, *_), (following, *_) in itertools.pairwise(BOXES):
        arrow(axes, (left + width, 1.0), (following, 1.0), INK)
    axes.text(3.65, 1.0, " . . . ", ha="center", va="center", fontsize=13, backgroundcolor="white")
    axes.text(9.8, 1.12, "latents", ha="center", color=INK, fontsize=9)
    axes.text(12.05, 1.12, "images", ha="center", color=INK, fontsize=9)
    for left, right, text, colour in BRACKETS:
        axes.plot([left, left, right, right], [1.58, 1.68, 1.68, 1.58], color=colour, lw=1.2)
        middle = (left + right) / 2
        axes.text(middle, 1.8, text, ha="center", va="bottom", color=colour, fontsize=10.5)

    # 2. Backward: from the loss through every differentiable part, and no further than the window.
    stops = (14.9, 13.15, 10.95, 8.65, 6.75)
    axes.plot([stops[0], stops[0]], [0.58, 0.1], color=GRADIENT, lw=2.0)
    for start, end in itertools.pairwise(stops):
        arrow(axes, (start, 0.1), (end, 0.1), GRADIENT)
    axes.plot([5.8, 5.8], [-0.2, 0.4], color=GRADIENT, lw=3.0)
    axes.plot([6.75, 5.8], [0.1, 0.1], color=GRADIENT, lw=2.0)
    axes.text(5.6, 0.1, "the gradient stops here", ha="right", va="center", color=GRADIENT)

    # 3. Every call of the window contributes to the gradient of the same LoRA.
    box(axes, 5.6, 4.2, "one update of the LoRA weights", WINDOW, -1.2)
    for stop in stops[-2:]:
        arrow(axes, (stop, 0.1), (stop, -0.78), GRADIENT)

    figure.savefig(FILE, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
