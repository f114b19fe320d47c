"""How many objects of a kind a detector finds, as a reward: exactly N of them, or none.

A detector answers with Q queries. Each has a box and, for the wanted kind, the log-odds z_q that
the box holds such an object. Two steps lead from these to a number of objects.

1. Several queries may describe one object. Non-maximum suppression drops a query whose box overlaps
the box of a surer query by more than half (intersection over union), and at most 100 queries are
kept, called places. Boxes only decide which queries are kept; the log-odds of those keep their
gradient. Each object is represented by its surest query, which is a maximum, so the reward is
continuous where two queries change ranks.

2. The answers are not calibrated, and a hundred faint ones would add up to an object. So the odds
are divided by those of a threshold, and squared:

  p_q / (1 - p_q) = (odds_q / odds_threshold)^2.

An answer at the threshold counts half. The thresholds are those at which the library reports a
detection: 0.5 for YOLOS, 0.1 for OWLv2. The square is a choice, not measured.

If the places are independent, the number of objects K has a Poisson-binomial distribution. The
reward is log P(K = N): at most 0, which it reaches where exactly N places are sure and all others
are empty. Its gradient,

  d log P(K = N) / d log-odds_q = P(q is an object | K = N) - p_q,

sums to N - E[K] over the places, and does not fade when nothing is found: where all p are tiny the
sum tends to N, shared out among the places in proportion to their odds, so that the best candidates
rise. A count of the detections above a threshold has no gradient at all, and that of the expected
number E[K] vanishes with p (1 - p).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignprop_cli.errors import ConfigError
from alignprop_cli.rewards.detector import MOST, Detector, detector_on_meta
from alignprop_cli.rewards.frozen import FrozenReward, MetaReward

_MODEL = "hustvl/yolos-tiny"


class Count(FrozenReward):
    """rewards = log P(the image holds N objects of a kind), at most 0.

    exp(reward) is the detector's probability of exactly N objects, derived at the top of this file.

    Args:
        object: What to count, in the singular. For YOLOS one of its classes (the 80 of COCO, such
            as `cat` or `traffic light`); for OWLv2 any words.
        number: N, 0 to 100. None reads it from each prompt: the number, in digits or as a word up
            to twenty, that stands before the object ("two cats", "3 black cats").
        model: A folder or a hub id in transformers' format, of a YOLOS or an OWLv2, such as
            google/owlv2-base-patch16-ensemble.

    Raises:
        ConfigError: If the detector does not know the object or is of another kind, or the number
            is out of range; when called, if a prompt names no number.
        AssetError: If weights are missing or damaged, or the hub cannot be reached.

    Source: Fang et al. 2021, arXiv:2106.00666 (YOLOS); Minderer et al. 2023, arXiv:2306.09683
        (OWLv2). The likelihood is our own; VADER (arXiv:2407.08737) averages the scores of queries
        whose best class is the object's, which has no gradient where there is none.
    """

    def __init__(self, object: str, number: int | None = None, model: str = _MODEL) -> None:
        if number is not None and not 0 <= number <= MOST:
            raise ConfigError(f"reward.count.number: expected 0 to {MOST}, got {number}")
        self.object, self.number = object, number
        self.detector = Detector("count", object, model)
        self.networks = (self.detector.network,)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, model: str = _MODEL, **_options: Any) -> MetaReward | None:
        """Return the detector on the meta device; see `FrozenReward`."""
        return detector_on_meta("count", dtype, model)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return log P(K = N), shape (B,). Differentiable in images, also where none is found."""
        numbers = [
            number_in(prompt, self.object) if self.number is None else self.number
            for prompt in prompts
        ]
        log_odds = self.detector.places(images, numbers)
        return log_probability(log_odds, torch.tensor(numbers, device=log_odds.device))

    def expected(self, images: Tensor) -> Tensor:
        """Return the expected number of objects E[K], shape (B,). Differentiable in images."""
        return torch.sigmoid(self.detector.places(images)).sum(dim=1)


