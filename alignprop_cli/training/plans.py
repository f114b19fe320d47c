"""The plan of a run: for this machine, or in a dry run for cards that need not be here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli.config.schema import Config, dump
from alignprop_cli.console import Console
from alignprop_cli.device import available, hold_memory, make_accelerator, release_cached
from alignprop_cli.errors import RunError
from alignprop_cli.models import families, taesd
from alignprop_cli.planning import embeddings, smaller, window
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import Budget, Footprint, expected_correction
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.probe import measure_times, settle
from alignprop_cli.planning.sampling import fitting_batch
from alignprop_cli.planning.speed import CARDS, Times, assumed, card_for, find_card
from alignprop_cli.training import folders, setup
from alignprop_cli.training.callbacks import Run
from alignprop_cli.training.compiling import compile_network
from alignprop_cli.training.resume import choose
from alignprop_cli.training.trial import Trial
from alignprop_cli.training.tuning import choose_layout, replay_rollout


def describe(
    config: Config,
    console: Console,
    *,
    name: str,
    resume: Path | None,
    back_to: str | None = None,
    gpu_memory: str | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
) -> None:
    """Print the plan and the complete configuration of a run without doing it.

    Makes the same checks as a real run, except those that need the weights.

    Args:
        config: The complete configuration.
        console: For the result.
        name: Name of the run, used if `output.dir` is not set.
        resume: The run to resume; None plans a new one.
        back_to: The checkpoint to resume it from, as in `run_training`.
        gpu_memory: Memory of the cards to plan for, such as 12GB; None is that of `gpu`, or of this
            machine where that is None too.
        gpu: Name of the cards, whose speed is assumed; None assumes one of that memory.
        gpus: Number of these cards.
    """
    # 1. The checks, with nothing written.
    accelerator = make_accelerator()
    setup.check(config, resume)
    if resume is None:
        folders.new_run(config.output.dir, name)
    else:
        choose(resume, back_to, setup.settled(config), console.warn)
    config = window.with_window(config)
    # 2. The plan, from shapes alone: neither the weights nor the cards have to be here.
    card, gpu_memory = _card(gpu, gpu_memory)
    budget = budget_here(accelerator, config, gpu_memory)
    measure = partial(planning.measure, initial=setup.initial_lora(config, resume))
    footprint = measure(config, budget.device_type)
    request = planning.plan_request(config, gpus or accelerator.num_processes)
    times = _assumed(footprint, budget, card)
    with _saying_what_fits(config, request, footprint, budget, measure):
        plan = _first_plan(request, footprint, budget, times)
    prompts, each = embeddings.count(config, budget.device_type)
    values = {
        "plan": asdict(plan)
        | {"accumulation": plan.accumulation, "images_per_hour": plan.images_per_hour},
        "budget": asdict(budget),
        "times": None if times is None else asdict(times),
        "uncounted": list(footprint.uncounted),
        "embeddings": {"prompts": prompts, "bytes": prompts * each},
        "config": config.model_dump(mode="json"),
    }
    lines = [dump(config).rstrip(), "", *planning.describe(plan, budget, times)]
    if (said := taesd.describe(config.model, families.find(config.model)[0])) is not None:
        lines.append(said)
    lines += _window(config, request, console)
    lines.append(embeddings.describe(prompts, each))
    lines += [f"not counted: {', '.join(footprint.uncounted)}"] if footprint.uncounted else []
    console.result("alignprop.plan/1", values, [*lines, "nothing was done (--dry-run)"])


def _card(gpu: str | None, gpu_memory: str | None) -> tuple[str | None, str | None]:
    """Return the name of the card and its memory where one of them is given; else None for both."""
    if gpu is not None:
        card = find_card(gpu)
        return card, f"{CARDS[card].memory}GB" if gpu_memory is None else gpu_memory
    known = gpu_memory is not None
    return card_for(planning.parse_memory(gpu_memory)) if known else None, gpu_memory


@contextmanager
def _saying_what_fits(
    config: Config,
    request: PlanRequest,
    footprint: Footprint,
    budget: Budget,
    measure: Callable[..., Footprint],
) -> Iterator[None]:
    """Add what would make a plan fit to the error that none does."""
    try:
        yield
    except RunError as error:
        raise smaller.explained(error, config, request, footprint, budget, measure) from error


def _window(config: Config, request: PlanRequest, console: Console) -> list[str]:
    """Return the line about the window's share of the path, and warn where it is small."""
    said, warning = window.describe(window.schedule_of(config), request.estimator)
    if warning is not None:
        console.warn(warning)
    return [] if said is None else [f"window: {said}"]


def plan_here(
    config: Config, request: PlanRequest, budget: Budget, resume: Path | None = None
) -> tuple[Plan, Footprint | None]:
    """Return the plan, and what it was chosen by; where nothing is open nothing is counted."""
    footprint = None
    # A limit that was asked for is kept or refused, also where nothing is left to choose.
    if request.is_open or config.train.memory_limit is not None:
        initial = setup.initial_lora(config, resume)
        footprint = planning.measure(config, budget.device_type, initial)
    times = None if footprint is None else _assumed(footprint, budget)
    return _first_plan(request, footprint, budget, times), footprint


def _first_plan(
    request: PlanRequest, footprint: Footprint | None, budget: Budget, times: Times | None
) -> Plan:
    """Return the plan to begin with, before anything is measured."""
    correction = expected_correction(budget.device_type)
    return make_plan(
        request, footprint=footprint, budget=budget, correction=correction, times=times
    )


def _assumed(footprint: Footprint, budget: Budget, card: str | None = None) -> Times | None:
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
        trial.apply_plan(_first_plan(request, footprint, budget, times))
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
