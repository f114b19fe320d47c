"""What decoding and scoring in chunks saves: how much a process grows by one step on the CPU.

34 million random weights, images of 256 pixels, a micro-batch of 4, T = 3, the last call with
gradient, nothing recomputed. `counted` is what the plan expects beside the weights. Each row is a
process of its own, twice. The bytes that hooks count are in step.py.

Run:  python tests/benchmarks/decode_batch.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from sides import HERE, Case, Side, environment, write_model

BATCH, CHUNKS = 4, (4, 1, 4, 1)


def main() -> None:
    """Print a table, a row as soon as it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model("mid", Path(folder) / "model")
        case = Case(str(model), steps=3, batch_size=BATCH, threads=1)
        print("| decode_batch | counted, MiB | process grew by, MiB |\n|---|---|---|")
        for chunk in CHUNKS:
            side = Side(sys.executable, HERE / "ours.py", [case.encoded()], environment(1))
            grown = side.ask("heap", k=1, recompute="none", division=[BATCH, BATCH, chunk])
            side.close()
            took = grown["most"] - grown["before"]
            print(f"| {chunk} | {grown['expected']:.0f} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
