"""Whether a model has become worse than the base model on the same prompts and noise, and the best.

Nothing is decided by a single number: a change must be larger than is tolerated, and clear, which
few images seldom make it. Both are taken from differences prompt by prompt, in which the prompts'
own spread cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

from alignprop_cli.config.guard import HELD_OUT, SPREAD
from alignprop_cli.evaluation.measures import Quantity

# Which way is worse: of all others it is down.
_WORSE = {"saturation": 1.0, "clipped": 1.0, "jpeg_kilobytes": 0.0}
# The most standard errors that are told: a difference without any spread has infinitely many.
_MOST = 1.0e6


@dataclass(frozen=True)
class Rule:
    """When a change counts; the fields are those of `config.guard.GuardConfig`."""

    tolerance: float = 0.5
    diversity_tolerance: float = 0.25
    standard_errors: float = 3.0
    patience: int = 2


@dataclass(frozen=True)
class Change:
    """One quantity, of the base model and now.

    Args:
        base: Its mean over the prompts, of the base model.
        now: The same of the present model.
        harm: By how much it is worse, as a multiple of what is tolerated; negative if better.
        standard_errors: The same as a multiple of the standard error of the paired difference.
        needed: Standard errors from which on it is clear.
    """

    base: float
    now: float
    harm: float
    standard_errors: float
    needed: float

    @property
    def alarms(self) -> bool:
        """Return whether it is worse than tolerated, and clearly so."""
        return self.harm > 1.0 and self.standard_errors > self.needed


def change(name: str, base: Quantity, now: Quantity, rule: Rule) -> Change:
    """Compare a quantity of two models on the same prompts and noise.

    With d the P differences of the prompts and s the base model's deviation over images:

        harm = -mean(d) / (tolerance s), for diversity and vendi as a share of what the base has;
        standard_errors = -mean(d) / max(std(d) / sqrt(P), s / P).

    s / P is the standard error if a single prompt differs from all others by s: without it a few
    prompts that happen to change alike would seem certain. Where a rise is worse the sign is +, for
    the size of files both ways are.

    Args:
        name: Of the quantity.
        base: Of the base model.
        now: Of the present one; the same prompts.
        rule: What is tolerated, and what is clear.
    """
    # 1. By how much it is worse.
    difference = now.by_prompt - base.by_prompt
    count, mean = len(difference), float(difference.mean())
    worse = _WORSE.get(name, -1.0)
    amount = worse * mean if worse else abs(mean)
    # 2. In units of the tolerance. Of vendi 1 is what equal images have.
    tolerated = rule.tolerance * base.spread
    if name in SPREAD:
        tolerated = rule.diversity_tolerance * (base.mean - (1.0 if name == "vendi" else 0.0))
    # 3. In standard errors; as many of them as are needed are as improbable with few prompts as
    #    `rule.standard_errors` with many.
    error, needed = math.inf, math.inf
    if count > 1:
        error = max(float(difference.std(ddof=1)) / math.sqrt(count), base.spread / count)
        needed = float(stats.t.isf(stats.norm.sf(rule.standard_errors), count - 1))
    return Change(
        base.mean,
        now.mean,
        _ratio(amount, tolerated),
        _ratio(amount, error),
        min(needed, _MOST),
    )


def _ratio(amount: float, unit: float) -> float:
    """Return a quotient that JSON can hold; nothing is many times of nothing at all."""
    if amount == 0.0:
        return 0.0
    return max(-_MOST, min(_MOST, amount / unit)) if unit > 0.0 else math.copysign(_MOST, amount)


def merit(
    name: str,
    base: Mapping[str, Quantity],
    now: Mapping[str, Quantity],
    held_out: Collection[str],
    trained: Mapping[str, Callable[[float], float]],
) -> float:
    """Return by what the best checkpoint is chosen; higher is better, 0 is the base model.

    Args:
        name: A quantity, or `held_out`: the mean of all held-out ones, of the trained ones where
            there are none, each in standard deviations of the base model's images.
        base: Quantities of the base model.
        now: The same of the present model.
        held_out: Names of those that are not trained on.
        trained: The rewards that are trained on, each with how good a mean of it is, see `aim`.
    """
    changes: list[float] = []
    for one in judged(name, base, held_out, trained):
        good = trained.get(one, _as_it_is) if name == HELD_OUT else _as_it_is
        changes.append((good(now[one].mean) - good(base[one].mean)) / (base[one].spread or 1.0))
    return math.fsum(changes) / max(len(changes), 1)


def judged(
    name: str, base: Collection[str], held_out: Collection[str], trained: Collection[str]
) -> list[str]:
    """Return the names of the quantities that `merit` is made of, with its arguments."""
    if name != HELD_OUT:
        return [name] if name in base else []
    return [one for one in held_out if one in base] or list(trained)


def aim(weight: float, kind: str, target: float | None) -> Callable[[float], float]:
    """Return how good a reward that is trained on is, in its own units, as its loss has it.

    Args:
        weight: Of its loss; of a negative one only the sign counts.
        kind: Of its loss.
        target: Of its loss; beyond that no more is gained, and with the kind `target` lost.
    """
    sign = math.copysign(1.0, weight)
    if kind == "maximise" or target is None:
        return lambda reward: sign * reward
    if kind == "hinge":
        return lambda reward: sign * min(reward - target, 0.0)
    return lambda reward: -sign * abs(reward - target)


def _as_it_is(value: float) -> float:
    return value


@dataclass
class History:
    """What the measurements of a run have said so far.

    Args:
        patience: Measurements in a row with an alarm after which the run is to stop.

    Attributes:
        best: Step and merit of the best measurement without an alarm; None while none was better
            than the base model.
        in_row: Measurements up to the last, without a gap, in which something alarmed.
        alarms: What alarmed in the last one.
    """

    patience: int
    best: tuple[int, float] | None = None
    in_row: int = 0
    alarms: tuple[str, ...] = field(default=())

    def add(self, step: int, alarms: Sequence[str], value: float) -> bool:
        """Take in a measurement; return whether it is the best so far."""
        self.alarms, self.in_row = tuple(alarms), self.in_row + 1 if alarms else 0
        # The base model has merit 0: what is not better is not worth keeping.
        if alarms or value <= (self.best[1] if self.best else 0.0):
            return False
        self.best = (step, value)
        return True

    @property
    def wants_to_stop(self) -> bool:
        """Return whether it has been worse than tolerated for too long."""
        return self.in_row >= self.patience
