"""The curves of a run for its report, from the lines of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignprop_cli.evaluation.plots import Group, Line, Plot, thinned

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl as values, by rising step."""

# Weight of the past in the smoothed values, as in the progress bar (callbacks.py).
_SMOOTHING = 0.8
# Measures that are shares.
_SHARES = ("all right", "clipped")


def groups(
    lines: Lines,
    base: Mapping[str, float],
    *,
    trained: Sequence[str],
    held_out: Sequence[str],
    calls: int,
    best: int | None,
) -> list[Group]:
    """Return all curves of a run, in the groups in which its report shows them.

    Args:
        lines: Of the run so far.
        base: What was measured on the base model's samples; empty where nothing is sampled.
        trained: Names of the rewards that are trained on.
        held_out: Names of the measures that are not.
        calls: T, network calls of one chain.
        best: The best step; None if there is none.
    """
    measured = list(dict.fromkeys(name for line in lines for name in _measures(line)))
    # In the middle of a run with other settings a measure may begin, or end.
    names = list(dict.fromkeys([*base, *measured]))
    others = [name for name in names if name not in trained and name not in held_out]
    found: list[tuple[str, list[Plot]]] = [
        (
            "Rewards",
            [
                *(_trained(lines, name, base, best) for name in trained),
                *(_sampled(lines, name, base, best, ", held out") for name in held_out),
            ],
        ),
        ("Other measures", [_sampled(lines, name, base, best) for name in others]),
        ("Optimisation", _optimisation(lines, calls)),
        ("Speed and memory", _speed(lines)),
    ]
    # Before the first step, and of what a run does not have, there is nothing to draw.
    return [
        (title, [p for p in plots if any(line.x for line in p.lines)]) for title, plots in found
    ]


def _measures(line: Mapping[str, Any]) -> Iterable[str]:
    return line.get("held_out", {})


def _trained(lines: Lines, name: str, base: Mapping[str, float], best: int | None) -> Plot:
    """Return the plot of a reward that is trained on: of the training's images and the samples."""
    steps = [line["step"] for line in lines if name in line.get("rewards", {})]
    means = [line["rewards"][name]["mean"] for line in lines if name in line.get("rewards", {})]
    shown = _smoothed("training, ", steps, means, colour=2)
    points = _points(lines, name, base)
    shown += [points] if points.x else []
    # The two are not alike: other prompts, and in training the chain may be shortened.
    level, title = base.get(name), f"{name}, trained on"
    return Plot(title, "step", shown, level=level, mark=best, share=name in _SHARES)


def _sampled(
    lines: Lines, name: str, base: Mapping[str, float], best: int | None, what: str = ""
) -> Plot:
    """Return the plot of what is measured on the fixed samples alone."""
    points, level = [_points(lines, name, base)], base.get(name)
    return Plot(f"{name}{what}", "step", points, level=level, mark=best, share=name in _SHARES)


def _points(lines: Lines, name: str, base: Mapping[str, float]) -> Line:
    """Return what was measured on the fixed samples, the base model's at step 0."""
    found = [(0, base[name])] if name in base else []
    found += [
        (line["step"], line["held_out"][name])
        for line in lines
        if name in _measures(line) and _is_number(line["held_out"][name])
    ]
    xs, ys = thinned([step for step, _ in found], [value for _, value in found])
    return Line("fixed samples", xs, ys, "points")


def _smoothed(start: str, steps: Sequence[int], values: Sequence[float], colour: int) -> list[Line]:
    """Return single values, and the exponential mean that can be read; nothing without values."""
    if not steps:
        return []
    # Beginning with the first value, not with 0: a curve that climbs from 0 would say nothing.
    mean, means = values[0], list[float]()
    for value in values:
        if math.isfinite(value):
            mean = _SMOOTHING * mean + (1.0 - _SMOOTHING) * value
        means.append(mean)
    xs, ys = thinned(steps, list(zip(values, means, strict=True)))
    return [
        Line(f"{start}each step", xs, [value for value, _ in ys], "faint", colour),
        Line(f"{start}smoothed", xs, [mean for _, mean in ys], "line", colour),
    ]


def _plain(lines: Lines, key: str, title: str, factor: float = 1.0) -> Plot:
    """Return a plot of what needs no smoothing; of nothing where no line has it."""
    found = [(line["step"], factor * line[key]) for line in lines if _is_number(line.get(key))]
    xs, ys = thinned([step for step, _ in found], [value for _, value in found])
    return Plot(title, "step", [Line(title, xs, ys)] if found else [])


def _noisy(lines: Lines, key: str, title: str, factor: float = 1.0, *, share: bool = False) -> Plot:
    found = [(line["step"], factor * line[key]) for line in lines if _is_number(line.get(key))]
    steps, values = [step for step, _ in found], [value for _, value in found]
    return Plot(title, "step", _smoothed("", steps, values, colour=1), share=share)


def _is_number(value: object) -> bool:
    # A skipped step has no loss and no gradient, and the folder may be somebody else's.
    return isinstance(value, int | float)


def _optimisation(lines: Lines, calls: int) -> list[Plot]:
    share = f"calls with gradient, of {calls}"
    return [
        _noisy(lines, "loss", "loss"),
        _noisy(lines, "grad_norm", "gradient norm, before clipping"),
        _plain(lines, "learning_rate", "learning rate"),
        _noisy(lines, "backprop_steps", share, 1.0 / calls, share=True),
        _noisy(lines, "path_share", "share of the path with gradient", share=True),
        _plain(lines, "lora_norm", "norm of the LoRA's weights"),
        _noisy(lines, "kl", "KL to the base model"),
    ]


def _speed(lines: Lines) -> list[Plot]:
    # Images of a step from the lines: the batch size is not among them.
    seen = {line["step"]: line["images_seen"] for line in lines if "images_seen" in line}
    hourly = [
        {"step": line["step"], "rate": 3600.0 * seen[line["step"]] / line["step"] / line["seconds"]}
        for line in lines
        if _is_number(line.get("seconds")) and line["seconds"] > 0 and line["step"] in seen
    ]
    return [
        _noisy(lines, "seconds", "seconds a step"),
        _noisy(hourly, "rate", "images an hour, without the evaluations"),
        _plain(lines, "peak_memory_gib", "peak memory so far, GiB"),
    ]
