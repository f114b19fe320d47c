"""What a step on the CPU takes of the RAM, against what the plan counts on; in MiB.

The model and the settings are those of `step.py`; every row is a process of its own. Free is what
glibc's heap holds unused when the forward pass is done: gaps between the tensors.

Run:  python tests/benchmarks/heap.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sides import Side
from step import HERE, ROOT, machine, make_model, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--levels", nargs="+", default=["none", "block", "call"])
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory() as folder:
        own = [str(make_model(Path(folder) / "model")), str(arguments.steps), "2", "float32"]

        def start() -> Side:
            return Side(sys.executable, HERE / "ours.py", own, environment)

        first = start()
        print(f"{words(first.ask('versions'))}; {machine()}, T = {arguments.steps}\n")
        first.close()
        print("| K | recompute | before | at most | grew | counted on | ratio | in use | free |")
        print("|---|---|---|---|---|---|---|---|---|")
        for k in arguments.windows:
            for level in arguments.levels:
                side = start()
                found = side.ask("heap", k=k, level=level)
                side.close()
                grew = found["most"] - found["before"]
                print(
                    f"| {k} | {level} | {found['before']:.0f} | {found['most']:.0f} | {grew:.0f} "
                    f"| {found['expected']:.0f} | {grew / found['expected']:.2f} "
                    f"| {found['used'] - found['used before']:.0f} | {found['free']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
