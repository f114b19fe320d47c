"""How long a run will take: counted by hand from made-up times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from alignprop_cli.config.schema import Config
from alignprop_cli.training.callbacks import Run
from alignprop_cli.training.forecast import Forecast, duration
from alignprop_cli.training.record import StepRecord


def forecast(steps: int, seconds: list[float], *, begun: int = 0, every: int = 20) -> list[str]:
    """Return what is said in a run whose steps take these times."""
    said: list[str] = []
    values: Any = {"train": {"steps": steps}, "eval": {"every": every}}
    run = SimpleNamespace(
        config=Config.model_validate({**values, "reward": {"brightness": {}}}),
        samples=range(16),
        held_out=range(100),
        image_seconds=0.5,
        console=SimpleNamespace(note=said.append),
    )
    told = Forecast()
    told.before_training(cast(Run, run))
    for number, taken in enumerate(seconds, start=begun + 1):
        told.after_step(cast(StepRecord, SimpleNamespace(step=number, seconds=taken)))
    return said


def test_what_is_left_is_steps_and_images() -> None:
    # 57 steps of (2 + 4) / 2 s; samples after 20, 40 and 60, and those at the end: 148 of 0.5 s.
    # 171 + 74 = 245 s.
    assert forecast(60, [30.0, 2.0, 4.0, 9.0]) == [
        "about 4 min left: 57 steps of 3.0 s, and 148 images to compare"
    ]
    # Resumed after step 30: 27 steps, samples after 40 and 60.
    assert forecast(60, [30.0, 1.0, 1.0], begun=30) == [
        "about 2 min left: 27 steps of 1.0 s, and 132 images to compare"
    ]
    # 27 + 66 = 93 s, from 90 s on in minutes. Nothing is sampled in between without `eval.every`.
    assert forecast(60, [30.0, 1.0, 1.0], begun=30, every=0) == [
        "about 77 s left: 27 steps of 1.0 s, and 100 images to compare"
    ]


def test_short_runs_say_nothing() -> None:
    assert forecast(7, [1.0] * 7) == []
    assert len(forecast(8, [1.0] * 8)) == 1


@pytest.mark.parametrize(
    ("seconds", "words"), [(40, "40 s"), (89.4, "89 s"), (720, "12 min"), (12240, "3.4 h")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
