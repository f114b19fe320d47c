"""When a change is harm: derived values, false alarms by simulation, and what a series leads to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignprop_cli.evaluation.measures import Quantity
from alignprop_cli.training.harm import Change, History, Rule, aim, change, merit

RULE = Rule()


def quantity(values: object, spread: float = 1.0) -> Quantity:
    return Quantity(np.array(values, dtype=float), spread)


def test_a_change_is_told_in_tolerances_and_in_standard_errors() -> None:
    base, now = quantity([1.0, 2.0, 3.0], spread=0.8), quantity([0.0, 1.5, 1.5], spread=9.0)
    found = change("pickscore", base, now, Rule(tolerance=0.5, standard_errors=2.0))
    # The differences are -1, -0.5 and -1.5: mean -1, deviation 0.5.
    assert (found.base, found.now) == (2.0, 1.0)
    assert found.harm == pytest.approx(1.0 / (0.5 * 0.8))
    assert found.standard_errors == pytest.approx(1.0 / (0.5 / math.sqrt(3)))
    better = change("pickscore", now, base, RULE)
    assert better.harm < 0
    assert not better.alarms


@pytest.mark.parametrize(
    ("name", "harm"),
    [("clip", -2.0), ("saturation", 2.0), ("clipped", 2.0), ("jpeg_kilobytes", 2.0)],
)
def test_of_colours_a_rise_is_harm_and_of_the_file_size_any_change(name: str, harm: float) -> None:
    base, now = quantity([0.0, 0.0, 0.0]), quantity([0.5, 1.0, 1.5])
    assert change(name, base, now, RULE).harm == pytest.approx(harm)
    assert change(name, now, base, RULE).harm == pytest.approx(2.0 if name[0] == "j" else -harm)


def test_diversity_is_tolerated_as_a_share_of_what_there_was() -> None:
    base, now = quantity([0.4, 0.2], 0.1), quantity([0.2, 0.1], 0.1)
    rule = Rule(diversity_tolerance=0.25)
    # Half of it is gone, twice what is tolerated.
    assert change("diversity", base, now, rule).harm == pytest.approx(2.0)
    # Of vendi 1 is nothing: 1.4 and 1.2 are half as much above it.
    base, now = quantity([1.4, 1.4], 0.1), quantity([1.2, 1.2], 0.1)
    assert change("vendi", base, now, rule).harm == pytest.approx(2.0)


def test_two_prompts_need_as_many_standard_errors_as_their_t_distribution_says() -> None:
    # With one degree of freedom Student's t is Cauchy's distribution: P(T > t) = 1/2 - atan(t)/pi.
    found = change("clip", quantity([1.0, 1.0]), quantity([0.0, 0.0]), Rule(standard_errors=3.0))
    assert 0.5 - math.atan(found.needed) / math.pi == pytest.approx(0.0013499, rel=1e-4)
    # Both fell by one deviation, and alike: the error is taken as that of one that does not.
    assert found.standard_errors == pytest.approx(2.0)
    assert found.harm == pytest.approx(2.0)
    assert not found.alarms


def test_one_prompt_never_alarms_and_nothing_is_no_harm() -> None:
    alone = change("clip", quantity([1.0]), quantity([-50.0]), RULE)
    assert alone.harm > 1
    assert not alone.alarms
    same = change("clip", quantity([0.0, 0.0], 0.0), quantity([0.0, 0.0], 0.0), RULE)
    assert (same.harm, same.standard_errors, same.alarms) == (0.0, 0.0, False)


def test_a_collapse_over_sixteen_prompts_alarms() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(16) < 0.5
    # From half right to none: one standard deviation.
    found = change("all right", quantity(base, 0.5), quantity(np.zeros(16), 0.0), RULE)
    assert found.alarms == (base.sum() >= 8)
    assert found.harm == pytest.approx(base.mean() / 0.25)


@pytest.mark.parametrize("prompts", [4, 16])
def test_what_is_called_clear_happens_by_chance_as_often_as_the_rule_says(prompts: int) -> None:
    # Without any true change, and with any change too much: P(T > t) is that of two deviations.
    rule, rng, count = Rule(tolerance=1e-9, standard_errors=2.0), np.random.default_rng(1), 3000
    base = quantity(np.zeros(prompts), spread=1e-9)
    alarms = sum(
        change("clip", base, quantity(d), rule).alarms for d in rng.normal(size=(count, prompts))
    )
    expected = 0.02275 * count
    assert abs(alarms - expected) < 4 * math.sqrt(expected)


def test_runs_without_harm_are_hardly_ever_stopped() -> None:
    # 15 measurements of 8 prompts that wander about the base model (correlated by 0.9 with the one
    # before), as far as training moves them: the chance of a stop is below 15 x 0.00135.
    rng, stopped, runs = np.random.default_rng(2), 0, 200
    base = quantity(np.zeros(8))
    for _ in range(runs):
        history, difference = History(patience=2), rng.normal(size=8)
        for step in range(15):
            found = change("clip", base, quantity(difference), RULE)
            history.add(step, ["clip"] if found.alarms else [], 0.0)
            if history.wants_to_stop:
                stopped += 1
                break
            difference = 0.9 * difference + math.sqrt(1 - 0.81) * rng.normal(size=8)
    expected = runs * 15 * 0.00135
    assert stopped < expected + 4 * math.sqrt(expected)


def test_a_series_stops_after_patience_and_the_best_is_from_before_the_harm() -> None:
    history = History(patience=2)
    series = [(2, [], 0.1), (4, [], 0.3), (6, ["diversity"], 0.9), (8, [], 0.3), (10, ["a"], 0.2)]
    bests = [history.add(*measured) for measured in series]
    # An equal value later is no better, and a better one with an alarm is not taken.
    assert bests == [True, True, False, False, False]
    assert (history.best, history.in_row, history.wants_to_stop) == ((4, 0.3), 1, False)
    history.add(12, ["a", "b"], 0.0)
    assert history.wants_to_stop
    assert history.alarms == ("a", "b")


def test_the_best_is_by_held_out_rewards_in_deviations_or_by_what_is_asked_for() -> None:
    base = {"hps": quantity([1.0], 0.5), "pick": quantity([4.0], 2.0), "all right": quantity([0.5])}
    now = {"hps": quantity([2.0]), "pick": quantity([3.0]), "all right": quantity([0.75])}
    aims = {"hps": aim(0.5, "maximise", None)}
    held_out = ["pick", "all right"]
    # (-1 / 2 + 0.25 / 1) / 2
    assert merit("held_out", base, now, held_out, aims) == pytest.approx(-0.125)
    assert merit("pick", base, now, held_out, aims) == pytest.approx(-0.5)
    # Without held-out rewards it is what is trained on; a negative weight wants less of it.
    assert merit("held_out", base, now, [], aims) == pytest.approx(2.0)
    assert merit("held_out", base, now, [], {"hps": aim(-2.0, "maximise", None)}) == pytest.approx(
        -2.0
    )


@pytest.mark.parametrize(
    ("kind", "target", "merit_now"),
    [
        ("target", 1.5, 0.0),  # from half below to half above
        ("target", 1.75, 1.0),  # 0.75 away, then 0.25
        ("target", 1.25, -1.0),
        ("hinge", 1.5, 1.0),  # the half that was missing, and nothing for the other one
        ("hinge", 0.5, 0.0),
    ],
)
def test_beyond_a_target_more_of_a_reward_is_not_better(
    kind: str, target: float, merit_now: float
) -> None:
    base, now = {"hps": quantity([1.0], 0.5)}, {"hps": quantity([2.0])}
    found = merit("held_out", base, now, [], {"hps": aim(1.0, kind, target)})
    assert found == pytest.approx(merit_now)


def test_an_alarm_needs_both() -> None:
    assert Change(0, 0, harm=1.1, standard_errors=4.0, needed=3.9).alarms
    assert not Change(0, 0, harm=0.9, standard_errors=4.0, needed=3.9).alarms
    assert not Change(0, 0, harm=1.1, standard_errors=3.8, needed=3.9).alarms
