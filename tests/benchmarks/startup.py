"""How long a user waits: for --help, for the first step, next to what importing torch takes.

Run:  python tests/benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLI = [sys.executable, "-m", "alignprop_cli"]
REPEATS = 5


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def first_step(folder: Path) -> float:
    """Return the seconds from the command to the first line of metrics.jsonl."""
    started = time.perf_counter()
    train = ["train", "--preset", "tiny", "--steps", "1", "--quiet", "--output", str(folder)]
    with subprocess.Popen([*CLI, *train], stdout=subprocess.DEVNULL) as process:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().endswith(b"\n")):
            assert process.poll() is None, "it ended before its first step"
            time.sleep(0.01)
        taken = time.perf_counter() - started
        process.wait()
    return taken


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        rows = {
            "`python -c 'import torch'`": lambda n: seconds([sys.executable, "-c", "import torch"]),
            "`alignprop --help`": lambda n: seconds([*CLI, "--help"]),
            "`alignprop train --help`": lambda n: seconds([*CLI, "train", "--help"]),
            "`alignprop train --preset tiny`, first step done, base model sampled": (
                lambda n: first_step(Path(place) / str(n))
            ),
        }
        print("| | median of 5, s | all |")
        print("|---|---|---|")
        for name, measure in rows.items():
            taken = [measure(n) for n in range(REPEATS)]
            each = ", ".join(f"{t:.2f}" for t in taken)
            print(f"| {name} | {statistics.median(taken):.2f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
