"""What makes a plan fit where none does: the options that are named do it, and fewer do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.planning import request as planning
from alignprop_cli.planning import smaller
from alignprop_cli.planning.choose import fits_at_all, make_plan
from alignprop_cli.planning.estimate import Budget, Footprint, expected_correction
from alignprop_cli.planning.plan import PlanRequest
from alignprop_cli.training import setup
from tests.planning import test_plan


def config(*flags: str) -> Config:
    given = ["sample.num_inference_steps=2", "gradient.method=full", "train.batch_size=2"]
    open_ = [f"gradient.checkpoint_{part}=auto" for part in ("network", "decoder", "reward")]
    given += ["train.micro_batch=auto", *open_]
    return presets.resolve(preset="tiny", assignments=[*given, *flags])


_counted: dict[str, Footprint] = {}


def measure(config: Config) -> Footprint:
    """Count a configuration once."""
    key = config.model_dump_json()
    if key not in _counted:
        _counted[key] = planning.measure(config, "cuda")
    return _counted[key]


def least(request: PlanRequest, footprint: Footprint) -> int:
    """Return the smallest memory of a GPU that fits, in bytes."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        fits = fits_at_all(request, footprint, Budget(middle, "cuda", "a card"))
        low, high = (low, middle) if fits else (middle, high)
    return high


@pytest.mark.long
def test_the_options_that_are_named_are_the_mildest_that_make_it_fit() -> None:
    chosen = config()
    request = planning.plan_request(chosen, 1)
    base = measure(chosen)
    alone = ("reward.clip.dtype=bfloat16", "model.quantize=int8", "model.quantize=nf4")
    by_flag = {flag: measure(config(flag)) for flag in alone}
    needs = {flag: least(request, found) for flag, found in by_flag.items()}
    # Each saves more than the one before.
    assert least(request, base) > needs[alone[0]] > needs[alone[1]] > needs[alone[2]]
    both = config(alone[0], alone[1])
    needs_both = least(request, measure(both))
    for memory, expected in (
        (needs[alone[0]], alone[:1]),
        ((needs[alone[0]] + needs[alone[1]]) // 2, alone[1:2]),
        (needs[alone[2]], alone[2:]),
        (needs_both, alone[:2] if needs_both < needs[alone[2]] else alone[2:]),
    ):
        budget = Budget(memory, "cuda", "a card")
        assert not fits_at_all(request, base, budget)
        found = smaller.fitting(chosen, request, base, budget, planning.measure)
        assert found is not None
        assert found[0] == " ".join(f"--set {flag}" for flag in expected)
        # Options are counted one by one and put together: as if they were counted together.
        assert found[1] == measure(config(*expected))


def test_rewards_without_a_network_are_not_told_to_have_another_precision() -> None:
    """`build_mixture` refuses that, after the model is loaded."""
    chosen = presets.resolve(preset="tiny", rewards={"compressibility": None, "clip": None})
    base = replace(test_plan.footprint(), weights={"reward weights": 1})
    first = next(iter(smaller._options(chosen, base)))
    assert first.flags == "--set reward.clip.dtype=bfloat16"
    # Where it is asked for it is refused before that.
    given, rewards = ["reward.compressibility.dtype=bfloat16"], {"compressibility": None}
    asked = presets.resolve(preset="tiny", rewards=rewards, assignments=given)
    with pytest.raises(ConfigError, match=r"reward\.compressibility\.dtype: it holds no network"):
        setup.check(asked, None)


@pytest.mark.long
def test_the_error_says_what_fits_before_what_else_could_be_tried() -> None:
    chosen = config()
    request = planning.plan_request(chosen, 1)
    base = measure(chosen)

    def error(memory: int) -> RunError:
        budget = Budget(memory, "cuda", "a card")
        with pytest.raises(RunError) as raised:
            make_plan(
                request, footprint=base, budget=budget, correction=expected_correction("cuda")
            )
        return smaller.explained(raised.value, chosen, request, base, budget, planning.measure)

    said = error(least(request, measure(config("model.quantize=int8"))))
    assert said.message.startswith("no plan fits")
    assert str(said.hint).startswith("it fits with --set model.quantize=int8 (what that changes: ")
    assert "; or try " in str(said.hint)
    # Nothing helps on a card of a kilobyte, and what is taken already is not named again.
    assert str(error(1024).hint).startswith("try ")
    everything = config("model.quantize=nf4", "reward.clip.dtype=bfloat16", "model.decoder=taesd")
    assert list(smaller._options(everything, base)) == []