class Remove(FrozenReward):
    """rewards = log P(the image holds no object of a kind), at most 0.

    `Count` with the number 0: minus the sum over places of log(1 + odds). While the probabilities
    are small this is minus their sum; for sure detections it keeps growing with the log-odds.

    Args:
        object: As in `Count`.
        model: As in `Count`.

    Raises:
        ConfigError, AssetError: As `Count`.
    """

    def __init__(self, object: str, model: str = _MODEL) -> None:
        self.detector = Detector("remove", object, model)
        self.networks = (self.detector.network,)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, model: str = _MODEL, **_options: Any) -> MetaReward | None:
        """Return the detector on the meta device; see `FrozenReward`."""
        return detector_on_meta("remove", dtype, model)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return log P(K = 0), shape (B,). Differentiable in images."""
        return logsigmoid(-self.detector.places(images)).sum(dim=1)


def log_probability(log_odds: Tensor, numbers: Tensor) -> Tensor:
    """Return log P(K = N) of the number K of successes of independent trials.

    Adds one trial after the other: P_k <- (1 - p) P_k + p P_{k-1}, in logarithms.

    Args:
        log_odds: log(p / (1 - p)) of each trial, shape (B, trials).
        numbers: N of each row, 0 <= N <= trials, shape (B,), integers.

    Returns:
        Shape (B,), at most 0. Differentiable in log_odds.

    Source: the recursion of the Poisson-binomial distribution, Chen & Liu 1997, "Statistical
        applications of the Poisson-binomial and conditional Bernoulli distributions".
    """
    # log p and log (1 - p) of each trial: logsigmoid stays exact where 1 - p would round to 0.
    hit, miss = logsigmoid(log_odds), logsigmoid(-log_odds)
    # The table holds log P(K = 0), ..., log P(K = largest N). Before the first trial K is 0. Higher
    # numbers need no column: K only grows, so they never contribute to a lower one.
    never = log_odds.new_full((len(log_odds), 1), _IMPOSSIBLE_LOG)
    # sync point: the width of the table depends on the numbers.
    table = torch.cat([torch.zeros_like(never), never.expand(-1, int(numbers.max()))], dim=1)
    for trial in range(log_odds.shape[1]):
        raised = torch.cat([never, table[:, :-1]], dim=1)
        table = torch.logaddexp(table + miss[:, trial, None], raised + hit[:, trial, None])
    return table.gather(1, numbers[:, None])[:, 0]


# Not minus infinity: the gradient of logaddexp contains -inf - (-inf), which is NaN.
_IMPOSSIBLE_LOG = -1e9


def number_in(prompt: str, object: str) -> int:
    """Return the number of objects that a prompt asks for.

    It is the last number before the first mention of the object. Where the object is not found in
    the prompt (because of a plural such as "mice"), it is the only number in the prompt.

    Args:
        prompt: The text, such as "two cats and a dog".
        object: In the singular, such as "cat".

    Raises:
        ConfigError: If there is no such number, or it is none of those that are read, such as
            "thirty-two", "one hundred" or "1,000".
    """
    # 1. All numbers and where they start, as digits or as words; None for one that is not read.
    words = _WORDS.split("|")
    numbers: list[tuple[int, int | None]] = []
    for match in _NUMBER.finditer(prompt):
        found = match.group().lower()
        digits = int(found) if found.isdecimal() else None
        numbers.append((match.start(), words.index(found) if found in words else digits))
    # 2. The one that belongs to the object: in "two dogs and three cats" it is 3 for `cat`.
    mention = re.search(rf"\b{re.escape(object)}(s|es)?\b", prompt, re.IGNORECASE)
    number: int | None = None
    if mention:
        before = [number for start, number in numbers if start < mention.start()]
        number = before[-1] if before else None
    elif len({number for _, number in numbers}) == 1:
        number = numbers[0][1]
    if number is not None:
        return number
    raise ConfigError(
        f"reward.count.number: the prompt {prompt!r} names no number of '{object}'",
        hint="write the number before the object (two cats), or set reward.count.number",
    )


_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen|eighteen|nineteen|twenty"
)
# Words that are part of a number only, and numbers with all of their parts: "thirty-two" is not 2.
_PARTS = "thirty|forty|fifty|sixty|seventy|eighty|ninety|dozen|hundred|thousand|million"
_NUMBER = re.compile(
    rf"\b(?:\d+(?:[.,]\d+)*(?:[\s-]+(?:{_PARTS}))*"
    rf"|(?:{_WORDS}|{_PARTS})(?:[\s-]+(?:and\s+)?(?:{_WORDS}|{_PARTS}))*)\b",
    re.IGNORECASE,
)
