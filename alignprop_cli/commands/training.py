"""What `alignprop train` does once the configuration is known.

Build, measure on held-out prompts, train, measure again, and leave everything in the run folder.
Imported only when needed: it brings torch and diffusers with it.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from alignprop_cli import __version__, checkpoint, evaluator, lora, report
from alignprop_cli import config as configuration
from alignprop_cli.commands.drawing import draw
from alignprop_cli.config import Config
from alignprop_cli.console import Console, table
from alignprop_cli.errors import ConfigError, InterruptedRun, RunError
from alignprop_cli.evaluator import Drawn, Paired, Picture
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.models.registry import load_model
from alignprop_cli.plan import Plan, make_plan
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.composite import Mixture, build_mixture
from alignprop_cli.trainer import StepRecord, Trainer, make_accelerator, peak_memory_gib, train

_SMOOTHING = 0.8
"""Share of the past in the smoothed reward beside the progress bar."""


@dataclass
class Session:
    """The parts of one run."""

    config: Config
    run: Path
    trainer: Trainer
    model: DiffusionModel
    mixture: Mixture
    accelerator: Accelerator
    console: Console
    held_out: list[Picture]
    samples: list[Picture]


def describe(config: Config, console: Console) -> None:
    """Print the plan and the complete configuration of a run without doing it.

    Runs the same checks as a real run, short of loading weights.
    """
    accelerator = make_accelerator()
    _check(config)
    plan = make_plan(
        config, processes=accelerator.num_processes, device_type=accelerator.device.type
    )
    values = {"plan": asdict(plan), "config": config.model_dump(mode="json")}
    lines = [configuration.dump(config).rstrip(), "", f"device: {accelerator.device}"]
    lines += [f"plan: {plan.describe()}", "nothing was done (--dry-run)"]
    console.result("alignprop.plan/1", values, lines)


def _check(config: Config) -> tuple[list[str], list[str]]:
    """Refuse unknown rewards and prompt sets before anything heavy; return the prompts."""
    for name, reward in config.reward.items():
        registry.check(name, reward.options)
    return load_prompts(config.train.prompts), load_prompts(config.eval.prompts)


def run_training(config: Config, console: Console, *, name: str, resume: Path | None) -> None:
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
    train_prompts, eval_prompts = _check(config)
    accelerator = make_accelerator()
    _deterministic()
    plan = make_plan(
        config, processes=accelerator.num_processes, device_type=accelerator.device.type
    )
    config = _with_window_group(config, plan)
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    run = resume or _new_run(config, name, accelerator)
    found = checkpoint.latest(run) if resume else None

    console.note(f"alignprop {__version__}: {config.model.id} on {accelerator.device}")
    console.note(f"plan: {plan.describe()}")
    model = load_model(config.model, accelerator.device)
    mixture = build_mixture(config.reward, config.loss, accelerator.device)
    _prepare_lora(config, model)
    trainer = Trainer(config, plan, model, mixture, train_prompts, accelerator)
    if found is not None:
        _restore(trainer, found, config.train.steps)
    session = Session(
        config,
        run,
        trainer,
        model,
        mixture,
        accelerator,
        console,
        evaluator.choose(eval_prompts, config.eval.images),
        evaluator.choose(eval_prompts, min(config.eval.sample_images, config.eval.images)),
    )
    if accelerator.is_main_process:
        _open_run(session, found)
    with lora.disabled(model.network):
        base = draw(config, console, model, mixture, session.held_out, "base model")
    _train(session)
    tuned = draw(config, console, model, mixture, session.held_out, "tuned model")
    if accelerator.is_main_process:
        _finish(session, base, tuned, time.perf_counter() - started)


def _new_run(config: Config, name: str, accelerator: Accelerator) -> Path:
    """Choose the run folder once for all processes: the first one makes it."""
    first = accelerator.is_main_process
    chosen = [str(checkpoint.new_run(config.output.dir, name)) if first else ""]
    return Path(broadcast_object_list(chosen)[0])


def _deterministic() -> None:
    """Ask for the same numbers every time, where there is a choice."""
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(mode=True, warn_only=True)


def _with_window_group(config: Config, plan: Plan) -> Config:
    """Fix the window group that the first plan implies, so that other plans compute the same."""
    gradient = config.gradient.model_copy(update={"window_group": plan.window_group})
    return config.model_copy(update={"gradient": gradient})


def _prepare_lora(config: Config, model: DiffusionModel) -> None:
    """Put a fresh LoRA, or the one to start from, into the network."""
    if config.lora.init is not None:
        model.load_lora(Path(config.lora.init).expanduser())
        lora.make_trainable(model.network)
        return
    lora.inject(
        model.network,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        target_modules=config.lora.target_modules,
        seed=config.train.seed,
    )


def _restore(trainer: Trainer, found: Path, steps: int) -> None:
    """Continue from a checkpoint."""
    state = checkpoint.load(found)
    if state.step >= steps:
        raise ConfigError(
            f"--resume: {found} is at step {state.step} and train.steps is {steps}: nothing to do",
            hint=f"give a larger number, for instance --steps {state.step + steps}",
        )
    lora.set_weights(trainer.model.network, checkpoint.load_lora(found))
    trainer.load_state(state)


def _open_run(session: Session, found: Path | None) -> None:
    """Write the configuration and cut the metrics to where the run goes on from."""
    run = session.run
    metrics = run / "metrics.jsonl"
    done = session.trainer.step_number
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    if lines and not lines[-1].endswith("}"):
        # Half a line, from a run that was killed while writing it.
        lines.pop()
    try:
        kept = [line for line in lines if json.loads(line)["step"] <= done]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{metrics}: damaged: {error}", hint="remove the damaged line") from error
    checkpoint.write_text(metrics, "".join(f"{line}\n" for line in kept))
    checkpoint.write_text(run / "config.yaml", configuration.dump(session.config))
    if found is not None:
        session.console.note(f"going on from {found}")


def _train(session: Session) -> None:
    """Run the loop: metrics, samples and checkpoints after every step; stop on a signal."""
    config, trainer = session.config, session.trainer
    steps = config.train.steps
    smoothed: dict[str, float] = {}
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
        bar.advance(1, "  ".join(f"{name} {value:.4f}" for name, value in smoothed.items()))

    with _signals(session.console) as caught, session.console.bar(steps, "training") as bar:
        bar.advance(trainer.step_number)
        finished = train(trainer, steps, after_step=after_step, should_stop=lambda: bool(caught))
    if not finished:
        _save(session)
        raise InterruptedRun(
            f"stopped by signal {caught[0]} after step {trainer.step_number}; it is saved",
            caught[0],
            hint=f"go on with: alignprop train --resume {session.run}",
        )


@contextmanager
def _signals(console: Console) -> Iterator[list[int]]:
    """Note the first interruption, so that the step is finished and saved; obey the second."""
    caught: list[int] = []
    old: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        console.warn("finishing this step, then saving; once more to stop at once")
        for each, handler in old.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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


def _finish(session: Session, base: Drawn, tuned: Drawn, seconds: float) -> None:
    """Write the before/after sheet and the summary, and print where everything is."""
    run, config = session.run, session.config
    peak = peak_memory_gib(session.model.device)
    paired = {
        name: evaluator.compare(base.pictures, base.rewards[name], tuned.rewards[name])
        for name in session.mixture.names
    }
    checks = evaluator.check_shares({"base": base, "tuned": tuned})
    cells = [
        report.Cell(picture.prompt, (before, after), (base.caption(i), tuned.caption(i)))
        for i, (picture, before, after) in enumerate(
            zip(base.pictures, base.images, tuned.images, strict=True)
        )
    ]
    sheet = run / "before_after.png"
    report.contact_sheet(cells, sheet, titles=("base", "tuned"))
    last = checkpoint.latest(run)
    next_command = f"alignprop evaluate {run}"
    values: dict[str, Any] = {
        "run": str(run.resolve()),
        "adapter": str((last / checkpoint.LORA_FILE).resolve()),
        "sheet": str(sheet.resolve()),
        "steps": session.trainer.step_number,
        "images_seen": session.trainer.images_seen,
        "seconds": seconds,
        "peak_memory_gib": peak,
        "held_out": {
            "prompts": config.eval.prompts,
            "images": len(base.pictures),
            "rewards": {name: asdict(result) for name, result in paired.items()},
            "checker": checks,
        },
        "next": next_command,
    }
    checkpoint.write_text(run / "summary.json", json.dumps(values, indent=2) + "\n")
    console = session.console
    title = f"{len(base.pictures)} held-out pictures ({config.eval.prompts}), base and tuned"
    console.result(
        "alignprop.train/1",
        values,
        [
            table(
                title,
                ("", "base", "tuned", "difference", "95 % interval"),
                [*map(_reward_row, paired, paired.values()), *map(_check_row, checks.items())],
            ),
            "",
            f"adapter  {last / checkpoint.LORA_FILE}",
            f"pictures {sheet}",
            f"{session.trainer.step_number} steps, {session.trainer.images_seen} images, "
            f"{seconds:.0f} s, at most {peak:.2f} GiB",
            f"next: {next_command}",
        ],
    )


def _reward_row(name: str, result: Paired) -> tuple[str, ...]:
    return (
        name,
        f"{result.base:.4f}",
        f"{result.tuned:.4f}",
        f"{result.difference:+.4f}",
        f"{result.low:+.4f} to {result.high:+.4f}",
    )


def _check_row(item: tuple[str, dict[str, float]]) -> tuple[str, ...]:
    name, shares = item
    before, after = shares["base"], shares["tuned"]
    return (f"{name} right", f"{before:.0%}", f"{after:.0%}", f"{after - before:+.0%}", "")
