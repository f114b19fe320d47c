"""Trainers for the benchmarks, built as `alignprop train` builds them, apart from compiling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.device import available, keep_memory, make_accelerator, set_deterministic
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import open_model
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import Budget
from alignprop_cli.planning.probe import measure_times, settle
from alignprop_cli.rewards.mixture import Mixture, build_mixture
from alignprop_cli.training import setup
from alignprop_cli.training.trainer import Trainer
from alignprop_cli.training.trial import Trial


@dataclass(frozen=True)
class Parts:
    """What is loaded once, for any number of trainers.

    Args:
        model: With a LoRA.
        mixture: The rewards.
        prompts: To train on.
        accelerator: The device.
        budget: What was free of its memory before.
    """

    model: Model
    mixture: Mixture
    prompts: Sequence[str]
    accelerator: Accelerator
    budget: Budget


def open_parts(config: Config, prompts: Sequence[str], also: Sequence[str] = ()) -> Parts:
    """Load the model and the rewards, and put a fresh LoRA in.

    Args:
        config: The complete configuration.
        prompts: To train on.
        also: Others that the model will be asked for.
    """
    accelerator = make_accelerator()
    device = accelerator.device
    size, source = available(device)
    if device.type == "cpu":
        keep_memory()
    # As in a run: the CPU's kernels repeat, a GPU's need not.
    set_deterministic(device, wanted=device.type == "cpu")
    asked = [*prompts, *also, config.sample.negative_prompt]
    model = open_model(config.model, asked, device)
    setup.prepare_lora(config, model, None, Console(quiet=True))
    mixture = build_mixture(config.reward, config.loss, device)
    budget = Budget(size, device.type, source, has_context=device.type == "cuda")
    return Parts(model, mixture, prompts, accelerator, budget)


def build_trainer(config: Config, parts: Parts) -> Trainer:
    """Return a trainer with the plan that this configuration and this device get.

    Several may share their parts: `trainer.apply_plan(trainer.plan)` before going on with another.
    """
    request, budget = planning.plan_request(config, 1), parts.budget
    footprint = planning.measure(config, budget.device_type) if request.is_open else None
    plan = make_plan(request, footprint=footprint, budget=budget)
    if plan.checkpoint_reward:
        parts.mixture.recompute()
    trainer = Trainer(
        setup.settings(config, parts.model, request.estimator),
        plan,
        parts.model,
        parts.mixture,
        parts.prompts,
        parts.accelerator,
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    if footprint is not None and budget.device_type == "cuda":
        # As `alignprop train` does: by the times of this device, and tried on it.
        trial = Trial(trainer)
        trial.apply_plan(replace(plan, checkpoint_network="none", stored_calls=0))
        times = measure_times(trial, plan.share)
        trial.apply_plan(make_plan(request, footprint=footprint, budget=budget, times=times))
        settle(trial, request, footprint, budget, times=times)
    return trainer
