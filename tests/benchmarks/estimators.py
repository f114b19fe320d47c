"""Every estimator on one preset: its gradient beside the full one, and what training with it does.

`gradients`: the gradient of each of N images of the coming step, alone, on a fresh LoRA or after
some steps, with the path that the estimator draws for it. With m_e the mean over images of an
estimator e and m of `full`,

    cosine = m_e . m / (|m_e| |m|)      length = |m_e| / |m|      variance = E |g - m_e|^2 / |m_e|^2

where all products of means are taken over pairs of different images, so that noise adds nothing to
them, and are added up over the seeds. A step of B images divides the variance by B. After each
figure stands its standard error, by the jackknife over images; a cosine can come out above 1. A
second table leaves out the images with the largest full gradients, which can decide everything
otherwise. Calls and seconds are those of one image alone.

`training`: the preset's training with each estimator at a constant learning rate, judged at equal
images (the preset's steps) and at equal seconds (as many steps as take the CPU time of the preset's
own estimator, a multiple of 5): one run each, of which `alignprop evaluate` compares both
checkpoints with the base model on held-out prompts, several images each. One process at a time;
everything goes through the program.

`costs`: seconds of a step, network calls of an image, and the most memory of a step, on the device
that is there and with the plan that is given (`--set train.micro_batch=8` and so on), the same for
all. On a GPU memory is the peak of torch's allocator.

Run:  python tests/benchmarks/estimators.py gradients
      python tests/benchmarks/estimators.py training --keep estimators
      python tests/benchmarks/estimators.py costs --preset aesthetic --set model.id=FOLDER
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
from sides import ROOT, Report, machine, turn

from alignprop_cli.config import presets
from alignprop_cli.config.gradient import GradientConfig
from alignprop_cli.lora import layers as lora
from alignprop_cli.prompts import PromptStream, load_prompts
from alignprop_cli.training.batches import images_of_step
from alignprop_cli.training.record import Totals
from alignprop_cli.training.trainer import Trainer

METHODS = get_args(GradientConfig.model_fields["method"].annotation)
FULL = "full"
STRIDE = 5
"""Steps between two checkpoints."""


def chosen(text: str) -> tuple[str, list[str]]:
    """Return name and settings of a method as it is typed: METHOD or METHOD,KEY=VALUE,..."""
    method, *options = text.split(",")
    return text, [f"gradient.{option}" for option in (f"method={method}", *options)]


def base(arguments: argparse.Namespace) -> dict[str, str]:
    """Return where the configuration comes from, as `presets.resolve` takes it."""
    given = arguments.preset
    return {"config" if given.endswith(".yaml") else "preset": given}


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


def without_one(gram: torch.Tensor) -> torch.Tensor:
    """Return the inner product of two means without bias: over pairs of different images.

    Args:
        gram: Inner products of the images' gradients, (images, images).

    Returns:
        Shape (1 + images,): with all images, then without each one.
    """
    count = len(gram)
    pairs = gram - gram.diag().diag()
    left = pairs.sum() - pairs.sum(dim=0) - pairs.sum(dim=1)
    return torch.cat([pairs.mean()[None] * count / (count - 1), left / ((count - 1) * (count - 2))])


def products(rows: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Return <m_e, m_e>, <m_e, m>, <m, m> and E |g|^2, with all images and without each one.

    Args:
        rows: An estimator's gradient of each image, (images, weights).
        full: The exact ones.

    Returns:
        Shape (1 + images, 4).
    """
    size = rows.square().sum(dim=1)
    others = (size.sum() - size) / (len(size) - 1)
    grams = (rows @ rows.T, rows @ full.T, full @ full.T)
    return torch.stack([*map(without_one, grams), torch.cat([size.mean()[None], others])], dim=1)


def compare(seeds: Sequence[torch.Tensor]) -> dict[str, str]:
    """Return cosine, length and variance with their standard errors, from `products` per seed."""
    whole = torch.stack([one[0] for one in seeds]).sum(dim=0)
    # Without an image of one seed the other seeds stay as they are.
    left_out = [whole - one[0] + one[1:] for one in seeds]
    own, both, exact, size = torch.cat([whole[None], *left_out]).unbind(dim=1)
    found = {
        "cosine": both / (own * exact).sqrt(),
        "length": (own / exact).sqrt(),
        "variance": (size - own) / own,
    }
    images = len(own) - 1
    errors = {n: ((images - 1) * v[1:].var(correction=0)).sqrt() for n, v in found.items()}
    return {name: f"{value[0]:.3g} ± {errors[name]:.2g}" for name, value in found.items()}


