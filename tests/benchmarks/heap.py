"""What a step on the CPU takes of the RAM, against what the plan counts on; in MiB.

The model and the settings are those of `step.py`; every row is a process of its own. In use and
free are what glibc's heap holds when the images are scored and nothing has gone back, with the
graphs of window and tail alive; free are the gaps between the tensors.

Run:  python tests/benchmarks/heap.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from sides import HERE, Case, Side, environment, machine, words, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("small", "mid"), default="mid")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--recompute", nargs="+", default=["none", "block", "call"])
    parser.add_argument("--decode-batch", type=int, default=2, help="of the 2 images of a step")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(arguments.model, Path(folder) / "model")
        case = Case(str(model), arguments.steps).encoded()

        def start() -> Side:
            return Side(sys.executable, HERE / "ours.py", [case], environment(threads=2))

        first = start()
        print(f"{words(first.ask('versions'))}; {machine()}, T = {arguments.steps}\n")
        first.close()
        print("| K | recompute | before | at most | grew | counted on | ratio | in use | free |")
        print("|---|---|---|---|---|---|---|---|---|")
        division = [2, 2, arguments.decode_batch]
        for k in arguments.windows:
            for level in arguments.recompute:
                side = start()
                found = side.ask("heap", k=k, recompute=level, division=division)
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
