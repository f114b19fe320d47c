"""How time and memory of a step grow with its settings: fitted exponents.

The window, micro-batch, steps and size of the embedded model, one at a time. Time is the
median of a few steps, memory the most bytes that lived at once beside the weights (counted, not
sampled). An exponent is the slope of a straight line through the logarithms: 1 is proportional.
Then the same batch of preset tiny by one process and by several, one thread each: there memory is
the largest resident set of the first process, with torch and the weights.

Run:  python tests/benchmarks/scaling.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import building
import numpy as np
import torch
from sides import timed

from alignprop_cli.config.validation import parse
from alignprop_cli.planning.meter import Meter
from alignprop_cli.prompts import load_prompts
from alignprop_cli.training.trainer import Trainer

BASE = {"k": 4, "micro_batch": 4, "steps": 8, "size": 48}
AXES = {
    "k": (1, 2, 4, 8),
    "micro_batch": (1, 2, 4, 8),
    "steps": (4, 8, 16, 32),
    "size": (48, 72, 96, 144),
}


def trainer(k: int, micro_batch: int, steps: int, size: int) -> Trainer:
    config = parse(
        {
            "model": {"id": "tiny"},
            "lora": {"rank": 4},
            "sample": {
                "num_inference_steps": steps,
                "guidance_scale": 3.0,
                "height": size,
                "width": size,
            },
            "gradient": {
                "method": "last_k",
                "k": k,
                "checkpoint_network": "none",
                "checkpoint_decoder": False,
                "checkpoint_reward": False,
            },
            "reward": {"brightness": {}},
            "train": {"prompts": "shapes", "batch_size": micro_batch, "micro_batch": micro_batch},
        }
    )
    return building.build_trainer(config, building.open_parts(config, load_prompts("shapes")))


def measure(reps: int, **values: int) -> tuple[float, float]:
    """Return the seconds of a step and the most MB that it needed."""
    made = trainer(**values)
    made.step()
    taken = statistics.median(timed(made.step)["seconds"] for _ in range(reps))
    with Meter() as meter:
        made.step()
    return taken, meter.peak / 1e6


def in_processes(reps: int, processes: int) -> tuple[float, float]:
    """Return the seconds of a step of preset tiny and the largest resident set in MB."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    train = ["train", "--preset=tiny", f"--steps={reps + 1}", "--seed=0", "--quiet"]
    # Every step has the same window.
    settings = ["gradient.method=last_k", "gradient.k=3", "eval.images=2", "eval.sample_images=2"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", *launcher, "--local-addr=localhost", "-m", "alignprop_cli"),
                *(*train, f"--output={folder}/run"),
                *(f"--set={setting}" for setting in settings),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    seconds = statistics.median(record["seconds"] for record in records[1:])  # after warming up
    return seconds, max(record["peak_memory_gib"] for record in records) * 2**30 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"base {BASE}, {arguments.threads} thread(s), medians of {arguments.reps}")
    print("\n| | seconds | exponent | MB | exponent |\n|---|---|---|---|---|")
    for axis, points in AXES.items():
        results = [measure(arguments.reps, **(BASE | {axis: point})) for point in points]
        size = axis == "size"
        places = [point**2 if size else point for point in points]
        print(row("pixels, from sizes" if size else axis, points, places, results), flush=True)
    points = arguments.processes
    results = [in_processes(arguments.reps, point) for point in points]
    print(row("processes", points, points, results))


def row(
    name: str, points: Sequence[int], places: Sequence[int], results: Sequence[tuple[float, float]]
) -> str:
    """Return a line of the table: (seconds, MB) at the points, fitted over the places."""
    seconds, memory = np.log(np.array(results)).T
    slopes = [np.polyfit(np.log(places), figures, 1)[0] for figures in (seconds, memory)]
    columns = [", ".join(f"{result[i]:.3g}" for result in results) for i in (0, 1)]
    return (
        f"| {name} {', '.join(map(str, points))} | {columns[0]} | {slopes[0]:.2f} "
        f"| {columns[1]} | {slopes[1]:.2f} |"
    )


if __name__ == "__main__":
    main()
