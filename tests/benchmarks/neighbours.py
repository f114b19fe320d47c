"""How long a short run takes on an idle machine, and beside one and two busy processes.

Run:  python tests/benchmarks/neighbours.py                        what the program chooses
      GOMP_SPINCOUNT=300000 python tests/benchmarks/neighbours.py  the default of GNU's OpenMP

The rounds are in turn, so that a machine that slows down slows all three.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

RUN = [sys.executable, "-m", "alignprop_cli", "train", "--preset", "tiny", "--steps", "4"]
SMALL = ["--set", "train.batch_size=16", "--quiet"]


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Let so many processes compute while the block runs."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        # What has begun a moment ago is not yet seen as running everywhere.
        time.sleep(0.5)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def seconds() -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([*RUN, *SMALL, "--output", f"{folder}/run"], check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    taken: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(parser.parse_args().rounds):
        for count, found in taken.items():
            with busy(count):
                found.append(seconds())
    idle = statistics.median(taken[0])
    print("| busy processes beside | median s | of the idle time | all |\n|---|---|---|---|")
    for count, found in taken.items():
        middle = statistics.median(found)
        each = ", ".join(f"{one:.1f}" for one in found)
        print(f"| {count} | {middle:.1f} | {middle / idle:.2f} | {each} |")


if __name__ == "__main__":
    main()