def gradients(arguments: argparse.Namespace, report: Report) -> None:
    """Measure the gradient of every estimator, and add two tables to the report."""
    shares = (0.0, arguments.without_largest)
    found: dict[tuple[float, str], list[torch.Tensor]] = {}
    costs: dict[str, tuple[float, list[float]]] = {}
    for seed in arguments.seeds:
        full = None
        for name in (FULL, *(m for m in arguments.methods if m != FULL)):
            _, options = chosen(name)
            config = presets.resolve(
                **base(arguments),
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
            estimator = trainer.settings.estimator
            calls = estimator.mean(len(trainer.schedule)) * max(estimator.copies, 1)
            costs.setdefault(name, (calls, []))[1].append(seconds)
            for share in shares:
                # The same images for every estimator.
                order = full.norm(dim=1).argsort()[: round(arguments.images * (1.0 - share))]
                found.setdefault((share, name), []).append(products(rows[order], full[order]))
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
    for share in shares:
        without = f"Without the {share:.0%} of images with the largest full gradients:"
        report.add(without if share else "All images:", "")
        report.add("| method | cosine | length | variance | calls | seconds |", "|---" * 6 + "|")
        for name in arguments.methods:
            calls, seconds = costs[name]
            cells = [*compare(found[share, name]).values(), f"{calls:.3g}"]
            report.add(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.3g} |")
        report.add("")


# 2. Training


def program(*args: str) -> None:
    """Run alignprop; what it says goes to standard error."""
    subprocess.run([sys.executable, "-m", "alignprop_cli", *args], check=True, stdout=sys.stderr)


def trained(arguments: argparse.Namespace, name: str, seed: int, steps: int) -> Path:
    """Return the run folder of a method and seed, trained to at least so many steps."""
    folder = arguments.keep / f"{Path(arguments.preset).stem}-{name}-s{seed}"
    if not folder.is_dir():
        _, options = chosen(name)
        # A constant rate, so that a longer run has the shorter one's checkpoints.
        settings = [*options, f"train.seed={seed}", "train.lr_decay_steps=null"]
        settings += [f"output.save_every={STRIDE}", "output.keep_last=null", "eval.every=0"]
        settings += ["eval.images=8", *arguments.set]
        options = [f"--{kind}={given}" for kind, given in base(arguments).items()]
        options += [f"--set={each}" for each in settings]
        program("train", *options, f"--output={folder}", f"--steps={steps}", "--quiet")
    elif not (folder / "checkpoints" / f"step-{steps:06d}").is_dir():
        program("train", f"--resume={folder}", f"--steps={steps}", "--quiet")
    return folder


def step_seconds(arguments: argparse.Namespace, name: str) -> float:
    """Return the CPU time of a step, the median of three; other programs hardly change it."""
    _, options = chosen(name)
    config = presets.resolve(**base(arguments), assignments=[*arguments.set, *options])
    prompts = load_prompts(config.train.prompts)
    trainer = building.build_trainer(config, building.open_parts(config, prompts))
    times = list[float]()
    # The first is warming up.
    for _ in range(4):
        started = time.process_time()
        trainer.step()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def judged(
    arguments: argparse.Namespace, seed: int, checkpoints: Sequence[Path]
) -> list[dict[str, float]]:
    """Return tuned minus base of every metric for each of these checkpoints."""
    output = arguments.keep / f"{Path(arguments.preset).stem}-s{seed}-evaluation"
    # One call for all, so that the base model is sampled once.
    program(
        *("evaluate", *map(str, checkpoints), f"--output={output}", "--overwrite", "--quiet"),
        *(f"--images={arguments.images}", f"--images-per-prompt={arguments.images_per_prompt}"),
        *(f"--reward={arguments.reward}",) * bool(arguments.reward),
    )
    text = (output / "results.json").read_text(encoding="utf-8")
    values: Mapping[str, Any] = json.loads(text)
    found = [dict[str, float]() for _ in checkpoints]
    for name, metric in {**values["rewards"], **values["checker"]}.items():
        models = [key for key in metric if key not in ("trained_on", "base")]
        for model, place in zip(models, found, strict=True):
            place[name] = metric[model]["mean"] - metric["base"]["mean"]
    return found


def training(arguments: argparse.Namespace, report: Report) -> None:
    config = presets.resolve(**base(arguments))
    own, steps = config.gradient.method, arguments.steps or config.train.steps
    if steps % STRIDE:
        raise SystemExit(f"--steps: expected a multiple of {STRIDE}")
    pace_of_own = step_seconds(arguments, own)
    pace = {n: pace_of_own if n == own else step_seconds(arguments, n) for n in arguments.methods}
    # Steps of each row of the table.
    counts = {
        (name, equal): steps if equal == "images" else STRIDE * max(round(share / STRIDE), 1)
        for name, share in ((n, steps * pace_of_own / p) for n, p in pace.items())
        for equal in ("images", "seconds")
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {row: [] for row in counts}
    for seed in arguments.seeds:
        at = dict[tuple[str, str], Path]()
        for name in arguments.methods:
            both = {row: count for row, count in counts.items() if row[0] == name}
            folder = trained(arguments, name, seed, max(both.values()))
            at |= {row: folder / "checkpoints" / f"step-{n:06d}" for row, n in both.items()}
        checkpoints = list(dict.fromkeys(at.values()))
        results = dict(zip(checkpoints, judged(arguments, seed, checkpoints), strict=True))
        for row, checkpoint in at.items():
            more = {"steps": counts[row], "step seconds": pace[row[0]]}
            found[row].append({**results[checkpoint], **more})
    columns = list(next(iter(found.values()))[0])
    report.add(f"| method | equal | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|")
    for (name, equal), seeds in found.items():
        cells = [_cell([seed[column] for seed in seeds]) for column in columns]
        report.add(f"| {name} | {equal} | {' | '.join(cells)} |")


def _cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):+.4g} ({', '.join(f'{value:+.3g}' for value in values)})"


