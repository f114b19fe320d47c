"""Seconds of training until a held-out reward is reached, ours against TRL's AlignPropTrainer.

The embedded model, its preset and its aligner, without what TRL cannot do: on both sides the last
K calls carry gradient in every step, and the learning rate is constant. Both start with the same
LoRA (TRL's pipeline is told the preset's rank and targets), get the same prompts in the same order,
and run the same torch; the noise of training is each side's own. Every few steps, outside the
clock, one judge (our evaluator) samples the same held-out images with the LoRA of each side.
TRL has an environment of its own, made here, or a folder of packages (--peer-path). Its
transformers misses the text encoder's weights by their names, so it gets a copy with its names.
TRL's last step ends at the first noise level, ours at none; see the two rewards of the base model.

Run:  python tests/benchmarks/time_to_reward.py --threads 1 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import trl_environment
from safetensors.torch import load_file, save_file
from sides import HERE, ROOT, Report, Side, environment, machine, median, words

sys.path.insert(0, str(ROOT))
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config

MODEL = ROOT / "alignprop_cli" / "tiny" / "pipeline"
# The reward needs them in TRL's environment too, and torchvision fits one torch only.
SHARED = ("torch", "torchvision", "open_clip_torch", "timm", "ftfy")


def requirements() -> list[str]:
    """Return what TRL's environment is made of."""
    ours = [f"{name}=={version(name).partition('+')[0]}" for name in SHARED]
    return [*(name for name in trl_environment.PACKAGES if not name.startswith("torch==")), *ours]


def peer_model(folder: Path) -> Path:
    """Write the embedded model with the names that TRL's transformers knows."""
    shutil.copytree(MODEL, folder)
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def settings(arguments: argparse.Namespace) -> Config:
    """Return the preset with what both sides can do."""
    return presets.resolve(
        preset="tiny",
        flags={
            "gradient.method": "last_k",
            "gradient.k": arguments.k,
            "train.learning_rate": arguments.learning_rate,
            "eval.images": arguments.images,
        },
        assignments=["train.lr_decay_steps=null"],
    )


def check(peer: Side, judge: Side, folder: Path) -> tuple[float, list[str]]:
    """Refuse sides that sample differently; return the base model's reward and what was seen."""
    noise, start = str(folder / "noise.safetensors"), str(folder / "start.safetensors")
    judge.ask("fresh", seed=0, adapter=start)
    peer.ask("start", seed=0, adapter=start)
    prompt, told = judge.ask("embed")
    embeds = zip(told, peer.ask("embed", prompt=prompt), strict=True)
    apart = max(abs(a - b) for ours, theirs in embeds for a, b in zip(ours, theirs, strict=True))
    assert apart < 1e-5, f"the embeddings of a prompt differ by up to {apart}"
    prompts = judge.ask("noise", file=noise)
    ours = judge.ask("evaluate", adapter=start)
    theirs = peer.ask("draw", noise=noise, prompts=prompts)
    base, other = statistics.mean(ours), statistics.mean(theirs)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert abs(base - other) < 0.005, f"the base model: {base} with ours, {other} with TRL"
    return base, [
        f"embeddings of a prompt: at most {apart:.1e} apart",
        f"held-out reward of the base model from the same noise: {base:.4f} sampled by ours, "
        f"{other:.4f} by TRL; single images at most {largest:.4f} apart",
    ]


@dataclass(frozen=True)
class Run:
    """What one side did with one seed: the reward after every round, the times of every step."""

    rewards: list[float]
    times: list[dict[str, float]]

    def to(self, target: float, every: int) -> dict[str, float] | None:
        """Return steps, seconds and processor seconds until the target was first seen."""
        for i, reward in enumerate(self.rewards):
            if reward >= target:
                done = self.times[: i * every]
                return {
                    "steps": len(done),
                    **{kind: sum(time[kind] for time in done) for kind in ("seconds", "cpu")},
                }
        return None

    def each(self) -> dict[str, float]:
        """Return the median seconds and processor seconds of a step."""
        return {kind: median([time[kind] for time in self.times]) for kind in ("seconds", "cpu")}


