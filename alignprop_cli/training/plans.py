"""The plan of a run on this machine, at first by what is counted, then by what is measured."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.config.schema import Config
from alignprop_cli.device import available, hold_memory, release_cached
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import Budget, Footprint, expected_correction
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.probe import measure_times, settle
from alignprop_cli.planning.sampling import fitting_batch
from alignprop_cli.planning.speed import Times, assumed, card_for
from alignprop_cli.training import setup
from alignprop_cli.training.callbacks import Run
from alignprop_cli.training.compiling import compile_network
from alignprop_cli.training.trial import Trial
from alignprop_cli.training.tuning import choose_layout, replay_rollout


def plan_here(
    config: Config, request: PlanRequest, budget: Budget, resume: Path | None = None
) -> tuple[Plan, Footprint | None]:
    """Return the plan, and what it was chosen by; where nothing is open nothing is counted."""
    footprint = None
    # A limit that was asked for is kept or refused, also where nothing is left to choose.
    if request.is_open or config.train.memory_limit is not None:
        initial = setup.initial_lora(config, resume)
        footprint = planning.measure(config, budget.device_type, initial)
    times = None if footprint is None else assumed_times(footprint, budget)
    return first_plan(request, footprint, budget, times), footprint


def first_plan(
    request: PlanRequest, footprint: Footprint | None, budget: Budget, times: Times | None
) -> Plan:
    """Return the plan to begin with, before anything is measured."""
    correction = expected_correction(budget.device_type)
    return make_plan(
        request, footprint=footprint, budget=budget, correction=correction, times=times
    )


def assumed_times(footprint: Footprint, budget: Budget, card: str | None = None) -> Times | None:
    """Return the pace that is assumed of a GPU before it is measured; None elsewhere."""
    # On the CPU small batches lose nothing, and a plan must not depend on a timing: it rounds.
    if budget.device_type != "cuda":
        return None
    return assumed(footprint, card or card_for(budget.bytes))


def try_out(run: Run, request: PlanRequest, footprint: Footprint | None, budget: Budget) -> None:
    """Measure on the device how fast it is, whether the plan fits, and whether compiling pays."""
    trial, steps = Trial(run.trainer), run.config.train.steps - run.trainer.step_number
    # A run that is resumed for its end alone has no step to try, and has encoded no prompt of one.
    if footprint is not None and steps <= 0:
        return _limit_samples(run, footprint, budget)
    # Only on CUDA, where torch counts what it allocates and running out of memory can be caught.
    if footprint is not None and run.accelerator.device.type == "cuda":
        started, plan = time.perf_counter(), run.trainer.plan
        # Timed with everything stored; recomputation is added up from the parts.
        trial.apply_plan(replace(plan, checkpoint_network="none", stored_calls=0))
        choose_layout(trial, run.console.note)
        times = measure_times(trial, plan.share)
        if plan.checkpoint_reward:  # it cannot be switched off again
            request = replace(request, checkpoint_reward=True)
        trial.apply_plan(first_plan(request, footprint, budget, times))
        settle(trial, request, footprint, budget, times=times)
        release_cached(run.accelerator.device)
        run.console.note(
            f"measured in {time.perf_counter() - started:.0f} s: {run.trainer.plan.describe()}"
        )
        replay_rollout(
            trial,
            run.config.train.cuda_graph,
            run.console.note,
            times=times,
            footprint=footprint,
            request=request,
            budget=budget,
        )
    elif run.config.train.cuda_graph is True:
        run.console.warn(
            "train.cuda_graph has no effect: it needs a GPU, and a plan of which something is auto"
        )
    if footprint is not None:
        _limit_samples(run, footprint, budget)
    compile_network(trial, steps, run.config.train.compile, run.console.note)


def _limit_samples(run: Run, footprint: Footprint, budget: Budget) -> None:
    """Choose the batch of the run's own samples, and say where it is not what was asked for."""
    wanted, held = run.config.eval.batch_size, run.trainer.replay.held_bytes
    run.sample_batch = fitting_batch(footprint, budget, wanted, held=held)
    if run.sample_batch < wanted:
        run.console.note(
            f"samples are drawn by {run.sample_batch}: eval.batch_size {wanted} does not fit "
            "beside what training holds"
        )


def budget_here(accelerator: Accelerator, config: Config, gpu_memory: str | None = None) -> Budget:
    """Return the memory that each process may use; the same for all, since they share one plan.

    Args:
        accelerator: Device and processes.
        config: Its `train.memory_limit` counts.
        gpu_memory: Memory of a card that this machine need not have; None asks the device.
    """
    wanted = config.train.memory_limit
    limit = None if wanted is None else planning.parse_memory(wanted, "train.memory_limit")
    if gpu_memory is not None:
        size = planning.parse_memory(gpu_memory)
        if limit is not None and limit < size:
            return Budget(limit, "cuda", "train.memory_limit")
        return Budget(size, "cuda", "--gpu-memory")
    here = accelerator.device
    size, source = available(here)
    # The processes of one machine share its RAM.
    if here.type == "cpu":
        size //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if limit is not None and limit < size:
        size, source = limit, "train.memory_limit"
        hold_memory(here, limit)
    sizes = cast(Tensor, accelerator.gather(torch.tensor([size], device=here)))
    # The driver's number is of a process that has its context already; a limit is not.
    free = here.type == "cuda" and source != "train.memory_limit"
    return Budget(int(sizes.min()), here.type, source, has_context=free)
