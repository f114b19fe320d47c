"""The optimisers against their libraries, the schedules and the EMA against their definitions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from alignprop_cli.config.train import OptimizerName, ScheduleName
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.trained import bytes_each, state_bytes
from alignprop_cli.training import rules
from alignprop_cli.training.ema import Average
from alignprop_cli.training.optimizer import Optimizer, OptimizerSettings
from alignprop_cli.training.rates import Rates
from alignprop_cli.training.rules import RuleSettings
from tests.factories import randn

# One of each size that 8-bit AdamW treats differently, and a B, which is all zeros at first.
SHAPES = {"a.lora_A": (8, 600), "a.lora_B": (600, 8), "b.lora_A": (4, 30), "b.lora_B": (20, 4)}


def needs(package: str, name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.extra(package, "optimizers"))


KINDS = ["adamw", needs("bitsandbytes", "adamw8bit"), needs("prodigyopt", "prodigy")]
RATE: Mapping[str, float] = {"adamw": 1e-2, "adamw8bit": 1e-2, "prodigy": 1.0}
RULE = RuleSettings(betas=(0.8, 0.95), epsilon=1e-7, weight_decay=0.02)


def fresh() -> dict[str, torch.nn.Parameter]:
    values = {
        name: torch.zeros(shape) if name.endswith("B") else randn(i, *shape).float()
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return {name: torch.nn.Parameter(value) for name, value in values.items()}


def gradient(step: int, name: str) -> torch.Tensor:
    number = 100 * (step + 1) + list(SHAPES).index(name)
    return randn(number, *SHAPES[name], dtype=torch.float32)


def made(kind: OptimizerName, **more: Any) -> Optimizer:
    rates = Rates(RATE[kind], warmup_steps=2, decay_steps=10)
    return Optimizer(fresh(), OptimizerSettings(rates, kind=kind, rule=RULE, **more))


def take(optimizer: Optimizer, steps: range) -> list[float]:
    found: list[float] = []
    for step in steps:
        for name, parameter in optimizer.parameters.items():
            parameter.grad = gradient(step, name)
        found.append(optimizer.step(step))
    return found


def by_hand(kind: str, parameters: list[torch.nn.Parameter]) -> Any:
    """The library's own optimiser, made as its documentation says."""
    common = {"lr": RATE[kind], "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.02}
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=True)
    if kind == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **common)
    import prodigyopt

    return prodigyopt.Prodigy(parameters, **common, safeguard_warmup=True, use_bias_correction=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_librarys_own(kind: OptimizerName) -> None:
    ours, rates = made(kind), Rates(RATE[kind], warmup_steps=2, decay_steps=10)
    told = take(ours, range(6))
    theirs = fresh()
    library = by_hand(kind, list(theirs.values()))
    estimates: list[float] = []
    for step in range(6):
        for name, parameter in theirs.items():
            parameter.grad = gradient(step, name)
        for group in library.param_groups:
            group["lr"] = rates(step)
        library.step()
        estimates.append(library.param_groups[0].get("d", 1.0))
    for name, parameter in ours.parameters.items():
        assert torch.equal(parameter, theirs[name])
        assert not torch.equal(parameter, fresh()[name])
    # What is recorded: for Prodigy what it has found, times the rate.
    assert told == [rates(step) * d for step, d in enumerate(estimates)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimiser_continues_bit_for_bit(kind: OptimizerName, tmp_path: Path) -> None:
    straight = made(kind, ema_decay=0.5)
    take(straight, range(4))
    # Through a file, as in a checkpoint: nothing in it may share memory.
    save_file(straight.state(), tmp_path / "state.safetensors")
    weights = {name: p.detach().clone() for name, p in straight.parameters.items()}
    expected = take(straight, range(4, 9))

    resumed = made(kind, ema_decay=0.5)
    for name, parameter in resumed.parameters.items():
        parameter.data.copy_(weights[name])
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    assert take(resumed, range(4, 9)) == expected
    first, second = straight.state(), resumed.state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, parameter in resumed.parameters.items():
        assert torch.equal(parameter, straight.parameters[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_not_whole_is_refused(kind: OptimizerName) -> None:
    optimizer = made(kind, ema_decay=0.5)
    take(optimizer, range(2))
    state = optimizer.state()
    broken = [{k: v for k, v in state.items() if k != lost} for lost in state]
    broken += [{**state, name: torch.zeros(7)} for name in state if name.startswith("a.lora_A.")]
    broken += [{**state, "c.lora_A.step": torch.tensor(1)}]
    assert len(broken) > 20
    for each in broken:
        with pytest.raises(RunError, match="does not fit"):
            optimizer.load_state(each)
    optimizer.load_state(state)
    # Nor is the state of a run without an average.
    with pytest.raises(RunError, match="does not fit"):
        made(kind).load_state(state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_state_are_the_planned_ones(kind: OptimizerName) -> None:
    optimizer = made(kind)
    numels = [math.prod(shape) for shape in SHAPES.values()]
    assert optimizer.missing_bytes == state_bytes(kind, numels)
    take(optimizer, range(1))
    assert optimizer.missing_bytes == 0
    # Without counts, constants and the empty first values that Prodigy saves itself.
    held = sum(
        value.numel() * value.element_size()
        for name, value in optimizer.state().items()
        if value.dim()
    )
    saved = sum(4 * math.prod(SHAPES[name]) for name in SHAPES if name.endswith("B"))
    assert held == state_bytes(kind, numels) - saved * (kind == "prodigy")


def test_the_bytes_of_a_trained_value() -> None:
    """float32 weight and gradient 8; AdamW's moments 8; in 8 bits 2 and two scales for 256."""
    assert bytes_each("adamw", [100, 5000], averaged=False) == 16.0
    assert bytes_each("adamw", [100], averaged=True) == 20.0
    assert bytes_each("prodigy", [100], averaged=False) == 24.0
    assert bytes_each("adamw8bit", [4095], averaged=False) == 16.0
    assert bytes_each("adamw8bit", [8192], averaged=False) == 8.0 + 2.0 + 8.0 / 256


def test_the_plan_counts_the_optimiser_of_the_configuration_and_the_average() -> None:
    train = {"optimizer": "adamw8bit", "ema_decay": 0.9}
    config = parse({"reward": {"brightness": {}}, "lora": {"rank": 32}, "train": train})
    found = planning.measure(config, "cpu")
    network = meta_model(config.model, torch.float32).parts.network.module
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora.inject(network, rank=32, alpha=32, target_modules=targets, seed=0)
    numels = [parameter.numel() for parameter in lora.trainable(network)]
    # Both kinds of tensors, in 8 bits and in 32.
    assert min(numels) < 4096 <= max(numels)
    assert found.trained == sum(numels)
    assert found.trained_each * found.trained == pytest.approx(
        12 * sum(numels) + state_bytes("adamw8bit", numels)
    )


@pytest.mark.parametrize(
    ("kind", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")]
)
def test_a_missing_package_is_named_with_what_to_install(
    kind: OptimizerName, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=f"{kind} needs {package}, which is not") as refused:
        rules.check(kind)
    assert "pip install 'alignprop[optimizers]'" in (refused.value.hint or "")
    rules.check("adamw")


@pytest.mark.parametrize(
    ("error", "refusal", "message"),
    [
        (NotImplementedError("no kernel\nfor it"), ConfigError, "does not work on cpu: no kernel"),
        (OSError("libcudart is missing"), AssetError, "torch cannot be loaded: libcudart"),
    ],
)
def test_a_package_that_does_not_work_here_is_refused_in_words(
    error: Exception,
    refusal: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(parameters: object, settings: object) -> torch.optim.Optimizer:
        raise error

    # torch stands for the package, since the real one need not be here.
    rule = replace(rules.RULES["adamw8bit"], build=broken, package="torch")
    monkeypatch.setitem(rules.RULES, "adamw8bit", rule)  # type: ignore[arg-type]
    with pytest.raises(refusal, match=message):
        made("adamw8bit")


def test_prodigy_with_a_rate_for_adamw_is_warned_about() -> None:
    assert "usually 1" in (rules.advice("prodigy", 1e-3) or "")
    assert rules.advice("prodigy", 1.0) is None
    assert rules.advice("adamw", 1e-3) is None


# Schedules.

OPTIONS: Mapping[str, dict[str, Any]] = {
    "cosine_with_restarts": {"cycles": 3},
    "polynomial": {"power": 2.5},
    "piecewise_constant": {"rules": "1:2,0.5:5,0.25", "warmup_steps": 0},
    "constant": {"warmup_steps": 0},
}


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_a_schedule_is_diffusers_own_step_by_step_also_across_a_resume(name: ScheduleName) -> None:
    options = {"warmup_steps": 3, "decay_steps": 9, **OPTIONS.get(name, {})}
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.03)
    theirs = get_scheduler(
        name,
        optimizer,
        step_rules=options.get("rules"),
        num_warmup_steps=options["warmup_steps"],
        num_training_steps=options["warmup_steps"] + 9,
        num_cycles=options.get("cycles", 1),
        power=options.get("power", 1.0),
    )
    ours = Rates(0.03, schedule=name, **options)
    expected: list[float] = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [ours(step) for step in range(12)] == expected
    # A resumed run asks another object, in the middle.
    resumed = Rates(0.03, schedule=name, **options)
    assert [resumed(step) for step in range(7, 12)] == expected[7:]
    assert (len(set(expected)) > 2) == (name != "constant")


def test_rules_hold_up_to_their_step_counted_from_1() -> None:
    """The numbers of docs/commands.md, by the steps of metrics.jsonl."""
    rates = Rates(2.0, schedule="piecewise_constant", rules="1:10,0.1:20,0.01")
    found = {step: rates(step - 1) for step in (1, 10, 11, 20, 21, 500)}
    assert found == {1: 2.0, 10: 2.0, 11: 0.2, 20: 0.2, 21: 0.02, 500: 0.02}


RULES = {"lr_schedule": "piecewise_constant"}


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"lr_schedule": "cosine"}, "train.lr_decay_steps", "needs the steps it takes"),
        (
            {"lr_schedule": "linear", "lr_decay_steps": 10, "warmup_steps": 5, "steps": 16},
            "train.steps",
            r"16 is more than .* \(15\), where linear ends",
        ),
        ({"lr_schedule": "constant", "warmup_steps": 5}, "train.warmup_steps", "no warmup"),
        ({"lr_schedule": "piecewise_constant"}, "train.lr_rules", "needs its rules"),
        (
            {"lr_schedule": "polynomial", "lr_decay_steps": 20, "learning_rate": 1e-7},
            "train.learning_rate",
            "falls to 1e-7",
        ),
        ({"lr_schedule": "cosin"}, "train.lr_schedule", "input should be"),
        ({"lr_rules": "1:10,0.1"}, "train.lr_rules", "is null, only piecewise_constant"),
        ({**RULES, "lr_rules": "1:10,0.1"}, "", ""),
        ({**RULES, "lr_rules": "1:20,0.5:10,0.1"}, "train.lr_rules", "steps have to rise"),
        ({**RULES, "lr_rules": "1:10,0.5:10,0.1"}, "train.lr_rules", "steps have to rise"),
        ({"lr_rules": "1:10;0.1"}, "train.lr_rules", "pattern"),
        ({"lr_rules": "1:0,0.1"}, "train.lr_rules", "pattern"),
        ({"lr_rules": "1..2:5,0.1"}, "train.lr_rules", "pattern"),
        ({"lr_rules": "1:5,nan"}, "train.lr_rules", "pattern"),
        ({**RULES, "lr_rules": "1:10,2.5e-1:20,1e-3"}, "", ""),
        ({"optimizer": "prodigy", "adam_beta1": 0.0}, "train.adam_beta1", "more than 0"),
        ({"optimizer": "adam"}, "train.optimizer", "input should be"),
        ({"ema_decay": 1.0}, "train.ema_decay", "less than 1"),
        ({"kl_weight": -1.0}, "train.kl_weight", "greater than or equal to 0"),
        ({"lr_schedule": "linear", "lr_decay_steps": 10, "steps": 10}, "", ""),
    ],
)
def test_what_cannot_work_together_is_refused(
    given: dict[str, object], key: str, message: str
) -> None:
    values = {"reward": {"brightness": {}}, "train": given}
    if not key:
        parse(values)
        return
    with pytest.raises(ConfigError, match=f"{key}: .*{message}"):
        parse(values)
    if "pattern" not in message and "input" not in message and "than" not in message:
        parse(values, training=False)


# The average.


def test_the_average_is_its_definition() -> None:
    """ema_n = sum_t (1 - d_t) prod_{u > t} d_u theta_t, in float64 and written as that sum."""
    parameter = torch.nn.Parameter(randn(1, 5, 3))
    average = Average({"p": parameter}, 0.4)
    seen: list[torch.Tensor] = []
    for step in range(20):
        parameter.data.copy_(randn(step + 2, 5, 3))
        average.update()
        seen.append(parameter.detach().clone())
    # min(0.4, t / (t + 9)) reaches 0.4 at t = 6; the first value counts alone.
    decays = [0.0, *(min(0.4, t / (t + 9)) for t in range(2, 21))]
    assert [d < 0.4 for d in decays] == [True] * 5 + [False] * 15
    expected = sum(
        (1.0 - decays[t]) * math.prod(decays[t + 1 :]) * value for t, value in enumerate(seen)
    )
    torch.testing.assert_close(average.values["p"], expected, rtol=1e-13, atol=1e-14)


def test_the_average_is_that_of_diffusers() -> None:
    parameters = fresh()
    average = Average(parameters, 0.6)
    theirs = EMAModel(parameters.values(), decay=0.6)
    for step in range(30):
        for i, parameter in enumerate(parameters.values()):
            parameter.data.add_(randn(50 * step + i, *parameter.shape).float())
        average.update()
        theirs.step(parameters.values())
    for ours, other in zip(average.values.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, other, rtol=2e-6, atol=1e-6)


def test_applying_the_average_and_taking_it_out_leaves_no_trace() -> None:
    optimizer = made("adamw", ema_decay=0.9)
    take(optimizer, range(5))
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    places = {name: p.data_ptr() for name, p in optimizer.parameters.items()}
    assert optimizer.average is not None
    with optimizer.average.applied():
        for name, parameter in optimizer.parameters.items():
            assert torch.equal(parameter, optimizer.average.values[name])
            assert not torch.equal(parameter, before[name])
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == places[name]


def test_a_skipped_step_is_not_averaged_and_an_infinite_average_is_noticed() -> None:
    optimizer = made("adamw", ema_decay=0.9)
    take(optimizer, range(2))
    before = optimizer.state()
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.reduce_and_clip(Accelerator(cpu=True))
    optimizer.skip()
    after = optimizer.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert optimizer.is_finite()
    assert optimizer.average is not None
    optimizer.average.values["b.lora_A"][0, 0] = math.inf
    assert not optimizer.is_finite()
