"""Every estimator on one preset: its gradient beside the full one, and what training with it does.

`gradients`: the gradient of each of N images of the coming step, alone, on a fresh LoRA or after
some steps, with the path that the estimator draws for it. With m_e the mean over images of an
estimator e and m of `full`,

    cosine = m_e . m / (|m_e| |m|)      length = |m_e| / |m|      variance = E |g - m_e|^2 / |m_e|^2

where all products of means are taken over pairs of different images, so that noise adds nothing to
them. A step of B images divides the variance by B. The images with the largest full gradients can
be left out: they decide everything otherwise. Calls and seconds are those of one image alone.

`training`: the preset's training with each estimator, at equal images (the preset's steps) and at
equal seconds (as many steps as take the time of the preset's own estimator, by the median step of
the first run; the learning rate falls over the same share of them). Then `alignprop evaluate` on
held-out prompts, several images each. One process at a time; everything goes through the program.

Run:  python tests/benchmarks/estimators.py gradients
      python tests/benchmarks/estimators.py training --keep estimators
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import building
import numpy as np
import torch
from sides import ROOT, Report

from alignprop_cli.config import presets
from alignprop_cli.config.gradient import GradientConfig
from alignprop_cli.lora import layers as lora
from alignprop_cli.prompts import PromptStream, load_prompts
from alignprop_cli.training.batches import images_of_step
from alignprop_cli.training.record import Totals
from alignprop_cli.training.trainer import Trainer

METHODS = get_args(GradientConfig.model_fields["method"].annotation)
FULL = "full"


def chosen(text: str) -> tuple[str, list[str]]:
    """Return name and settings of a method as it is typed: METHOD or METHOD,KEY=VALUE,..."""
    method, *options = text.split(",")
    return text, [f"gradient.{option}" for option in (f"method={method}", *options)]


# 1. Gradients


def image_gradients(trainer: Trainer, prompts: Sequence[str], images: int) -> torch.Tensor:
    """Return the gradient of the loss of each image alone, (images, weights), float64."""
    stream = PromptStream(list(prompts), trainer.settings.seed)
    # Each image draws a path of its own.
    settings = replace(trainer.settings, batch_size=images, window_group=1)
    merged = lora.Merged(trainer.model.network.module)
    weights = list(trainer.optimizer.parameters.values())
    found: dict[int, torch.Tensor] = {}
    for image in images_of_step(settings, stream, trainer.schedule, trainer.step_number, (0, 1)):
        trainer.optimizer.zero_grad()
        starts = trainer.roll_out([image], merged)[image.number][None]
        ends = trainer.run_path([image], starts, merged)
        ends.backward(trainer.score([image], ends.detach(), Totals(trainer.mixture.metrics)))
        rows = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
        # A step has the mean of its images' losses; this is the loss of one.
        found[image.number] = trainer.settings.batch_size * rows.double()
    # Estimators order the images of a step in their own ways.
    return torch.stack([found[number] for number in sorted(found)])


def mean_product(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the inner product of two means without bias: over pairs of different images."""
    count = len(one)
    same = float((one * other).sum())
    return (float(one.sum(dim=0) @ other.sum(dim=0)) - same) / (count * (count - 1))


def compare(rows: torch.Tensor, full: torch.Tensor) -> dict[str, float]:
    own, both, whole = mean_product(rows, rows), mean_product(rows, full), mean_product(full, full)
    noise = float(rows.square().sum(dim=1).mean()) - own
    return {
        "cosine": both / (own * whole) ** 0.5 if own > 0.0 else float("nan"),
        "length": (max(own, 0.0) / whole) ** 0.5,
        "variance": noise / own if own > 0.0 else float("nan"),
    }


def gradients(arguments: argparse.Namespace, report: Report) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.methods}
    for seed in arguments.seeds:
        full = None
        for name in (FULL, *(m for m in arguments.methods if m != FULL)):
            _, options = chosen(name)
            config = presets.resolve(
                preset=arguments.preset,
                assignments=[*arguments.set, *options],
                flags={"train.seed": seed},
            )
            prompts = load_prompts(config.train.prompts)
            trainer = building.build_trainer(config, building.open_parts(config, prompts))
            for _ in range(arguments.trained):
                trainer.step()
            started = time.process_time()
            rows = image_gradients(trainer, prompts, arguments.images)
            seconds = (time.process_time() - started) / arguments.images
            full = rows if full is None else full
            # The same images for every estimator.
            kept = round(arguments.images * (1.0 - arguments.without_largest))
            order = full.norm(dim=1).argsort()[:kept]
            if name in found:
                estimator = trainer.settings.estimator
                calls = estimator.mean(len(trainer.schedule)) * max(estimator.copies, 1)
                found[name].append(
                    {**compare(rows[order], full[order]), "calls": calls, "seconds": seconds}
                )
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
    columns = ("cosine", "length", "variance", "calls", "seconds")
    report.add(f"| method | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|")
    for name, seeds in found.items():
        cells = [" / ".join(f"{values[column]:.3g}" for values in seeds) for column in columns]
        report.add(f"| {name} | {' | '.join(cells)} |")


