"""What the pages' plots show, and that data in a page cannot end its script."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_cli.evaluation import page, plots
from alignprop_cli.evaluation.compare import Metric, Paired


def test_a_histogram_is_the_shares_of_each_model_over_the_same_bins() -> None:
    base, tuned = np.arange(10.0), np.array([5.0, 15.0])
    found = plots.histogram("clip", {"base": base, "tuned": tuned})
    first, second = found.lines
    assert first.x == second.x
    width = first.x[1] - first.x[0]
    # From the smallest value of both to the largest.
    assert first.x[0] - width / 2 == pytest.approx(0.0)
    assert first.x[-1] + width / 2 == pytest.approx(15.0)
    for line, values in ((first, base), (second, tuned)):
        counted = [
            sum(x - width / 2 <= v < x + width / 2 or v == 15.0 == x + width / 2 for v in values)
            for x in line.x
        ]
        assert line.y == pytest.approx([n / len(values) for n in counted])
    assert (first.colour, second.colour) == (0, 1)


def test_equal_and_missing_values_have_a_histogram() -> None:
    assert sum(plots.histogram("clip", {"images": [0.5] * 4}).lines[0].y) == pytest.approx(1.0)
    assert set(plots.histogram("clip", {"images": []}).lines[0].y) == {0.0}


@pytest.mark.parametrize(
    "values", [[0.3, 0.30000000000000004], [1e17, 1e17 + 16.0], [0.0, 5e-324], [-2.0, -2.0]]
)
def test_values_with_no_room_for_bins_between_them_have_a_histogram(values: list[float]) -> None:
    # Of rewards in float64 that are the same up to rounding, which numpy refuses.
    line = plots.histogram("clip", {"images": values}).lines[0]
    assert sum(line.y) == pytest.approx(1.0)
    assert all(a < b for a, b in itertools.pairwise(line.x))
    assert line.x[0] < values[0] <= values[1] < line.x[-1]


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.integers(1, 30))
def test_bins_are_those_of_numpy_where_it_has_any(values: list[float], bins: int) -> None:
    if np.ptp(values) == 0.0 or np.ptp(values) > 1e-3:
        expected = np.histogram_bin_edges(values, bins=bins)
        assert plots.bin_edges(np.array(values), bins).tolist() == expected.tolist()


def test_a_sweep_has_the_interval_of_the_difference_around_the_base() -> None:
    def at(mean: float, low: float, high: float) -> Metric:
        return Metric(mean, 0.0, Paired(1.0, mean, mean - 1.0, low, high, 0.5, 0.0))

    metrics = {"clip": {"base": Metric(1.0, 0.0, None), "a": at(1.5, 0.2, 0.8)}}
    (found,) = plots.sweep([0.5], metrics, ["a"], "share")
    assert found.level == 1.0
    line = found.lines[0]
    assert (line.x, line.y, line.low, line.high) == ([0.5], [1.5], [1.2], [1.8])


@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 54321])
def test_a_thinned_line_has_at_most_a_thousand_points_and_the_last(count: int) -> None:
    xs, ys = plots.thinned(range(count), range(count))
    assert xs == ys
    assert len(xs) <= 1000
    assert xs[-1:] == ([count - 1] if count else [])
    assert len({b - a for a, b in itertools.pairwise(xs)}) <= 1


def test_no_data_ends_a_script_or_is_lost(tmp_path: Path) -> None:
    evil = "</script><!--<script>\u2028&'\"\ud800 {{ 1 }}"
    data = {"texts": [evil], "numbers": plots.finite([1.0, math.nan, math.inf])}
    page.write(
        tmp_path / "page.html", "gallery.html", title=evil, names=["clip"], cards=[], data=data
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    start = '<script type="application/json" id="data">'
    inside = text.partition(start)[2].partition("</script>")[0]
    assert "<" not in inside
    assert json.loads(inside) == {"plots": [], **data}
    # The title is escaped as text, but for half a surrogate, which no file can hold.
    assert "&lt;/script&gt;&lt;!--" in text.partition(start)[0]
    # Without plots the page has no Plotly.
    assert len(text) < 50_000