def train(
    arguments: argparse.Namespace, sides: dict[str, Side], judge: Side, seed: int, folder: Path
) -> dict[str, Run]:
    """Train both sides in turns."""
    start, adapter = str(folder / "start.safetensors"), str(folder / "adapter.safetensors")
    judge.ask("fresh", seed=seed, adapter=start)
    base = statistics.mean(judge.ask("evaluate", adapter=start))
    runs = {name: Run([base], []) for name in sides}
    for side in sides.values():
        side.ask("start", seed=seed, adapter=start)
    for done in range(0, arguments.max_steps, arguments.every):
        for name, side in sides.items():
            runs[name].times.extend(side.ask("train", steps=arguments.every))
            side.ask("save", adapter=adapter)
            runs[name].rewards.append(statistics.mean(judge.ask("evaluate", adapter=adapter)))
            print(
                f"seed {seed}, step {done + arguments.every}, {name}: "
                f"{runs[name].rewards[-1]:.4f} after "
                f"{sum(time['seconds'] for time in runs[name].times):.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return runs


def pair(theirs: dict[str, float] | None, ours: dict[str, float] | None, kind: str) -> str:
    """Return three cells: TRL's value, ours, and their ratio."""
    cells = ["not reached" if side is None else f"{side[kind]:.4g}" for side in (theirs, ours)]
    ratio = f"{theirs[kind] / ours[kind]:.2f}" if theirs and ours and ours[kind] else ""
    return " | ".join([*cells, ratio])


def tables(results: dict[int, dict[str, Run]], targets: list[float], every: int) -> list[str]:
    """Return the times to the targets, the times of a step, and the curves."""
    lines = [
        "| seed | target | steps, TRL | ours | TRL / ours | seconds, TRL | ours | TRL / ours "
        "| processor seconds, TRL | ours | TRL / ours |",
        "|---" * 11 + "|",
    ]
    for seed, runs in results.items():
        for target in targets:
            found = [runs[name].to(target, every) for name in ("TRL", "ours")]
            cells = [pair(*found, kind) for kind in ("steps", "seconds", "cpu")]
            lines.append(f"| {seed} | {target:.4f} | {' | '.join(cells)} |")
    lines += [
        "",
        "| seed | seconds a step, median, TRL | ours | TRL / ours "
        "| processor seconds a step, median, TRL | ours | TRL / ours |",
        "|---" * 7 + "|",
    ]
    for seed, runs in results.items():
        cells = [pair(runs["TRL"].each(), runs["ours"].each(), kind) for kind in ("seconds", "cpu")]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    curves = {
        f"{name}, seed {seed}": run.rewards
        for seed, runs in results.items()
        for name, run in runs.items()
    }
    lines += ["", f"| reward after | {' | '.join(curves)} |", "|---" * (len(curves) + 1) + "|"]
    for i, row in enumerate(zip(*curves.values(), strict=True)):
        lines.append(f"| {i * every} | {' | '.join(f'{reward:.4f}' for reward in row)} |")
    return lines


def compare(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Measure, and return the lines of a report."""
    config, threads = settings(arguments), str(arguments.threads)
    values = json.dumps(config.model_dump(mode="json"))
    python, path = trl_environment.python_and_path(arguments, requirements())
    model = str(peer_model(folder / "model"))
    given = [model, values, threads]
    peer = Side(python, HERE / "reward_peer.py", given, environment(arguments.threads, path))
    ours, judge = (
        Side(
            sys.executable,
            HERE / "reward_ours.py",
            [values, threads],
            environment(arguments.threads),
        )
        for _ in range(2)
    )
    base, seen = check(peer, judge, folder)
    targets = arguments.target or [base + rise for rise in arguments.rise]
    sample, own = config.sample, config.train
    about = [
        f"TRL side: {words(peer.ask('versions'))}",
        f"our side: {words(ours.ask('versions'))}",
        f"machine: {machine()}, {threads} threads, Python {platform.python_version()}",
        f"settings: the last {config.gradient.k} of {sample.num_inference_steps} calls, guidance "
        f"{sample.guidance_scale}, batch {own.batch_size} in parts of {own.micro_batch}, "
        f"learning rate {own.learning_rate}, gradients clipped to {own.max_grad_norm}, "
        f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.target_modules)}",
        *seen,
        f"reward: mean of {config.eval.images} held-out images, looked at every "
        f"{arguments.every} steps; the seconds are those of training alone, the processor's "
        "without the waiting for other work on the machine",
    ]
    sides = {"TRL": peer, "ours": ours}
    results = {seed: train(arguments, sides, judge, seed, folder) for seed in arguments.seeds}
    return [*(f"- {line}" for line in about), "", *tables(results, targets, arguments.every)]


def main() -> None:
    """Compare, print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--k", type=int, default=3, help="calls with gradient, of 5")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=5, help="steps between two looks")
    parser.add_argument("--max-steps", type=int, default=60, help="in whole rounds of --every")
    parser.add_argument("--images", type=int, default=128, help="held-out images")
    parser.add_argument(
        "--rise", type=float, nargs="+", default=[0.02, 0.03, 0.04], help="to be reached"
    )
    parser.add_argument("--target", type=float, nargs="+", help="rewards to be reached, instead")
    trl_environment.add_options(parser, "alignprop-trl-0.22.2-reward")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = compare(arguments, Path(folder))
    Report((__doc__ or "").splitlines()[0], arguments.output).add(*lines)


if __name__ == "__main__":
    main()
