"""What `alignprop train` does once the configuration is known.

Here the sections of the configuration become values (a sampler, an estimator, a plan). Of what is
called from here only the callbacks and the evaluation still see a `Config`.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from alignprop_cli import __version__
from alignprop_cli.config import trust
from alignprop_cli.config.schema import Config, dump
from alignprop_cli.console import Console
from alignprop_cli.device import (
    forget_peak,
    keep_memory,
    make_accelerator,
    set_deterministic,
)
from alignprop_cli.errors import InterruptedRun
from alignprop_cli.estimators import Estimator
from alignprop_cli.evaluation import draw
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import open_model
from alignprop_cli.planning import request as planning
from alignprop_cli.planning import window
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.prompts import PromptStream, load_prompts
from alignprop_cli.publishing.request import NOTHING, Published, Request
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.shipped import next_command, python_call
from alignprop_cli.storage import sweep, write_text
from alignprop_cli.training import checkpoint, rules, setup
from alignprop_cli.training.callbacks import (
    Callback,
    Checkpoints,
    MetricsFile,
    Progress,
    Run,
)
from alignprop_cli.training.forecast import Forecast
from alignprop_cli.training.guard import Guard, Verdict
from alignprop_cli.training.plans import budget_here, plan_here, try_out
from alignprop_cli.training.report import Report
from alignprop_cli.training.resume import (
    choose,
    cut_metrics,
    cut_samples,
    go_back,
    load_weights,
    refuse_other_inputs,
    restore,
)
from alignprop_cli.training.samples import Samples
from alignprop_cli.training.signals import Interruption
from alignprop_cli.training.summary import finish
from alignprop_cli.training.trackers import Trackers
from alignprop_cli.training.trainer import Trainer


def run_training(
    config: Config,
    console: Console,
    *,
    name: str,
    resume: Path | None,
    back_to: str | None = None,
    callbacks: Sequence[Callback] = (),
    estimator: Estimator | None = None,
    publish: Request = NOTHING,
) -> None:
    """Run a training from its configuration to its summary.

    Args:
        config: The complete configuration.
        console: For people and for the result.
        name: Name of the run, used if `output.dir` is not set.
        resume: The run to resume; None starts a new one.
        back_to: The checkpoint to resume it from, `best` or a step's; None is the newest.
        callbacks: Your own callbacks, called after the built-in ones that record and save.
        estimator: Your own estimator, instead of the one that `gradient` names.
        publish: What is exported or uploaded of the result.

    Raises:
        AlignPropError: Whatever is wrong with the configuration, the files or the run.
        InterruptedRun: After a signal, when everything is saved.
    """
    start, published = time.perf_counter(), Published()
    # 1. Refuse what cannot work before anything heavy is loaded.
    wanted, trackers = config.output.dir, Trackers(config.tracking)
    setup.check(config, resume)
    config = window.with_window(setup.settled(config))
    accelerator = make_accelerator()
    console = console if accelerator.is_main_process else Console(quiet=True)
    with setup.claimed(resume, wanted, name, accelerator) as folder, trackers:
        found = None if resume is None else choose(resume, back_to, config, console.warn)
        # 2. Plan: divide a step so that it fits the memory.
        request = planning.plan_request(config, accelerator.num_processes, estimator)
        budget = budget_here(accelerator, config)
        plan, footprint = plan_here(config, request, budget, resume)
        _prepare_device(accelerator, config)
        console.note(f"alignprop {__version__}: {config.model.id} on {accelerator.device}")
        console.note(f"plan: {plan.describe()}")
        # 3. Build: model, rewards, LoRA, trainer.
        run = _build(config, folder, plan, request, accelerator, console, found)
        run.publish = publish  # at the end, by `finish`
        try_out(run, request, footprint, budget)
        if accelerator.is_main_process:
            _open_folder(run, found, is_older=back_to is not None)

        # 4. Sample the base model, train, sample again.
        with lora.disabled(run.trainer.model.network.module):
            base = run.sample(run.held_out, run.console, "base model")
        _standardise(run, base)
        checkpoints, verdict, report = _train(run, [trackers, *callbacks], back_to is not None)
        tuned = _sample_again(run, verdict)
        checkpoints.drop_old()
        if accelerator.is_main_process:
            published = finish(run, base, tuned, verdict, time.perf_counter() - start, report)
    published.check()  # the trackers were told the result, which is there in any case


def _build(
    config: Config,
    folder: Path,
    plan: Plan,
    request: PlanRequest,
    accelerator: Accelerator,
    console: Console,
    found: Path | None,
) -> Run:
    """Load the model and the rewards, put the LoRA in, and resume from a checkpoint."""
    train_prompts = load_prompts(config.train.prompts)
    eval_prompts = load_prompts(config.eval.prompts)
    if both := set(train_prompts) & set(eval_prompts):
        console.warn(
            f"{len(both)} of the {len(set(eval_prompts))} prompts of eval.prompts are trained "
            "on: the evaluation says nothing about new ones"
        )
    held_out = draw.choose_samples(eval_prompts, config.eval.images, config.eval.images_per_prompt)
    count = min(config.eval.sample_images, config.eval.images)
    per_prompt = min(config.eval.sample_images_per_prompt, count)
    samples = draw.choose_samples(eval_prompts, count, per_prompt)
    # 1. All prompts that will be needed, since the text encoders are dropped before the network is
    #    loaded. Of a set that the run goes through less than twice, only those that it reaches.
    done = 0 if found is None else checkpoint.load(found).step
    used = range(done * config.train.batch_size, config.train.steps * config.train.batch_size)
    coming = set(train_prompts)
    if len(used) < 2 * len(train_prompts):
        stream = PromptStream(train_prompts, config.train.seed)
        coming = {stream.prompt(i) for i in used}
    needed = [*coming, *(s.prompt for s in (*held_out, *samples)), config.sample.negative_prompt]
    model = open_model(config.model, needed, accelerator.device, console.note)
    setup.add_decoder(config, model, console)
    inputs = setup.inputs(config, model)
    if found is not None:
        refuse_other_inputs(found, inputs)

    # 2. Rewards, LoRA and trainer. The LoRA's rank and layers become part of the configuration.
    mixture = build_mixture(config.reward, config.loss, accelerator.device)
    measured = setup.measured(config, mixture, accelerator.device, console)
    for said in measured.cut_notes(set(needed)):
        console.note(said)
    if plan.checkpoint_reward:
        mixture.recompute()
    config = setup.prepare_lora(config, model, found, console)
    trainer = Trainer(
        setup.settings(config, model, request.estimator),
        plan,
        model,
        mixture,
        train_prompts,
        accelerator,
        console.warn,
    )
    if found is not None:
        restore(trainer, found, folder, config.train.steps)
    _tell(trainer, config, console)
    run = Run(config, folder, trainer, accelerator, console, held_out, samples, inputs)
    run.measured = measured
    return run


def _tell(trainer: Trainer, config: Config, console: Console) -> None:
    """Say what part of a flow's path the calls with gradient cover, and advise on the optimiser."""
    said, warning = window.describe(trainer.schedule, trainer.settings.estimator)
    if warning is not None:
        console.warn(warning)
    elif said is not None:
        console.note(said)
    if advice := rules.advice(config.train.optimizer, config.train.learning_rate):
        console.warn(advice)


