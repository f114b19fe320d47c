"""Plots for the pages: plain values, which templates/page.js gives to Plotly in the browser.

Plotly's own figure classes are not used: importing and validating them takes seconds, and a page
that is written while a model trains must not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from alignprop_cli.evaluation.compare import Metrics

# Points of a line; more cannot be told apart on a screen, and the page would grow with the run.
_MOST_POINTS = 1000
# Bins of a histogram: the root of the number of values, between these.
_FEWEST_BINS, _MOST_BINS = 6, 30
# Models in one histogram.
_MOST_MODELS = 4


@dataclass(frozen=True)
class Line:
    """One line, or the bars of one histogram.

    Args:
        name: For the legend.
        x: Where its values are.
        y: The values; None leaves a gap.
        kind: How it looks: `faint` is for single values behind their mean.
        colour: 0 is grey and the base model's; 1, 2, ... are the palette's.
        low: Lower ends of intervals around the values; None has none.
        high: Upper ends.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    kind: Literal["line", "faint", "points", "bars"] = "line"
    colour: int = 1
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """One small plot.

    Args:
        title: Above it.
        x_title: Below its x axis.
        lines: What it shows.
        level: A value to compare with, as a dashed line; None has none.
        mark: A place on the x axis, as a dotted line; None has none.
        share: Whether the values are shares, shown in per cent.
    """

    title: str
    x_title: str
    lines: Sequence[Line]
    level: float | None = None
    mark: float | None = None
    share: bool = False

    def plain(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        return cast(dict[str, Any], finite(asdict(self)))


Group = tuple[str, Sequence[Plot]]
"""A title, and plots that are shown together."""


def finite(value: Any) -> Any:
    """Return nested values with None for numbers that are not finite: JSON has none of them."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in cast(Sequence[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def thinned(xs: Sequence[float], ys: Sequence[Any]) -> tuple[list[float], list[Any]]:
    """Return at most a thousand points of a line, evenly chosen, the last among them."""
    stride = -(-len(xs) // _MOST_POINTS) or 1
    chosen = range((len(xs) - 1) % stride if xs else 0, len(xs), stride)
    return [xs[i] for i in chosen], [ys[i] for i in chosen]


def histogram(name: str, values: Mapping[str, Sequence[float] | NDArray[np.float64]]) -> Plot:
    """Return the distributions of one measure, one for each model, over the same bins.

    Args:
        name: Of the measure.
        values: By model, the base model's first; at least one value each.
    """
    # 1. The values of the first few models, since more bars cover each other.
    shown = {model: np.asarray(each, np.float64) for model, each in values.items()}
    shown = dict(list(shown.items())[:_MOST_MODELS])
    # 2. Bins that all share, so that the bars can be compared.
    everything = np.concatenate(list(shown.values()))
    everything = everything[np.isfinite(everything)]
    most = max(len(each) for each in shown.values())
    bins = min(max(round(2.0 * most**0.5), _FEWEST_BINS), _MOST_BINS)
    edges = bin_edges(everything, bins)
    centres = ((edges[1:] + edges[:-1]) / 2.0).tolist()
    # 3. The bars.
    lines = [
        Line(
            model,
            centres,
            # Shares of the images: models need not have the same number of them.
            (np.histogram(each, bins=edges)[0] / max(len(each), 1)).tolist(),
            "bars",
            colour,
        )
        # Grey is the base model's, beside others.
        for colour, (model, each) in enumerate(shown.items(), start=int(len(shown) == 1))
    ]
    return Plot(name, name, lines, share=True)


def bin_edges(values: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """Return the bins + 1 ends of bins of equal width, from the smallest value to the largest."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    # Equal ones lie in the middle; so do those between which there are too few numbers for ends,
    # which numpy refuses.
    room = 2 * bins * float(np.spacing(max(abs(low), abs(high))))
    if high - low < room:
        low, high = low - max(room, 0.5), high + max(room, 0.5)
    return np.linspace(low, high, bins + 1)


def sweep(xs: Sequence[float], metrics: Metrics, models: Sequence[str], axis: str) -> list[Plot]:
    """Return each metric over the values of x, with the interval of its difference to the base.

    Args:
        xs: One value for each model.
        metrics: By name and model; the base model is "base".
        models: In the order of xs.
        axis: Title of the x axis.
    """
    found: list[Plot] = []
    for name, by_model in metrics.items():
        base = by_model["base"].mean
        # The interval is of the difference; around the base model's mean it is in the plot's units.
        pairs = [by_model[model].paired for model in models]
        line = Line(
            name,
            list(xs),
            [by_model[model].mean for model in models],
            "points",
            low=[base + pair.low for pair in pairs if pair],
            high=[base + pair.high for pair in pairs if pair],
        )
        found.append(Plot(name, axis, [line], level=base))
    return found


@functools.cache
def plotly_source() -> str:
    """Return the JavaScript of Plotly, as its package has it: no page fetches anything."""
    # Here, since only a page that is written with plots needs it.
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
