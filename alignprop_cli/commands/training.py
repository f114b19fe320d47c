"""What `alignprop train` does once the configuration is known.

Build, measure on held-out prompts, train, measure again, and leave everything in the run folder.
Imported only when needed: it brings torch and diffusers with it.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from alignprop_cli import __version__, adapter, checkpoint, evaluator, lora, machine, report, trust
from alignprop_cli import config as configuration
from alignprop_cli.commands import planning, settings
from alignprop_cli.commands.drawing import draw
from alignprop_cli.commands.interruption import any_process, signals
from alignprop_cli.commands.resuming import cut_metrics, newest, refuse_changes, restore
from alignprop_cli.commands.session import Session
from alignprop_cli.commands.summary import finish
from alignprop_cli.compiling import compile_network
from alignprop_cli.config import Config
from alignprop_cli.console import Console
from alignprop_cli.errors import AssetError, ConfigError, InterruptedRun
from alignprop_cli.evaluator import Drawn
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.models.registry import load_model
from alignprop_cli.plan import Plan, make_plan
from alignprop_cli.probe import settle
from alignprop_cli.prompts import check_prompts, load_prompts
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.composite import build_mixture
from alignprop_cli.trainer import StepRecord, Trainer, make_accelerator, train

_SMOOTHING = 0.8
"""Share of the past in the smoothed reward beside the progress bar."""


def describe(
    config: Config,
    console: Console,
    *,
    name: str,
    resume: Path | None,
    gpu_memory: str | None = None,
    gpus: int | None = None,
) -> None:
    """Print the plan and the complete configuration of a run without doing it.

    Runs the same checks as a real run, short of loading weights.

    Args:
        config: The complete configuration.
        console: For the result.
        name: Of the run, where no folder was asked for.
        resume: The run to go on with.
        gpu_memory: Of cards that need not be here, such as 12GB; None plans for this machine.
        gpus: How many of them.
    """
    accelerator = make_accelerator()
    _check(config)
    if resume is None:
        checkpoint.new_run(config.output.dir, name)
    elif (found := newest(resume)) is not None:
        refuse_changes(found, config)
    budget = planning.budget_of(accelerator, gpu_memory)
    found = planning.measure(config, budget.device_type)
    plan = make_plan(
        config,
        processes=gpus or accelerator.num_processes,
        footprint=found,
        budget=budget,
    )
    values = {
        "plan": asdict(plan),
        "budget": asdict(budget),
        "uncounted": list(found.uncounted),
        "config": config.model_dump(mode="json"),
    }
    lines = [configuration.dump(config).rstrip(), "", *planning.describe(plan, budget)]
    lines += [f"not counted: {', '.join(found.uncounted)}"] if found.uncounted else []
    console.result("alignprop.plan/1", values, [*lines, "nothing was done (--dry-run)"])


def _check(config: Config) -> None:
    """Refuse unknown rewards, prompt sets and LoRA files before anything heavy."""
    for name, reward in config.reward.items():
        registry.check(name, reward.options)
        if name in registry.SHIPPED and not registry.SHIPPED[name].trainable:
            raise ConfigError(f"reward.{name}: it has no gradient, so it cannot be trained on")
    if config.lora.init is not None:
        _initial(config.lora.init)
    for prompts in (config.train.prompts, config.eval.prompts):
        check_prompts(prompts)


def run_training(
    config: Config,
    console: Console,
    *,
    name: str,
    resume: Path | None,
) -> None:
    """Run a training from its configuration to its summary.

    Args:
        config: The complete configuration.
        console: For people and for the result.
        name: Of the run, where no folder was asked for.
        resume: The run to go on with; None starts a new one.

    Raises:
        AlignPropError: Whatever is wrong with the configuration, the files or the run.
        InterruptedRun: After a signal, when everything is saved.
    """
    started = time.perf_counter()
    _check(config)
    train_prompts = load_prompts(config.train.prompts)
    eval_prompts = load_prompts(config.eval.prompts)
    wanted = config.output.dir
    accelerator = make_accelerator()
    if accelerator.device.type == "cpu":
        machine.keep_memory()
    _deterministic()
    budget = planning.budget_of(accelerator)
    plan, footprint = planning.plan(config, processes=accelerator.num_processes, budget=budget)
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    config = _settled(config, plan)
    found = None if resume is None else newest(resume)
    if found is not None:
        refuse_changes(found, config)
    run = resume or _new_run(wanted, name, accelerator)
    with checkpoint.removed_if_empty(run):
        console.note(f"alignprop {__version__}: {config.model.id} on {accelerator.device}")
        console.note(f"plan: {plan.describe()}")
        if both := set(train_prompts) & set(eval_prompts):
            console.warn(
                f"{len(both)} of the {len(set(eval_prompts))} prompts of eval.prompts are trained "
                "on: the evaluation says nothing about new ones"
            )
        model = load_model(config.model, accelerator.device)
        if planning.encodes_first(config, accelerator.device.type):
            model.keep_prompts([*train_prompts, *eval_prompts, config.sample.negative_prompt])
        mixture = build_mixture(config.reward, config.loss, accelerator.device)
        if plan.checkpoint_reward:
            mixture.recompute()
        config = _prepare_lora(config, model, found, console)
        trainer = Trainer(config, plan, model, mixture, train_prompts, accelerator, console.warn)
        if found is not None:
            restore(trainer, found, run)
        if footprint is not None and accelerator.device.type == "cuda":
            settle(trainer, footprint, budget)
            console.note(f"measured: {trainer.plan.describe()}")
        compile_network(trainer, config.train.compile, console.note)
        session = Session(
            config,
            run,
            trainer,
            model,
            mixture,
            accelerator,
            console,
            evaluator.choose(eval_prompts, config.eval.images, config.eval.images_per_prompt),
            evaluator.choose(eval_prompts, min(config.eval.sample_images, config.eval.images)),
        )
        if accelerator.is_main_process:
            _open_run(session, found)
        with lora.disabled(model.network):
            base = draw(config, console, model, mixture, session.held_out, "base model")
        _standardise(session, base)
        _train(session)
        tuned = draw(config, console, model, mixture, session.held_out, "tuned model")
        if accelerator.is_main_process:
            finish(session, base, tuned, time.perf_counter() - started)


def _new_run(wanted: str | None, name: str, accelerator: Accelerator) -> Path:
    """Choose the run folder once for all processes: the first one makes it."""
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            run = checkpoint.new_run(wanted, name)
            checkpoint.make_run(run)
            chosen = [str(run)]
        except ConfigError as error:
            # Told to the others too, who would wait for the folder forever.
            chosen = [error]
    chosen = broadcast_object_list(chosen)
    if isinstance(chosen[0], ConfigError):
        raise chosen[0]
    return Path(chosen[0])


def _deterministic() -> None:
    """Ask for the same numbers every time, where there is a choice."""
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(mode=True, warn_only=True)


def _settled(config: Config, plan: Plan) -> Config:
    """Return the configuration as it is kept with the run.

    The window group is fixed to what the first plan implies, so that other plans compute the same;
    the folder is left out, since the run may be moved or repeated.
    """
    gradient = config.gradient.model_copy(update={"window_group": plan.window_group})
    output = config.output.model_copy(update={"dir": None})
    return config.model_copy(update={"gradient": gradient, "output": output})


def _initial(path: str) -> Path:
    """Return the LoRA to start from: a file, a checkpoint, or the newest one of a run.

    Raises:
        AssetError: If there is none.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise AssetError(f"lora.init: no such file or folder: {place}")
    return checkpoint.latest(place) if (place / "checkpoints").is_dir() else place