def _prepare_device(accelerator: Accelerator, config: Config) -> None:
    """Count memory from here on, keep what is freed on the CPU, and use kernels that repeat."""
    device = accelerator.device
    forget_peak(device)
    if device.type == "cpu":
        keep_memory()
    set_deterministic(device, wanted=device.type == "cpu" or config.train.deterministic)


def _open_folder(run: Run, found: Path | None, *, is_older: bool) -> None:
    """Write the configuration, and cut checkpoints, metrics and samples to where it is resumed."""
    for folder in (run.folder, run.folder / "checkpoints", run.folder / "samples"):
        sweep(folder, is_ours=True)
    # First of all: with it the run can be resumed, without it the folder can be begun again.
    write_text(run.folder / "config.yaml", dump(run.config))
    if found is not None and is_older:
        go_back(run.folder, found, run.console.note)
    began = cut_metrics(run.folder, found, run.console.warn)
    cut_samples(run.folder, run.trainer.step_number)
    if found is not None:
        run.console.note(f"resuming from {found}")
    elif began:
        run.console.note(f"{run.folder} has no checkpoint yet: starting it again")


def _standardise(run: Run, base: draw.Samples) -> None:
    """Take mean and deviation of rewards to standardise from the base model's samples.

    They become part of the configuration, so that a resumed run uses the same numbers.
    """
    rewards = dict(run.config.reward)
    for name, reward in rewards.items():
        if reward.standardise and reward.base_mean is None:
            mean, std = (float(f(base.rewards[name])) for f in (np.mean, np.std))
            run.trainer.mixture.standardise(name, mean, std)
            rewards[name] = reward.model_copy(update={"base_mean": mean, "base_std": std})
    if rewards == run.config.reward:
        return
    run.config = run.config.model_copy(update={"reward": rewards})
    if run.accelerator.is_main_process:
        write_text(run.folder / "config.yaml", dump(run.config))


