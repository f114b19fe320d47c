"""How long a step takes, and the plans that are chosen by it."""

from __future__ import annotations

import pytest

from alignprop_cli.config import presets
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import GIB, Budget, Footprint
from alignprop_cli.planning.plan import PlanRequest
from alignprop_cli.planning.speed import Pace, Times

# Measured on an H200 (milliseconds for 1 and for 16 images; SD 1.5, bfloat16, LoRA rank 4): a
# roll-out call, a call with gradient both ways, decoder and reward both ways.
H200 = Times(
    rollout=Pace(63.3e-3, 148.67e-3 / 16),
    call=Pace(140e-3, 342.1e-3 / 16),
    decoder=Pace(57.56e-3, 568.07e-3 / 16),
    reward=Pace(35e-3, 56.51e-3 / 16),
    source="measured on an H200",
)

# Seconds an image of the best plans that a search over one common batch found, with the measured
# times themselves (by GiB of the card).
BEST = {
    "k1": {8: 3.4, 12: 1.7, 16: 0.9, 24: 0.6, 40: 0.5, 80: 0.5},
    "k10": {8: 5.0, 12: 2.3, 16: 1.2, 24: 0.9, 40: 0.9, 80: 0.7},
    "random": {8: 7.7, 12: 3.4, 16: 1.8, 24: 1.3, 40: 1.3, 80: 1.1},
}
FLAGS = {
    "k1": {"gradient.method": "last_k", "gradient.k": 1},
    "k10": {"gradient.method": "last_k", "gradient.k": 10},
    "random": {"gradient.method": "random_k"},
}


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return planning.measure(presets.resolve(preset="aesthetic"), "cuda")


def request(window: str) -> PlanRequest:
    return planning.plan_request(presets.resolve(preset="aesthetic", flags=FLAGS[window]), 1)


@pytest.mark.parametrize("window", BEST)
@pytest.mark.parametrize("gib", BEST["k1"])
def test_plans_by_the_times_of_an_h200_reach_the_best_of_one_common_batch(
    footprint: Footprint, window: str, gib: int
) -> None:
    budget = Budget(gib * GIB, "cuda", "--gpu-memory")
    plan = make_plan(request(window), footprint=footprint, budget=budget, times=H200)
    assert plan.seconds is not None
    # The figures above are rounded to 0.1 s.
    assert plan.seconds / plan.batch_size <= BEST[window][gib] + 0.05