def _prepare_lora(
    config: Config, model: DiffusionModel, found: Path | None, console: Console
) -> Config:
    """Put a fresh LoRA, the one to start from, or the checkpoint's into the network.

    Returns:
        The configuration with the rank, alpha and layers that the LoRA has.
    """
    if config.lora.init is not None:
        start = found or _initial(config.lora.init)
        model.load_lora(start)
        if start.is_file() and adapter.changes_text_encoder(start):
            console.warn(f"{start}: its layers of the text encoder are left out")
        lora.make_trainable(model.network)
        have = lora.adapter_metadata(model.network)
        console.note(f"lora.init: rank {have['r']}, alpha {have['lora_alpha']}, as in its file")
        own = {
            "rank": have["r"],
            "alpha": float(have["lora_alpha"]),
            "target_modules": tuple(have["target_modules"]),
        }
        return config.model_copy(update={"lora": config.lora.model_copy(update=own)})
    lora.inject(
        model.network,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        target_modules=config.lora.target_modules,
        seed=config.train.seed,
    )
    return config


def _open_run(session: Session, found: Path | None) -> None:
    """Write the configuration and cut the metrics to where the run goes on from."""
    run = session.run
    checkpoint.sweep(run)
    done = session.trainer.step_number
    began = cut_metrics(run, done)
    checkpoint.write_text(run / "config.yaml", configuration.dump(session.config))
    if found is not None:
        session.console.note(f"going on from {found}")
    elif done == 0 and began:
        session.console.note(f"{run} has no checkpoint yet: beginning it again")


