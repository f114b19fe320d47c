"""Training runs of the program within a limit of GPU memory that is really held.

A case is PRESET,LIMIT,MODEL with KEY=VALUE after it, such as klein_hps,16GB,FOLDER. Each is a run
of `alignprop train` in a process of its own, a few steps and nothing else, with `--gpu-memory`: the
allocator is held to the limit less what the context takes. Reported are the plan, as it was
estimated and as it was settled after the probe; the peak of torch's allocator over the whole run;
what the driver says is in use on the card beyond what was before, which has the context and what
the allocator caches; and seconds of each step. The first step is slower; an image takes the median
of the others, divided by the batch. On a CPU the limit is planned for and not held.

Run:  python tests/benchmarks/limits.py klein_hps,16GB,FOLDER zimage_turbo_hps,24GB,FOLDER \\
          --set lora.rank=16 --set train.batch_size=8 --set reward.hps.weights=FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from sides import ROOT, Report, machine

COLUMNS = (
    "case",
    "plan",
    "planned, GiB",
    "peak, GiB",
    "on the card, GiB",
    "s a step",
    "s an image",
)


class Card:
    """Watches how much of the first GPU is in use while a block runs, in GiB."""

    def __enter__(self) -> Card:
        self.before = self.most = _used()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.most = max(self.most, _used())


def _used() -> float:
    if not torch.cuda.is_available():
        return 0.0
    # Not torch.cuda.mem_get_info: it would make a context of this process's own.
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def run(case: str, options: argparse.Namespace) -> list[str]:
    """Run a case; return the cells of its row."""
    preset, limit, model, *settings = case.split(",")
    settings += [f"model.id={model}", "train.prompts=animals", "eval.prompts=animals-eval"]
    settings += ["eval.every=0", "eval.images=2", "output.save_every=1000000", *options.set]
    held = f"--gpu-memory={limit}"
    if not torch.cuda.is_available():
        held = f"--set=train.memory_limit={limit}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alignprop_cli", "train", f"--preset={preset}", held]
        command += [f"--set={each}" for each in settings]
        command += [f"--steps={options.steps}", f"--output={folder}/run"]
        started = time.monotonic()
        with Card() as card:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=options.timeout
            )
        print(
            done.stderr, f"{case}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
        )
        if done.returncode:
            return [case, f"exit {done.returncode}", *["-"] * (len(COLUMNS) - 2)]
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in lines]
    seconds = [step["seconds"] for step in steps]
    images = steps[0]["images_seen"]
    plans = [line for line in done.stderr.splitlines() if "images a step =" in line]
    planned = [line.split("; about ")[1].split(" GiB")[0] for line in plans if "; about " in line]
    return [
        f"{preset}, {limit}" + "".join(f", {each}" for each in case.split(",")[3:]),
        plans[-1].split("images a step = ")[1].split("; about")[0] if plans else "-",
        " then ".join(planned) or "-",
        f"{summary['peak_memory_gib']:.2f}",
        f"{card.most - card.before:.2f}",
        ", ".join(f"{each:.2f}" for each in seconds),
        f"{statistics.median(seconds[1:] or seconds) / images:.3f}",
    ]


def main() -> None:
    """Run all cases, and print a row of the table as soon as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="+", metavar="PRESET,LIMIT,MODEL[,KEY=VALUE]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of a case")
    parser.add_argument("--output", type=Path, help="file to append the report to")
    options = parser.parse_args()
    report = Report((__doc__ or "").splitlines()[0], options.output)
    report.add(machine(), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|")
    for case in options.cases:
        try:
            cells = run(case, options)
        except subprocess.TimeoutExpired:
            cells = [case, f"not done in {options.timeout:.0f} s", *["-"] * (len(COLUMNS) - 2)]
        report.add(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