def _sample_again(run: Run, verdict: Verdict) -> draw.Samples:
    """Sample the held-out prompts once more: with the best weights where the guard stopped."""
    if not verdict.stopped or verdict.best is None:
        return run.sample(run.held_out, run.console, "tuned model")
    run.accelerator.wait_for_everyone()  # the main process has written them
    load_weights(run.trainer, run.folder / "checkpoints" / checkpoint.BEST)
    return run.sample(run.held_out, run.console, f"step {verdict.best}, the best")


def _train(
    run: Run, others: Sequence[Callback], goes_on: bool
) -> tuple[Checkpoints, Verdict, Report]:
    """Step until all steps are done or a callback asks to stop.

    Args:
        run: The run.
        others: Callbacks besides the built-in ones.
        goes_on: As in `Guard`.

    Returns:
        The callback that saves, what the guard says, and the report.

    Raises:
        InterruptedRun: After a signal, when everything is saved.
    """
    # The order counts: Samples adds its measures to the record, Guard judges them, MetricsFile
    # writes it, and a checkpoint holds the hash of what is written. Report shows all of it.
    samples = Samples()
    guard = Guard(samples, goes_on=goes_on)
    checkpoints = Checkpoints(guard.is_best)
    interruption = Interruption(checkpoints.save)
    report = Report(samples, guard)
    callbacks = [samples, guard, MetricsFile(), checkpoints, *others, Progress(), Forecast()]
    callbacks += [report, interruption]
    begun: list[Callback] = []
    try:
        for callback in callbacks:
            callback.before_training(run)
            begun.append(callback)
        stopped = guard.should_stop()  # before the run was resumed
        while run.trainer.step_number < run.config.train.steps and not stopped:
            record = run.trainer.step()
            for callback in callbacks:
                callback.after_step(record)
            # A list, so that every callback is asked: processes may meet in `should_stop`.
            stopped = any([callback.should_stop() for callback in callbacks])
        checkpoints.save()
    finally:
        for callback in reversed(begun):
            callback.after_training()
    step = run.trainer.step_number
    if interruption.number is not None and step < run.config.train.steps:
        raise InterruptedRun(
            f"stopped by {signal.Signals(interruption.number).name} after step {step}; it is saved",
            interruption.number,
            hint=f"resume with: {_to_resume(run, others)}",
        )
    return checkpoints, guard.verdict(), report


def _to_resume(run: Run, others: Sequence[Callback]) -> str:
    """Return the command or the call of the Python API that resumes an interrupted run."""
    trackers = next((c for c in others if isinstance(c, Trackers)), None)
    # From Python, with the objects that no command line can name.
    asked = {"export": list(run.publish.exports), "push_to_hub": run.publish.hub_id}
    asked |= {"log_with": trackers.names if trackers else []}
    call = python_call("train", run.config, trust.TO_RESUME, resume=str(run.folder), **asked)
    if call is not None:
        return call
    # What config.yaml names must be typed again where it is not shipped with alignprop.
    words = f"{trackers.words if trackers else ''}{run.publish.words}"
    typed = f"alignprop train --resume {shlex.quote(str(run.folder))}{words}"
    return next_command(typed, run.config, trust.TO_RESUME)
