"""What is not finite is never learned from and never saved; steps are skipped only when asked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from alignprop_cli.errors import NonFinite, RunError
from alignprop_cli.training.nonfinite import FiniteGuard, Policy
from alignprop_cli.training.optimizer import Optimizer, OptimizerSettings
from alignprop_cli.training.rates import Rates
from alignprop_cli.training.rules import RuleSettings


def optimizer(*, scaled: bool = False, **settings: float) -> Optimizer:
    parameter = torch.nn.Parameter(torch.ones(3))
    rates = Rates(settings.pop("learning_rate", 0.1))
    wanted = OptimizerSettings(rates, rule=RuleSettings(**settings))
    made = Optimizer({"p": parameter}, wanted, scaled=scaled)
    parameter.grad = torch.ones(3)
    return made


def guard(policy: Policy, limit: int = 3) -> FiniteGuard:
    return FiniteGuard(policy, limit, optimizer())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_stop_refuses_a_gradient_that_is_not_finite(norm: float) -> None:
    with pytest.raises(RunError, match=r"step 4: the gradient is not finite \(train\.seed 7\)"):
        guard("stop").reason_to_skip(norm, 4, 7)
    assert guard("stop").reason_to_skip(1.0, 4, 7) is None


def test_stop_lets_the_error_of_a_reward_through() -> None:
    with pytest.raises(NonFinite, match="reward 'x'"), guard("stop").caught():
        raise NonFinite("reward 'x' returned nan")


def test_skip_turns_it_into_a_gradient_that_all_processes_see_and_counts() -> None:
    watched = guard("skip")
    with watched.caught():
        raise NonFinite("reward 'x' returned nan")
    gradient = watched._optimizer.parameters["p"].grad
    assert gradient is not None
    assert torch.isnan(gradient).all()
    assert watched.reason_to_skip(math.nan, 1, 0) == "reward 'x' returned nan"
    # What the optimiser would learn from is gone.
    assert watched._optimizer.parameters["p"].grad is None
    # Another process's fault: here only the sum is seen.
    with watched.caught():
        pass
    assert watched.reason_to_skip(math.inf, 2, 0) == "the gradient is not finite"
    assert watched.skipped_in_row == 2
    # A good step ends the row.
    assert watched.reason_to_skip(1.0, 3, 0) is None
    assert watched.skipped_in_row == 0


def test_in_float16_a_skipped_step_is_not_repeated_and_leaves_the_loss_scale() -> None:
    made, alone = optimizer(scaled=True), Accelerator(cpu=True)
    scale, watched = made.scaler.get_scale(), FiniteGuard("skip", 3, made)
    # 1. No finite image, already in the first step: nothing has been scaled before.
    with watched.caught():
        raise NonFinite("the images hold NaN")
    norm = made.reduce_and_clip(alone)
    assert not watched.overflowed(norm, alone)
    assert watched.reason_to_skip(norm, 1, 0) == "the images hold NaN"
    assert made.scaler.get_scale() == scale
    # 2. A gradient that no scale helps: tried with smaller ones, until 1.
    tries = 0
    while True:
        tries += 1
        with watched.caught():
            made.parameters["p"].grad = torch.full((3,), math.inf)
        norm = made.reduce_and_clip(alone)
        if not watched.overflowed(norm, alone):
            break
        assert made.scaler.get_scale() == scale / 2**tries
    assert tries == 1 + math.log2(scale)
    assert watched.reason_to_skip(norm, 2, 0) == "the gradient is not finite"
    assert made.scaler.get_scale() == scale
    # 3. One that a smaller scale helps: that one stays.
    with watched.caught():
        made.parameters["p"].grad = torch.full((3,), math.inf)
    assert watched.overflowed(made.reduce_and_clip(alone), alone)
    with watched.caught():
        made.parameters["p"].grad = torch.ones(3)
    norm = made.reduce_and_clip(alone)
    assert not watched.overflowed(norm, alone)
    assert watched.reason_to_skip(norm, 3, 0) is None
    made.step(2)
    assert made.scaler.get_scale() == scale / 2


def test_too_many_skips_in_a_row_end_the_run() -> None:
    watched = guard("skip", limit=2)
    assert watched.reason_to_skip(math.nan, 1, 0)
    with pytest.raises(RunError, match="2 steps in a row were skipped"):
        watched.reason_to_skip(math.nan, 2, 0)


def test_other_errors_are_no_reason_to_skip() -> None:
    with pytest.raises(RunError, match="broken"), guard("skip").caught():
        raise RunError("broken")


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e39},
        {"learning_rate": 0.1, "weight_decay": 1e40},
        {"learning_rate": 0.1, "weight_decay": 1e300},
    ],
)
def test_an_update_to_infinity_is_refused(settings: dict[str, float]) -> None:
    made = optimizer(**settings)
    made.step(0)
    with pytest.raises(RunError, match=r"step 1: the weights or .* are not finite"):
        FiniteGuard("skip", 5, made).check_update(1)


def test_zero_by_zero_is_refused() -> None:
    # A gradient of 0 with an epsilon that float32 rounds to 0: 0 / 0.
    made = optimizer(epsilon=1e-300)
    made.parameters["p"].grad = torch.zeros(3)
    made.step(0)
    with pytest.raises(RunError, match="not finite"):
        FiniteGuard("stop", 5, made).check_update(1)


def test_moments_count_too_and_large_numbers_are_finite() -> None:
    made = optimizer()
    made.parameters["p"].data.fill_(3e38)
    made.step(0)
    assert made.is_finite()
    next(iter(made.rule.state.values()))["exp_avg_sq"][1] = math.inf
    assert not made.is_finite()


REWARD = """
import torch

