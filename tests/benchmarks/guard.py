"""How often the guard is wrong: honest runs of the shipped presets, with several seeds.

    python tests/benchmarks/guard.py --steps 12 --batch-size 4 --every 3 --images 24

    python tests/benchmarks/guard.py --judge RUN...

The second measures the checkpoints of finished runs instead, as the guard would have.

A run is honest if it is a shipped preset, whose images were looked at and whose figures are in
docs/measured.md. Without options it has its whole length. Few images a step make noisier gradients,
and so a harder test; they move the LoRA as far, since Adam divides by the gradient's size. The exit
code is 1 if the guard stopped any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alignprop_cli.config import presets
from alignprop_cli.config.schema import RewardConfig
from alignprop_cli.console import Console
from alignprop_cli.evaluation import draw
from alignprop_cli.evaluation.measures import Quantity, measure
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import open_model
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.training.guard import watched
from alignprop_cli.training.harm import Change, Rule, change
from alignprop_cli.training.run import run_training

PRESETS = ("tiny", "tiny_count", "tiny_compressibility")
RUNS = [(preset, seed) for seed in range(4) for preset in PRESETS][:10]


def honest(preset: str, seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one run and return what the guard said."""
    flags = {
        "train.seed": seed,
        "train.steps": arguments.steps,
        "train.batch_size": arguments.batch_size,
        "train.micro_batch": arguments.batch_size and min(8, arguments.batch_size),
        "eval.every": arguments.every,
        "eval.images": arguments.images,
        "eval.sample_images": arguments.images,
        "output.save_every": 0,
        "output.dir": str(folder),
    }
    config = presets.resolve(preset=preset, flags={k: v for k, v in flags.items() if v is not None})
    started = time.process_time()
    run_training(config, Console(quiet=True), name=preset, resume=None)
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line["guard"] for line in lines if "guard" in line]
    most = {
        name: max(measured, key=lambda said: said["changes"][name]["harm"])["changes"][name]
        for name in measured[0]["changes"]
    }
    return {
        "preset": preset,
        "seed": seed,
        "steps": summary["steps"],
        "measured": len(measured),
        "alarms": sum(bool(said["alarms"]) for said in measured),
        "stopped": summary["guard"]["stopped"],
        "best": summary["guard"]["best_step"],
        "worst": most,
        "cpu_seconds": time.process_time() - started,
    }


def judge(run: Path) -> list[str]:
    """Return one row for each checkpoint of a finished run of the embedded model."""
    held_out = presets.resolve(preset="tiny").eval
    config = presets.resolve(run=run).model_copy(update={"eval": held_out})
    chosen = draw.choose_samples(
        load_prompts(held_out.prompts), held_out.sample_images, held_out.sample_images_per_prompt
    )
    wanted = [*(sample.prompt for sample in chosen), config.sample.negative_prompt]
    cpu = torch.device("cpu")
    model = open_model(config.model, wanted, cpu)
    members = {name: RewardConfig(**each.options) for name, each in held_out.rewards.items()}
    mixture = build_mixture({**config.reward, **members}, config.loss, cpu)
    console, module = Console(quiet=True), model.network.module

    def measured() -> dict[str, Quantity]:
        return measure(
            draw.draw_shared(model, chosen, mixture, config, console, features=mixture.features)
        )

    base, rows = measured(), list[str]()
    for path in files.checkpoints(run):
        lora.load(module, files.read(path / files.LORA_FILE), model.id)
        now = measured()
        lora.unload(module)
        changes = {
            name: change(name, base[name], now[name], Rule()) for name in watched(config, base)
        }
        alarms = [name for name, found in changes.items() if found.alarms]
        rows.append(
            f"| {run.name} | {path.name} | {', '.join(alarms) or 'none'} | {worst(changes)} |"
        )
    return rows


def worst(changes: Mapping[str, Change]) -> str:
    """Return the changes as the last cell of a row."""
    return ", ".join(
        f"{name} {found.harm:.2f} ({found.standard_errors:.1f} of {found.needed:.1f})"
        for name, found in changes.items()
    )


def row(found: dict[str, Any]) -> str:
    """Return one row of the table."""
    told = worst({name: Change(**values) for name, values in found["worst"].items()})
    return (
        f"| {found['preset']} | {found['seed']} | {found['steps']} | {found['measured']} | "
        f"{found['alarms']} | {'yes' if found['stopped'] else 'no'} | {found['best'] or '-'} | "
        f"{told} |"
    )


def main() -> int:
    """Run all and print a table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("steps", "batch-size", "every", "images"):
        parser.add_argument(f"--{name}", type=int, help="default: as the preset has it")
    parser.add_argument("--output", type=Path, default=Path("honest"))
    parser.add_argument("--first", type=int, default=0, help="leave out the runs before this one")
    parser.add_argument("--last", type=int, default=10, help="and those from this one on")
    parser.add_argument("--judge", type=Path, nargs="+", help="finished runs, not trained here")
    arguments = parser.parse_args()
    for run in arguments.judge or []:
        print("\n".join(judge(run)), flush=True)
    if arguments.judge:
        return 0
    print("| preset | seed | steps | measured | alarms | stopped | best | worst, in tolerances |")
    print("|---|---|---|---|---|---|---|---|")
    stopped = 0
    for preset, seed in RUNS[arguments.first : arguments.last]:
        folder = arguments.output / f"{preset}-{seed}"
        # What the run itself prints would break the table.
        with contextlib.redirect_stdout(io.StringIO()):
            found = honest(preset, seed, folder, arguments)
        (folder / "honest.json").write_text(json.dumps(found, indent=2))
        stopped += found["stopped"]
        print(row(found), flush=True)
    print(f"\n{stopped} stopped")
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