# 3. Costs


def costs(arguments: argparse.Namespace, report: Report) -> None:
    parts: building.Parts | None = None
    report.add(machine(), "")
    report.add("| method | calls with gradient | seconds a step | GiB | plan |", "|---" * 5 + "|")
    for name in arguments.methods:
        _, options = chosen(name)
        config = presets.resolve(**base(arguments), assignments=[*arguments.set, *options])
        prompts = load_prompts(config.train.prompts)
        # An estimator changes nothing about model and rewards.
        parts = building.open_parts(config, prompts) if parts is None else parts
        trainer = building.build_trainer(config, parts)
        device = parts.accelerator.device.type
        if device == "cpu":  # on a GPU every turn warms up
            trainer.step()
        turns = [turn(trainer.step, device) for _ in range(arguments.reps)]
        calls = trainer.settings.estimator.mean(len(trainer.schedule))
        times = ", ".join(f"{each['seconds']:.2f}" for each in turns)
        memory = f"{turns[-1]['allocated']:.2f}" if "allocated" in turns[-1] else "-"
        report.add(f"| {name} | {calls:g} | {times} | {memory} | {trainer.plan.describe()} |")
        del trainer


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    for function, images in ((gradients, 256), (training, 500), (costs, 0)):
        kind = kinds.add_parser(function.__name__)
        kind.set_defaults(measure=function)
        kind.add_argument("--preset", default="tiny", help="or a file, such as flow.yaml")
        kind.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        kind.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD[,K=V]")
        kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        kind.add_argument("--images", type=int, default=images)
        kind.add_argument("--threads", type=int, default=1)
        kind.add_argument("--output", type=Path, help="file to append the report to")
        if function is gradients:
            kind.add_argument("--trained", type=int, default=0, help="steps before measuring")
            kind.add_argument("--without-largest", type=float, default=0.05, help="share left out")
        elif function is costs:
            kind.add_argument("--reps", type=int, default=2)
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
