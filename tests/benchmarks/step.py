"""One optimiser step of ours against TRL's AlignPropTrainer, on the same model and the same LoRA.

The sides take turns in processes of their own, so that both meet the same machine; TRL has an
environment of its own, made here, or a folder of packages (--peer-path). Both: DDIM, eta 0,
guidance 7.5, LoRA of rank 4 on the attention projections, AdamW, reward -mean((image - 0.5)^2),
random weights. TRL's transformers does not read the text encoder that ours saves and makes a random
one of its own. Ours is not compiled.

On the CPU: batch 2, a network of 34 million weights, images of 256 pixels; the operations and bytes
of a step are counted too. `stored` is what autograd keeps when backward begins; of ours it is what
the window keeps and then what the tail (decoder and reward) keeps besides, both at once. On a GPU:
batch 8, Stable Diffusion 1.5, 512 pixels, bfloat16; the peak of torch's allocator instead. Every
turn there begins with a step that is not timed and leaves the memory to the other side.

With --parts each part of our speed is measured on and off instead, at K = 10, 1, random and 50, in
at most --seconds (parts.py).

Run:  python tests/benchmarks/step.py --threads 2 --output tests/benchmarks/results/step_X.md
      python tests/benchmarks/step.py --device cuda --model sd-1.5 --peer-path FOLDER --reps 3
      python tests/benchmarks/step.py --device cuda --model sd-1.5 --parts --lines FILE --no-trl
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import parts
import trl_environment
from sides import HERE, Case, Report, Side, environment, machine, median, words, write_model

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": "mid",
        "dtype": "float32",
        "batch_size": 2,
        "windows": [1, 10, 50],
        "recompute": ["none", "call"],
        "division": [2, 2, 2],
    },
    "cuda": {
        "model": "sd-1.5",
        "dtype": "bfloat16",
        "batch_size": 8,
        "windows": [1, 10],
        "recompute": ["auto"],
        "division": None,
    },
}
"""By device; the CPU's were chosen before plans were, and are kept for comparison."""


def case_of(arguments: argparse.Namespace, model: Path) -> Case:
    """Return what both sides compute a step of."""
    return Case(
        model=str(model),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        peer_batch=arguments.peer_batch or arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
    )


class Pair:
    """Both sides, started when they are first asked.

    Args:
        arguments: Of the command line.
        model: Folder of the model.
    """

    def __init__(self, arguments: argparse.Namespace, model: Path) -> None:
        self._arguments = arguments
        self._case = case_of(arguments, model)
        self._peer = trl_environment.python_and_path(arguments)
        self._started: dict[str, Side] = {}

    def _start(self, name: str) -> Side:
        python, path = self._peer if name == "TRL" else (sys.executable, None)
        script = HERE / ("peer.py" if name == "TRL" else "ours.py")
        variables = environment(self._case.threads, path, self._case.device)
        return Side(python, script, [self._case.encoded()], variables)

    def ask(self, name: str, command: str, k: int = 1, **more: Any) -> Any:
        """Ask a side, which for large windows starts anew, since memory is short for two."""
        sent = more if command == "versions" else {"k": k, **more}
        if k < self._arguments.apart:
            if name not in self._started:
                self._started[name] = self._start(name)
            return self._started[name].ask(command, **sent)
        self.close()
        alone = self._start(name)
        if command == "step":
            alone.ask("step", **sent)  # warms up
        answer = alone.ask(command, **sent)
        alone.close()
        return answer

    def close(self) -> None:
        for side in self._started.values():
            side.close()
        self._started.clear()