class Sometimes:
    '''NaN in the calls that `bad` names, counted from 0.'''

    def __init__(self, bad=()):
        self.calls, self.bad = 0, set(bad)

    def __call__(self, images, prompts):
        rewards = images.mean(dim=(1, 2, 3))
        self.calls += 1
        return rewards * float("nan") if self.calls - 1 in self.bad else rewards
"""

# Two inference steps, batches of 2 in one call of the reward: calls 0 and 1 are the base model's
# held-out samples and the first sheet, then one call a step.
FAST = (
    "--set=sample.num_inference_steps=2",
    "--set=gradient.k_max=2",
    "--set=train.batch_size=2",
    "--set=train.micro_batch=2",
    "--set=train.decode_batch=2",
    "--set=eval.images=2",
    "--set=eval.every=0",
)


@pytest.fixture
def train(capsys, tmp_path, monkeypatch):
    """Return a function that trains in an empty folder."""
    from alignprop_cli.cli import main

    monkeypatch.chdir(tmp_path)
    Path("sometimes.py").write_text(REWARD)

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            main(["train", *map(str, args)])
        return ended.value.code or 0, capsys.readouterr().err

    return call


def reward(*bad: int) -> tuple[str, ...]:
    return (
        "--reward=sometimes.py:Sometimes",
        f"--set=reward.sometimes.py:Sometimes.bad={list(bad)}",
    )


def test_a_skipped_step_is_said_recorded_and_changes_nothing(train) -> None:
    # Call 0 is the base model's; step 2 is call 2.
    given = ("--preset", "tiny", "--steps", 3, "--set=output.save_every=1", "-q", *FAST)
    code, err = train(*given, "--output", "r", *reward(2), "--on-nonfinite", "skip")
    assert code == 0, err
    assert "step 2 is skipped: reward" in err
    lines = [json.loads(each) for each in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [each.get("skipped") is not None for each in lines] == [False, True, False]
    assert lines[1].keys() == {"step", "images_seen", "seconds", "skipped"}
    from safetensors.torch import load_file

    first, second, third = (
        load_file(f"r/checkpoints/step-{i:06d}/pytorch_lora_weights.safetensors") for i in (1, 2, 3)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in second)


def test_without_the_flag_the_run_stops_and_keeps_what_it_has(train) -> None:
    given = ("--preset", "tiny", "--steps", 3, "--set=output.save_every=1", "-q", *FAST)
    code, err = train(*given, "--output", "r", *reward(2))
    assert code == 4
    assert "reward 'sometimes.py:Sometimes' returned nan" in err
    assert [p.name for p in Path("r/checkpoints").iterdir()] == ["step-000001"]


def test_skips_in_a_row_end_the_run_also_across_a_resume(train) -> None:
    given = ("--preset", "tiny", "--set=output.save_every=1", "-q", *FAST)
    skip = ("--on-nonfinite", "skip", "--set=train.nonfinite_limit=2")
    assert train(*given, "--steps", 1, "--output", "r", *reward(1), *skip)[0] == 0
    code, err = train("--resume", "r", "--steps", 2, "-q", *reward(1))
    assert code == 4
    assert "2 steps in a row were skipped" in err


@pytest.mark.parametrize(
    "setting", ["learning_rate=1e39", "weight_decay=1e300", "adam_epsilon=1e-300"]
)
def test_weights_that_are_not_finite_are_never_saved(train, setting: str) -> None:
    given = ("--preset", "tiny", "--steps", 2, "--set=output.save_every=1", "-q", *FAST)
    code, err = train(*given, "--output", "r", f"--set=train.{setting}")
    assert code == 4
    assert "step 1: the weights or the optimiser's moments are not finite" in err
    assert not list(Path("r").glob("checkpoints/*"))


def test_the_last_good_checkpoint_is_not_dropped_for_one_that_samples_nan(train) -> None:
    # A good step, then a learning rate with which weights stay finite and images do not.
    given = ("--preset", "tiny", "--set=output.save_every=1", "--set=output.keep_last=1", "-q")
    rate = ("--set=train.learning_rate=1e20", "--set=train.warmup_steps=0")
    code, err = train(*given, "--steps", 3, "--output", "r", *FAST, *rate)
    assert code == 4, err
    kept = sorted(p.name for p in Path("r/checkpoints").iterdir())
    # The first is finite but draws NaN in the step after it, so it was never proven good.
    assert kept == ["step-000001"]


def test_keep_last_keeps_one_once_the_run_has_ended_well(train) -> None:
    given = ("--preset", "tiny", "--set=output.save_every=1", "--set=output.keep_last=1", "-q")
    assert train(*given, "--steps", 3, "--output", "r", *FAST)[0] == 0
    assert [p.name for p in Path("r/checkpoints").iterdir()] == ["step-000003"]