def _standardise(session: Session, base: Drawn) -> None:
    """Measure the rewards that are to be standardised on the base model, once for the run."""
    rewards = dict(session.config.reward)
    for name, reward in rewards.items():
        if reward.standardise and reward.base_mean is None:
            mean, std = (float(f(base.rewards[name])) for f in (np.mean, np.std))
            session.mixture.standardise(name, mean, std)
            rewards[name] = reward.model_copy(update={"base_mean": mean, "base_std": std})
    if rewards == session.config.reward:
        return
    session.config = session.config.model_copy(update={"reward": rewards})
    if session.accelerator.is_main_process:
        path = session.run / "config.yaml"
        checkpoint.write_text(path, configuration.dump(session.config))


def _train(session: Session) -> None:
    """Run the loop: metrics, samples and checkpoints after every step; stop on a signal."""
    config, trainer = session.config, session.trainer
    steps = config.train.steps
    smoothed: dict[str, float] = {}
    saved: list[int] = []
    if trainer.step_number == 0 and config.eval.every:
        _sample(session)

    def after_step(record: StepRecord) -> None:
        for name, stats in record.rewards.items():
            past = smoothed.get(name, stats.mean)
            smoothed[name] = _SMOOTHING * past + (1.0 - _SMOOTHING) * stats.mean
        line: dict[str, Any] = asdict(record)
        last = record.step == steps
        if config.eval.every and record.step % config.eval.every == 0:
            line["held_out"] = _sample(session)
        if session.accelerator.is_main_process:
            _append(session.run / "metrics.jsonl", line)
        every = config.output.save_every
        if last or (every and record.step % every == 0):
            _save(session)
            saved.append(record.step)
        bar.advance(1, "  ".join(f"{name} {value:.4f}" for name, value in smoothed.items()))

    def stop() -> bool:
        return any_process(session.accelerator, bool(caught))

    with signals(session.console) as caught, session.console.bar(steps, "training") as bar:
        bar.advance(trainer.step_number)
        finished = train(trainer, steps, after_step=after_step, should_stop=stop)
    if not finished:
        if trainer.step_number not in saved:
            _save(session)
        # Only one of several processes may have been told.
        number = caught[0] if caught else signal.SIGTERM
        raise InterruptedRun(
            f"stopped by signal {number} after step {trainer.step_number}; it is saved",
            number,
            hint="go on with: "
            + settings.next_command(
                f"alignprop train --resume {session.run}", config, trust.TO_TRAIN
            ),
        )


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _sample(session: Session) -> dict[str, float]:
    """Draw the fixed sample prompts, keep the sheet, and return the mean rewards."""
    # No bar of its own: it would push the training's aside.
    drawn = draw(
        session.config,
        Console(quiet=True),
        session.model,
        session.mixture,
        session.samples,
        "samples",
    )
    step = session.trainer.step_number
    if session.accelerator.is_main_process:
        cells = [
            report.Cell(picture.prompt, (image,), (drawn.caption(i),))
            for i, (picture, image) in enumerate(zip(drawn.pictures, drawn.images, strict=True))
        ]
        path = session.run / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        report.contact_sheet(cells, path, titles=(f"step {step}",))
    return {name: float(values.mean()) for name, values in drawn.rewards.items()}


def _save(session: Session) -> None:
    """Write a checkpoint, on the main process."""
    if not session.accelerator.is_main_process:
        return
    trainer, config, model = session.trainer, session.config, session.model
    metadata = {
        "alignprop.version": __version__,
        "alignprop.base_model": config.model.id,
        "alignprop.base_fingerprint": model.fingerprint,
        "alignprop.step": str(trainer.step_number),
        "alignprop.seed": str(config.train.seed),
        "alignprop.rewards": ",".join(session.mixture.names),
        "alignprop.config": json.dumps(config.model_dump(mode="json"), sort_keys=True),
    }

    def save_lora(folder: Path) -> None:
        model.save_lora(folder, lora.weights(model.network), metadata)

    checkpoint.save(session.run, trainer.state(), save_lora, keep=config.output.keep_last)