def compare(arguments: argparse.Namespace, pair: Pair, report: Report) -> None:
    """Measure, and report a row as soon as it is known."""
    counts = arguments.device == "cpu"
    report.add(
        f"TRL side: {words(pair.ask('TRL', 'versions'))}\\",
        f"our side: {words(pair.ask('ours', 'versions'))}\\",
        f"machine: {machine()}, {arguments.threads} threads, Python {platform.python_version()}\\",
        f"model {arguments.model}, {arguments.dtype}, batch {arguments.batch_size}, "
        f"T = {arguments.steps}",
        "",
    )
    columns = ["K", "side", "recompute", "seconds, median (all)", "TRL / ours"]
    if counts:
        columns += ["TFLOP", "over the floor", "stored MB", "alive MB", "network calls"]
    else:
        columns += ["allocated GiB", "reserved GiB"]
    report.add(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
    plans: list[str] = []
    for k in arguments.windows:
        counted = count(arguments, pair, k) if counts else {}
        # Where a step is counted only the first level is timed, as what recomputing costs is known.
        timed = arguments.recompute[:1] if counts else arguments.recompute
        turns = take_turns(arguments, pair, k, timed)
        # Asked now: where memory ran out, the batches have been halved.
        for level in arguments.recompute:
            ours = {"recompute": level, "division": arguments.division}
            plans.append(f"- K = {k}, {level}: {pair.ask('ours', 'plan', k, **ours)}")
        for side in ("TRL", *arguments.recompute):
            report.add(row(k, side, turns, counted))
    report.add("", "Plans of ours:", "", *plans, "")


def count(arguments: argparse.Namespace, pair: Pair, k: int) -> dict[str, list[str]]:
    """Return the cells of what is counted, by side."""
    floor = pair.ask("ours", "floor", k)["flops"]
    found = {"TRL": pair.ask("TRL", "count", k)}
    for level in arguments.recompute:
        found[level] = pair.ask("ours", "count", k, recompute=level, division=arguments.division)
    cells: dict[str, list[str]] = {}
    for side, one in found.items():
        stored = f"{one['saved'] / 1e6:.0f}"
        stored += f" + {one['tail'] / 1e6:.0f}" if "tail" in one else ""
        work = [f"{one['flops'] / 1e12:.4f}", f"{one['flops'] / floor:.3f}"]
        cells[side] = [*work, stored, f"{one['peak'] / 1e6:.0f}", f"{one['calls']:.0f}"]
    return cells


def take_turns(
    arguments: argparse.Namespace, pair: Pair, k: int, levels: list[str]
) -> dict[str, list[dict[str, float]]]:
    """Return what the steps of each side took."""
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in ("TRL", *levels)}
    for _ in range(arguments.reps):
        turns["TRL"].append(pair.ask("TRL", "step", k))
        for level in levels:
            ours = {"recompute": level, "division": arguments.division}
            turns[level].append(pair.ask("ours", "step", k, **ours))
        latest = {side: steps[-1] for side, steps in turns.items()}
        print(f"K = {k}: {latest}", file=sys.stderr, flush=True)
    return turns


def row(
    k: int, side: str, turns: dict[str, list[dict[str, float]]], counted: dict[str, list[str]]
) -> str:
    """Return a row of the table."""

    def seconds(name: str) -> list[float]:
        return [step["seconds"] for step in turns[name]]

    name, recompute = ("TRL", "call") if side == "TRL" else ("ours", side)
    cells = [str(k), name, recompute, "not timed", ""]
    if side in turns:
        each = ", ".join(f"{second:.2f}" for second in seconds(side))
        cells[3] = f"{median(seconds(side)):.2f} ({each})"
        if side != "TRL":
            cells[4] = f"{median(seconds('TRL')) / median(seconds(side)):.2f}"
        for memory in ("allocated", "reserved"):
            if memory in turns[side][0]:
                cells.append(f"{max(step[memory] for step in turns[side]):.2f}")
    return f"| {' | '.join([*cells, *counted.get(side, [])])} |"


def division(text: str) -> list[int] | None:
    """Return three batches, or None for the plan's own."""
    if text == "auto":
        return None
    rollout, micro, decode = map(int, text.split(","))
    return [rollout, micro, decode]


def main() -> None:
    """Compare, and print the report as it comes."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=tuple(DEFAULTS), default="cpu", help="where it runs")
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[device],
    )
    parser.set_defaults(**DEFAULTS[device.parse_known_args()[0].device])
    parser.add_argument("--model", choices=("small", "mid", "sd-1.5"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of frozen weights")
    parser.add_argument("--batch-size", type=int, help="images of a step")
    parser.add_argument("--steps", type=int, default=50, help="network calls of a chain")
    parser.add_argument("--windows", type=int, nargs="+", help="K, calls with gradient")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument(
        "--recompute",
        nargs="+",
        choices=("auto", "none", "block", "call"),
        help="what ours recomputes of the network in backward, auto as its plan says; only auto "
        "may recompute decoder and reward. On the CPU only the first is timed",
    )
    parser.add_argument(
        "--division",
        type=division,
        metavar="ROLLOUT,MICRO,DECODE",
        help="images that ours rolls out, takes back and decodes at once; auto is its plan's own",
    )
    parser.add_argument(
        "--peer-batch", type=int, help="images that TRL takes at once; all of them if not given"
    )
    parser.add_argument(
        "--apart",
        type=int,
        default=50,
        help="windows of so many calls and more are measured in processes of their own",
    )
    parser.add_argument("--parts", action="store_true", help="measure parts of ours on and off")
    parser.add_argument("--seconds", type=float, default=450.0, help="that --parts may take")
    parser.add_argument("--lines", type=Path, help="file to append the answers of --parts to")
    parser.add_argument(
        "--no-trl", dest="trl", action="store_false", help="leave TRL out of --parts"
    )
    trl_environment.add_options(parser, "alignprop-trl-0.22.2")
    parser.add_argument("--output", type=Path, help="file to append the report to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(arguments.model, Path(folder) / "model", arguments.device)
        if arguments.parts:
            parts.measure(arguments, case_of(arguments, model))
            return
        pair = Pair(arguments, model)
        report = Report((__doc__ or "").splitlines()[0], arguments.output)
        compare(arguments, pair, report)
        pair.close()


if __name__ == "__main__":
    main()
