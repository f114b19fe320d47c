"""Join reports of `tests/benchmarks/estimators.py training`, and draw docs/figures/estimators.png.

A report holds any number of methods and seeds of one preset; each of them may be measured by a
process of its own. Printed is a table for each preset: the mean over seeds of what the tuned model
has more than the base model, and the least and the most of any seed. The figure has a row for each.

Run:  python docs/figures/estimators.py REPORT... > table.md
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

SHOWN = {
    "clip": "reward",
    "clip_choice": "held out",
    "all": "all right",
    "diversity": "diversity",
    "jpeg_kilobytes": "JPEG, kB",
}
# Shares in points of a hundred.
SCALE = {"all": 100.0}
PANELS = ("clip", "all")
INK, POINT = "#222222", "#4269d0"

Cells = dict[str, list[float]]
Rows = dict[tuple[str, str], Cells]
"""Of a preset: the values of each seed, by method and by what is equal."""


def read(files: list[str]) -> dict[str, Rows]:
    """Return what each preset's reports say."""
    every: dict[str, Rows] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for file in files:
        columns: list[str] = []
        text = Path(file).read_text(encoding="utf-8")
        preset = re.search(r"--preset (\S+)", text)
        assert preset is not None, file
        found = every[preset[1]]
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] == "method":
                columns = cells
            elif columns and len(cells) == len(columns) and cells[1] in ("images", "seconds"):
                for column, cell in zip(columns[2:], cells[2:], strict=True):
                    seeds = re.search(r"\((.*)\)", cell)
                    assert seeds is not None, cell
                    values = [float(value) for value in seeds[1].split(",")]
                    found[cells[0], cells[1]][column] += values
    return every


def table(found: Rows) -> list[str]:
    """Return the lines of a preset's table: a row for each method, best reward first."""
    shown = [name for name in SHOWN if all(name in cells for cells in found.values())]
    later = [name for name in PANELS if name in shown]
    names = ["method", "s a step", *(SHOWN[name] for name in shown), "steps in equal time"]
    names += [f"{SHOWN[name]} then" for name in later]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method in _by_reward(found):
        images, seconds = found[method, "images"], found[method, "seconds"]
        steps = sorted({int(value) for value in seconds["steps"]})
        row = [f"`{method}`", f"{_mean(images, 'step seconds'):.2f}"]
        row += [_cell(images, name) for name in shown]
        row += [f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"]
        row += [_cell(seconds, name) for name in later]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _cell(cells: Cells, name: str) -> str:
    """Return the mean over the seeds, and the least and the most of any."""
    values = [SCALE.get(name, 1.0) * value for value in cells[name]]
    digits = 1 if name in SCALE else 3
    numbers = (sum(values) / len(values), min(values), max(values))
    mean, low, high = (f"{number:+.{digits}f}" for number in numbers)
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def _by_reward(found: Rows) -> list[str]:
    methods = [method for method, equal in found if equal == "images"]
    return sorted(methods, key=lambda method: -_mean(found[method, "images"], "clip"))


def draw(every: dict[str, Rows], path: Path) -> None:
    """Draw every seed as a point and the means as bars, best reward at equal images first."""
    heights = [len(found) / 2 + 1.5 for found in every.values()]
    figure, axes = plt.subplots(
        len(every),
        2,
        figsize=(8, 0.32 * sum(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for pair, (preset, found) in zip(axes, every.items(), strict=True):
        methods = _by_reward(found)
        for place, name in zip(pair, PANELS, strict=True):
            panel(place, found, methods, name)
            if found is list(every.values())[-1]:
                unit = " (points)" if name in SCALE else ""
                place.set_xlabel(f"{SHOWN[name]}, tuned - base{unit}")
        pair[0].set_yticks(range(len(methods)), methods)
        pair[0].invert_yaxis()
        pair[0].set_title(preset, loc="left", fontsize=10)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="upper right", ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def panel(place: Axes, found: Rows, methods: list[str], name: str) -> None:
    """Draw one quantity of one preset."""
    for row, method in enumerate(methods):
        for equal, shift, colour in (("images", -0.14, "#9aa5b1"), ("seconds", 0.14, POINT)):
            values = [SCALE.get(name, 1.0) * v for v in found[method, equal][name]]
            rows = [row + shift] * len(values)
            place.plot(values, rows, "o", ms=3.5, alpha=0.55, color=colour, mew=0)
            mean = sum(values) / len(values)
            label = f"equal {equal}" if row == 0 else None
            place.plot([mean], [row + shift], "|", ms=11, mew=2, color=colour, label=label)
    place.axvline(0.0, color=INK, lw=0.6)
    place.grid(axis="x", alpha=0.25)
    place.spines[["top", "right", "left"]].set_visible(False)


def _mean(cells: Cells, name: str) -> float:
    return sum(cells[name]) / len(cells[name])


if __name__ == "__main__":
    reports = read(sys.argv[1:])
    for preset, found in reports.items():
        sys.stdout.write("\n".join([f"{preset}:", "", *table(found), "", ""]))
    draw(reports, Path(__file__).with_suffix(".png"))