# 2. Training


def program(*args: str) -> None:
    """Run alignprop; what it says goes to standard error."""
    subprocess.run([sys.executable, "-m", "alignprop_cli", *args], check=True, stdout=sys.stderr)


def trained(arguments: argparse.Namespace, name: str, seed: int, steps: int) -> Path:
    """Return the run folder of a method and seed; one that is there is used again."""
    folder = arguments.keep / f"{arguments.preset}-{name}-s{seed}-n{steps}"
    if not (folder / "evaluation" / "results.json").is_file():
        _, options = chosen(name)
        config = presets.resolve(preset=arguments.preset)
        settings = [*arguments.set, *options, f"train.seed={seed}", "eval.every=0", "eval.images=8"]
        if config.train.lr_decay_steps is not None:
            share = config.train.lr_decay_steps / config.train.steps
            settings.append(f"train.lr_decay_steps={max(round(share * steps), 1)}")
        again = ["--resume", str(folder)] if folder.is_dir() else [f"--preset={arguments.preset}"]
        options = [] if folder.is_dir() else [f"--set={setting}" for setting in settings]
        new = [] if folder.is_dir() else [f"--output={folder}"]
        program("train", *again, *options, *new, f"--steps={steps}", "--quiet")
        program(
            *("evaluate", str(folder), f"--output={folder / 'evaluation'}", "--quiet"),
            *(f"--images={arguments.images}", f"--images-per-prompt={arguments.images_per_prompt}"),
            *(f"--reward={arguments.reward}",) * bool(arguments.reward),
        )
    return folder


def step_seconds(folder: Path) -> float:
    """Return the median time of a step; the first is warming up."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median([json.loads(line)["seconds"] for line in lines][1:])


def differences(folder: Path) -> dict[str, float]:
    """Return base and tuned minus base of every metric of the evaluation."""
    text = (folder / "evaluation" / "results.json").read_text(encoding="utf-8")
    values: Mapping[str, Any] = json.loads(text)
    found: dict[str, float] = {}
    for name, metric in {**values["rewards"], **values["checker"]}.items():
        models = [key for key in metric if key not in ("trained_on", "base")]
        found[name] = metric[models[-1]]["mean"] - metric["base"]["mean"]
    return found


def training(arguments: argparse.Namespace, report: Report) -> None:
    config = presets.resolve(preset=arguments.preset)
    own, steps = config.gradient.method, arguments.steps or config.train.steps
    budget = {s: steps * step_seconds(trained(arguments, own, s, steps)) for s in arguments.seeds}
    rows: list[tuple[str, str, list[dict[str, float]]]] = []
    for name in arguments.methods:
        images, seconds = list[dict[str, float]](), list[dict[str, float]]()
        for seed in arguments.seeds:
            folder = trained(arguments, name, seed, steps)
            pace = step_seconds(folder)
            images.append({**differences(folder), "steps": steps, "step seconds": pace})
            count = max(round(budget[seed] / pace), 1)
            other = folder if name == own else trained(arguments, name, seed, count)
            seconds.append({**differences(other), "steps": count, "step seconds": pace})
        rows += [(name, "images", images), (name, "seconds", seconds)]
    columns = list(rows[0][2][0])
    report.add(f"| method | equal | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|")
    for name, equal, seeds in rows:
        cells = [
            f"{np.mean([s[c] for s in seeds]):+.4g} ({', '.join(f'{s[c]:+.3g}' for s in seeds)})"
            for c in columns
        ]
        report.add(f"| {name} | {equal} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    for function, images in ((gradients, 256), (training, 500)):
        kind = kinds.add_parser(function.__name__)
        kind.set_defaults(measure=function)
        kind.add_argument("--preset", default="tiny")
        kind.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        kind.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD[,K=V]")
        kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        kind.add_argument("--images", type=int, default=images)
        kind.add_argument("--threads", type=int, default=1)
        kind.add_argument("--output", type=Path, help="file to append the report to")
        if function is gradients:
            kind.add_argument("--trained", type=int, default=0, help="steps before measuring")
            kind.add_argument("--without-largest", type=float, default=0.05, help="share left out")
        else:
            kind.add_argument("--steps", type=int, help="instead of the preset's")
            kind.add_argument(
                "--keep", type=Path, default=Path("estimators"), help="folder of runs"
            )
            kind.add_argument("--images-per-prompt", type=int, default=4)
            kind.add_argument("--reward", help="measured beside the trained ones, NAME,NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report((__doc__ or "").splitlines()[0], arguments.output)
    arguments.measure(arguments, report)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
