"""Several processes on one machine, as torchrun starts them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alignprop_cli.lora.files import LORA_FILE

# `.ci/run` runs these as well.
pytestmark = pytest.mark.slow

# Without the last two the launcher asks what the machine's own name resolves to.
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "--local-addr=localhost")


def run(folder, launcher, *args):
    """Run `alignprop` in a folder, in as many processes as the launcher starts."""
    modules = [part for name in (*launcher, "alignprop_cli") for part in _flag(name)]
    done = subprocess.run(
        [sys.executable, *modules, *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _flag(name):
    return [name] if name.startswith("-") else ["-m", name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the same training by one process and by two."""
    place = tmp_path_factory.mktemp("processes")
    settings = (
        # Two groups of the default size, which both processes share.
        "train.batch_size=16",
        "train.micro_batch=4",
        "gradient.k_max=2",
        "sample.num_inference_steps=2",
        "train.kl_weight=0.2",
        "train.ema_decay=0.5",
        "eval.images=2",
        "eval.sample_images=2",
    )
    train = ("train", "--preset=tiny", "--steps=2", "--quiet", *(f"--set={s}" for s in settings))
    run(place, (), *train, "--output=one")
    run(place, TORCHRUN, *train, "--output=two")
    return place


def test_two_processes_train_what_one_does(folder) -> None:
    one, two = (
        load_file(folder / name / "checkpoints" / "step-000002" / LORA_FILE)
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    trained = [name for name in one if "lora_B" in name]
    difference = torch.cat([(one[name] - two[name]).flatten() for name in trained]).norm()
    norm = torch.cat([one[name].flatten() for name in trained]).norm()
    assert float(norm) > 1e-3
    # AdamW divides by the gradient's own size, which enlarges the rounding of float32.
    assert float(difference / norm) < 1e-4
    first, second = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["images_seen"] for line in second] == [16, 32]
    for name in ("loss", "grad_norm"):
        assert second[0][name] == pytest.approx(first[0][name], rel=1e-5)
    assert first[0]["kl"] == second[0]["kl"] == 0.0
    assert 0.0 < second[1]["kl"] == pytest.approx(first[1]["kl"], rel=1e-3)


def test_two_processes_evaluate_what_one_does(folder) -> None:
    # Three pictures do not divide by two.
    evaluate = ("evaluate", "one", "--images=3", "--quiet")
    run(folder, (), *evaluate, "--output=by_one")
    run(folder, TORCHRUN, *evaluate, "--output=by_two")
    one, two = (_rows(folder / name / "results.csv") for name in ("by_one", "by_two"))
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            try:
                number = float(value)
            except ValueError:
                assert value == b[name]
            else:
                assert number == pytest.approx(float(b[name]), abs=1e-4)
        pixels = [
            np.asarray(Image.open(folder / name / a["file"]), dtype=int)
            for name in ("by_one", "by_two")
        ]
        apart = np.abs(pixels[0] - pixels[1])
        assert apart.max() <= 1
        assert (apart > 0).mean() <= 1e-3


def test_the_guard_stops_two_processes_where_it_stops_one(folder) -> None:
    hack = (
        *("train", "--preset=tiny", "--reward=redness", "--steps=8", "--quiet"),
        *("--set=sample.num_inference_steps=3", "--set=gradient.method=last_k"),
        *("--set=train.batch_size=4", "--set=train.micro_batch=2"),
        *("--set=train.learning_rate=4e-3", "--set=train.lr_decay_steps=null"),
        *("--set=eval.every=1", "--set=eval.images=20", "--set=eval.sample_images=20"),
        "--set=guard.patience=1",
    )
    run(folder, (), *hack, "--output=hacked_by_one")
    run(folder, TORCHRUN, *hack, "--output=hacked_by_two")
    one, two = (
        json.loads((folder / name / "summary.json").read_text())
        for name in ("hacked_by_one", "hacked_by_two")
    )
    assert one["guard"]["stopped"]
    assert two["steps"] == one["steps"] < 8
    assert two["guard"]["best_step"] == one["guard"]["best_step"]


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
