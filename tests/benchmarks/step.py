"""One optimiser step of ours against TRL's AlignPropTrainer, on the same model and the same LoRA.

TRL 0.22.2 is the last release that has that trainer. It runs in an environment of its own, made
here with versions that work together; the sides take turns, so that both meet the same machine.
Both: batch 2, 50 steps of DDIM, eta 0, guidance 7.5, LoRA of rank 4 on the attention projections,
AdamW, reward -mean((image - 0.5)^2), a network of 34 million random weights, pictures 256 x 256.
TRL's transformers does not read the text encoder that ours saves and makes a random one of its own.

Run:  python tests/benchmarks/step.py --threads 2 --output tests/benchmarks/results/step_X.md
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sides import Side, median

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PEER = (
    "trl==0.22.2",
    "torch==2.13.0",
    "diffusers==0.39.0",
    "transformers==4.57.6",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "huggingface_hub==0.36.2",
    "datasets==5.0.1",
    "numpy==2.4.6",
)


def peer_python(folder: Path, packages: Sequence[str] = PEER) -> str:
    """Return the interpreter of TRL's environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def make_model(folder: Path) -> Path:
    """Write the model that both sides load."""
    sys.path.insert(0, str(ROOT))
    from tests.factories import mid_pipeline

    return mid_pipeline(folder)


def compare(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Measure, and return the lines of a report."""
    threads, steps = str(arguments.threads), str(arguments.steps)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    model = str(make_model(folder / "model"))
    python = peer_python(arguments.environment)

    def start(name: str) -> Side:
        given = [model, steps, threads, arguments.dtype]
        if name == "TRL":
            return Side(python, HERE / "peer.py", given, environment)
        return Side(sys.executable, HERE / "ours.py", given, environment)

    started: dict[str, Side] = {}

    def ask(name: str, command: str, k: int = 1, **more: Any) -> Any:
        """Ask a side, which for large windows starts anew, since memory is short for two."""
        sent = more if command == "versions" else {"k": k, **more}
        if k < arguments.apart:
            if name not in started:
                started[name] = start(name)
            return started[name].ask(command, **sent)
        for other in started.values():
            other.close()
        started.clear()
        alone = start(name)
        if command == "step":
            alone.ask("step", **sent)  # warms up
        answer = alone.ask(command, **sent)
        alone.close()
        return answer

    lines = [
        f"TRL side: {words(ask('TRL', 'versions'))}",
        f"our side: {words(ask('ours', 'versions'))}",
        f"machine: {machine()}, {threads} threads, {arguments.dtype}, "
        f"Python {platform.python_version()}",
        "",
        "| K | side | recompute | seconds, median (all) | TRL / ours | TFLOP | over the floor "
        "| stored MB | alive MB | network calls |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in arguments.windows:
        floor = ask("ours", "floor", k)["flops"]
        counted = {"TRL": ask("TRL", "count", k)}
        times: dict[str, list[float]] = {"TRL": []}
        for level in arguments.levels:
            counted[level] = ask("ours", "count", k, level=level)
        timed = arguments.levels[0]
        times[timed] = []
        for _ in range(arguments.reps):
            times["TRL"].append(ask("TRL", "step", k)["seconds"])
            times[timed].append(ask("ours", "step", k, level=timed)["seconds"])
            print(f"K = {k}: {times}", file=sys.stderr, flush=True)
        for side, row in counted.items():
            taken = "not timed"
            if side in times:
                everything = ", ".join(f"{second:.1f}" for second in times[side])
                taken = f"{median(times[side]):.2f} ({everything})"
            ratio = f"{median(times['TRL']) / median(times[timed]):.2f}" if side == timed else ""
            name, again = ("TRL", "call") if side == "TRL" else ("ours", side)
            lines.append(
                f"| {k} | {name} | {again} | {taken} | {ratio} "
                f"| {row['flops'] / 1e12:.4f} | {row['flops'] / floor:.3f} "
                f"| {row['saved'] / 1e6:.0f} | {row['peak'] / 1e6:.0f} | {row['calls']:.0f} |"
            )
    return lines


def words(versions: dict[str, Any]) -> str:
    """Return names and versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def machine() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} logical cores)" if names else platform.machine()


def main() -> None:
    """Compare, print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of frozen weights"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument(
        "--apart",
        type=int,
        default=50,
        help="windows of so many calls and more are measured in processes of their own",
    )
    parser.add_argument(
        "--levels",
        nargs="+",
        default=["none", "call"],
        help="what ours computes again in backward; only the first is timed",
    )
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(tempfile.gettempdir()) / "alignprop-trl-0.22.2",
        help="where TRL's environment is or will be",
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = compare(arguments, Path(folder))
    command = " ".join(["python", "tests/benchmarks/step.py", *sys.argv[1:]])
    text = "\n".join([f"# {(__doc__ or '').splitlines()[0]}", "", f"`{command}`", "", *lines, ""])
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
