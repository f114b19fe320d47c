"""What decoding and scoring in chunks saves: `decode_batch` 1 against the whole micro-batch.

One step of the embedded model on the CPU: 32 images of 48 pixels at once, T = 5, the last call with
gradient, the network's call recomputed, reward `clip`. `alive` is the most that the step's tensors
take at once, counted by hooks; `process` is how much a process grew by the step.

Run:  python tests/benchmarks/decode_batch.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from alignprop_cli.config.validation import parse
from alignprop_cli.device import peak_gib
from alignprop_cli.planning.meter import Meter
from alignprop_cli.prompts import load_prompts

BATCH, CHUNKS = 32, (32, 8, 1)


def measure(chunk: int, *, count: bool) -> float:
    """Return MiB: alive, or by which this process grew."""
    from building import build_trainer, open_parts

    config = parse(
        {
            "sample": {"num_inference_steps": 5, "guidance_scale": 3.0},
            "gradient": {
                "method": "last_k",
                "checkpoint_network": "call",
                "checkpoint_decoder": False,
                "checkpoint_reward": False,
            },
            "reward": {"clip": {"model": "tiny"}},
            "train": {
                "prompts": "shapes",
                "batch_size": BATCH,
                "rollout_batch": BATCH,
                "micro_batch": BATCH,
                "decode_batch": chunk,
            },
        }
    )
    trainer = build_trainer(config, open_parts(config, load_prompts("shapes")))
    before = peak_gib(trainer.model.device)
    if not count:
        trainer.step()
        return 1024 * (peak_gib(trainer.model.device) - before)
    with Meter() as meter:
        trainer.step()
    return meter.peak / 2**20


def main() -> None:
    """Print a table, each figure from a process of its own; or one figure, in such a process."""
    if len(sys.argv) == 3:
        print(measure(int(sys.argv[1]), count=sys.argv[2] == "alive"))
        return
    print("| decode_batch | alive, MiB | process, MiB |\n|---|---|---|")
    for chunk in CHUNKS:
        figures: list[str] = []
        for what in ("alive", "process"):
            command = [sys.executable, str(Path(__file__)), str(chunk), what]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures.append(f"{float(done.stdout.split()[-1]):.0f}")
        print(f"| {chunk} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
