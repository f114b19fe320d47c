"""`alignprop score` over a large folder: rate and memory, taken up again, and against a loop.

Draws images of the embedded model's language, enlarged to 256 x 256 with some noise, as JPEG with
a sidecar each, and measures
- decoding alone: reading every file, without a reward, in one process;
- `score --reward clip` (the embedded aligner), with 2,000 of them and with all: images a second
  and the largest proportional memory (PSS) of its processes together;
- the same killed with SIGKILL half-way and resumed, as jsonl and csv: the files must be equal;
- a ViT-B/32 of random weights over 100 images, batched against a loop that handles
  one image at a time as hpsv2's `score` does: open, preprocess, tokenize, both towers.

Run:  python tests/benchmarks/score.py --count 20000 --output tests/benchmarks/results/score_X.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file

from alignprop_cli.scoring.files import Found, read_image
from alignprop_cli.tiny import language as data

LARGE_PX = 256
LOOP = 100


def make(folder: Path, count: int) -> None:
    """Write the images, each with its prompt beside it; no two are equal."""
    rng = np.random.default_rng(0)
    prompts = data.heldout_prompts()
    for number in range(count):
        place = folder / f"{number // 1000:02d}"
        place.mkdir(parents=True, exist_ok=True)
        prompt = prompts[int(rng.integers(len(prompts)))]
        small = Image.fromarray(data.draw(prompt, rng))
        large = np.asarray(small.resize((LARGE_PX, LARGE_PX), Image.Resampling.BICUBIC), np.int16)
        noisy = large + rng.integers(-8, 9, large.shape, dtype=np.int16)
        file = place / f"{number:05d}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
        file.with_suffix(".txt").write_text(prompt)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "alignprop_cli", "score", *map(str, arguments), "--quiet"]


def measured(*arguments: object) -> tuple[float, float]:
    """Run `score`; return its seconds and the most memory of its processes together, in MiB."""
    peak, started = 0.0, time.perf_counter()
    with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, memory(root))
            time.sleep(0.5)
        assert process.returncode == 0, process.returncode
    return time.perf_counter() - started, peak


def memory(root: psutil.Process) -> float:
    total = 0
    try:
        for each in (root, *root.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:
        return 0.0  # one of them has just ended
    return total / 2**20


def killed_and_resumed(folder: Path, target: Path, count: int) -> bool:
    """Kill a run when half of the rows are there, take it up again; is the file the same?"""
    whole = target.with_name(f"whole{target.suffix}")
    ask = (folder, "--reward", "clip", "--output")
    partial = target.with_name(f"{target.name}.partial")
    with subprocess.Popen(
        command(*ask, target), stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not partial.exists() or partial.read_bytes().count(b"\n") < count // 2:
            assert process.poll() is None, "it ended before it was half done: raise --count"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not target.exists()
    subprocess.run(command(*ask, target, "--resume"), check=True, stdout=subprocess.DEVNULL)
    if not whole.exists():
        subprocess.run(command(*ask, whole), check=True, stdout=subprocess.DEVNULL)
    return target.read_bytes() == whole.read_bytes()


def decoding(files: list[Path]) -> float:
    """Return how many images a second one process reads."""
    started = time.perf_counter()
    for file in files:
        read_image(file)
    return len(files) / (time.perf_counter() - started)


def vit(folder: Path) -> Path:
    """Write a ViT-B/32 with random weights as a local model of open_clip."""
    config = open_clip.get_model_config("ViT-B-32")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def one_by_one(model_folder: Path, files: list[Path]) -> tuple[float, list[float]]:
    """Score as hpsv2 does, without its loading of the model anew for every call."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    model.eval()
    started, found = time.perf_counter(), []
    with torch.no_grad():
        for file in files:
            image = preprocess(Image.open(file)).unsqueeze(0)
            tokens = tokenizer([file.with_suffix(".txt").read_text()])
            image_features, text_features, _ = model(image, tokens)
            found.append(float(torch.diagonal(image_features @ text_features.T)))
    return time.perf_counter() - started, found


def batched(model_folder: Path, files: list[Path], target: Path) -> tuple[float, list[float]]:
    """Score the same files in this process with ours, loading left out alike."""
    from alignprop_cli.config.schema import LossConfig, RewardConfig
    from alignprop_cli.rewards.mixture import build_mixture
    from alignprop_cli.scoring import scorer
    from alignprop_cli.scoring.captions import PromptFinder

    device = torch.device("cpu")
    reward = {"clip": RewardConfig.model_validate({"model": str(model_folder)})}
    mixture = build_mixture(reward, LossConfig(), device)
    divided = scorer.chunks([Found(file, file.parent) for file in files])
    started = time.perf_counter()
    results = scorer.score(
        divided, mixture, PromptFinder(), needing=["clip"], device=device, workers=1
    )
    found = [each.rewards["clip"] for each in results]
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the images here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        place = arguments.folder or Path(made)
        folder, few = place / "all", place / "few"
        for where, count in ((folder, arguments.count), (few, arguments.count // 10)):
            if not where.exists():
                make(where, count)
        lines = report(arguments, folder, few, Path(made))
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def report(arguments: argparse.Namespace, folder: Path, few: Path, place: Path) -> list[str]:
    count = arguments.count
    files = sorted(folder.rglob("*.jpg"))
    alone = decoding(files)
    lines = [
        f"# score, {count} images of {LARGE_PX} x {LARGE_PX} px (JPEG)",
        "",
        f"`python tests/benchmarks/score.py --count {count}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, open_clip {open_clip.__version__}",
        "",
        "| | images/s | most memory (PSS) |",
        "|---|---|---|",
        f"| decoding alone, one process | {alone:.0f} | |",
    ]
    peaks = []
    for where, number in ((few, count // 10), (folder, count)):
        seconds, peak = measured(
            where, "--reward", "clip", "--output", place / f"rows{number}.jsonl"
        )
        peaks.append(peak)
        lines.append(f"| score, {number} | {number / seconds:.0f} | {peak:.0f} MiB |")
    lines += ["", f"Memory with all against a tenth: {peaks[1] / peaks[0]:.3f}", ""]
    (place / f"rows{count}.jsonl").rename(place / "whole.jsonl")
    for where, name, number in ((folder, "killed.jsonl", count), (few, "killed.csv", count // 10)):
        same = "equal" if killed_and_resumed(where, place / name, number) else "DIFFERENT"
        lines.append(f"Killed half-way and resumed, {number} as {name[7:]}: {same}")
    model = vit(place / "vit")
    ratios, apart = [], 0.0
    for _ in range(3):
        slow, expected = one_by_one(model, files[:LOOP])
        fast, found = batched(model, files[:LOOP], place)
        ratios.append((slow / fast, LOOP / slow, LOOP / fast))
        apart = max(apart, max(abs(a - b) for a, b in zip(expected, found, strict=True)))
    ratio, slow, fast = sorted(ratios)[1]
    lines += [
        "",
        f"ViT-B/32 with random weights, {LOOP} images, medians of 3: one at a time {slow:.1f}/s, "
        f"in batches {fast:.1f}/s, {ratio:.2f} times as fast; scores at most {apart:.1e} apart",
    ]
    return lines


if __name__ == "__main__":
    main()
