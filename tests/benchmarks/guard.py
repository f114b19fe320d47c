"""How often the guard is wrong: honest runs of the shipped presets, with several seeds.

    python tests/benchmarks/guard.py --steps 12 --batch-size 8 --every 2 --output honest

A run is honest if it is a shipped preset, whose images were looked at and whose figures are in
docs/measured.md. Its steps and its batch are given here: few images a step make noisier gradients,
and so a harder test. The exit code is 1 if the guard stopped any.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from alignprop_cli.config import presets
from alignprop_cli.console import Console
from alignprop_cli.training.run import run_training

RUNS = (
    *(("tiny", seed) for seed in range(4)),
    *(("tiny_count", seed) for seed in range(3)),
    *(("tiny_compressibility", seed) for seed in range(3)),
)


def honest(preset: str, seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one run and return what the guard said."""
    flags = {
        "train.seed": seed,
        "train.steps": arguments.steps,
        "train.batch_size": arguments.batch_size,
        "train.micro_batch": min(8, arguments.batch_size),
        "eval.every": arguments.every,
        "output.save_every": 0,
        "output.dir": str(folder),
    }
    config = presets.resolve(preset=preset, flags={k: v for k, v in flags.items() if v is not None})
    started = time.process_time()
    run_training(config, Console(quiet=True), name=preset, resume=None)
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line["guard"] for line in lines if "guard" in line]
    worst = {
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
        "worst": worst,
        "cpu_seconds": time.process_time() - started,
    }


def row(found: dict[str, Any]) -> str:
    """Return one row of the table."""
    worst = ", ".join(
        f"{name} {change['harm']:.2f} ({change['standard_errors']:.1f} of {change['needed']:.1f})"
        for name, change in found["worst"].items()
    )
    return (
        f"| {found['preset']} | {found['seed']} | {found['steps']} | {found['measured']} | "
        f"{found['alarms']} | {'yes' if found['stopped'] else 'no'} | {found['best'] or '-'} | "
        f"{worst} |"
    )


def main() -> int:
    """Run all and print a table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=None, help="default: those of the preset")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("honest"))
    parser.add_argument("--only", default="", help="one preset")
    arguments = parser.parse_args()
    print("| preset | seed | steps | measured | alarms | stopped | best | worst, in tolerances |")
    print("|---|---|---|---|---|---|---|---|")
    stopped = 0
    for preset, seed in RUNS:
        if arguments.only in ("", preset):
            folder = arguments.output / f"{preset}-{seed}"
            found = honest(preset, seed, folder, arguments)
            (folder / "honest.json").write_text(json.dumps(found, indent=2))
            stopped += found["stopped"]
            print(row(found), flush=True)
    print(f"\n{stopped} stopped")
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
