"""HPS against the package of its authors, which scores the same files with the same weights.

The package pins old versions of others, so it lives in a folder of its own: `.ci/run` makes it and
names it in ALIGNPROP_HPSV2. Where it is named, nothing here skips.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from alignprop_cli.rewards import hps
from alignprop_cli.rewards.hps import HpsReward
from tests.factories import open_clip_config

PLACE = os.environ.get("ALIGNPROP_HPSV2", "")
pytestmark = pytest.mark.skipif(
    not PLACE, reason="ALIGNPROP_HPSV2 names no folder with the package hpsv2; .ci/run makes one"
)
SIZE = 32
# Square and not, smaller and larger than the model's 32, odd. The package cannot score an image
# whose long edge is 32 already unless it is square: it pads none of those.
PICTURES = [(32, 32), (64, 64), (512, 384), (100, 257), (20, 12), (700, 700), (33, 31)]
PROMPTS = [
    "a cat",
    "A CAT, in Capitals!",
    "un chat à la plage \N{CAT FACE} — 猫",
    "",
    "a very long prompt " * 40,
]
# What `img_score.initialize_model` does, on a small configuration and without LAION's weights.
SCRIPT = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
from pathlib import Path
try:
    import tkinter
except ImportError:
    # The package imports a name of turtle's, which needs tkinter, and never uses it.
    sys.modules["turtle"] = types.SimpleNamespace(forward=None)
from hpsv2 import img_score
from hpsv2.src.open_clip import create_model_and_transforms, factory
config, weights, files, prompts = json.loads(sys.stdin.read())
factory.add_model_config(Path(config))
model, _, prepare = create_model_and_transforms(
    "small-hps", None, precision="fp32", light_augmentation=True, aug_cfg={}, output_dict=True
)
img_score.model_dict.update(model=model, preprocess_val=prepare)
official = [
    [float(x) for x in img_score.score(files, p, cp=weights, hps_version="v2.1")] for p in prompts
]
from alignprop_cli.rewards import hps_official
from alignprop_cli.scoring.files import read_image
import torch
hps_official.ARCHITECTURE = "small-hps"
reward = hps_official.OfficialHps(weights=weights)
pixels = [torch.from_numpy(read_image(Path(f)).pixels.copy()) for f in files]
images = [p.permute(2, 0, 1) / 255 for p in pixels]
wrapped = [[float(reward(x[None], [p])) for x in images] for p in prompts]
print(json.dumps([official, wrapped]))
"""


def noise_with_shapes(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / 9.0 + rows / rng.uniform(3.0, 20.0)) for _ in range(3)]
    image = 127.0 + 90.0 * np.stack(waves, axis=-1) + rng.normal(0.0, 25.0, (height, width, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def ask_the_package(arguments: Sequence[object]) -> list[list[list[float]]]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([PLACE, str(root)])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_scores_are_those_of_the_official_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "small-hps.json"
    config.write_text(json.dumps(open_clip_config(image_size=SIZE)), encoding="utf-8")
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(config)
    monkeypatch.setattr(hps, "ARCHITECTURE", "small-hps")
    torch.manual_seed(0)
    model = open_clip.create_model("small-hps", pretrained=None)
    weights = tmp_path / hps.FILES["v2.1"]
    torch.save({"state_dict": model.state_dict()}, weights)
    files: list[str] = []
    for number, (width, height) in enumerate(PICTURES):
        files.append(str(tmp_path / f"{number}.png"))
        noise_with_shapes(width, height, number).save(files[-1])

    official, wrapped = ask_the_package([str(config), str(weights), files, PROMPTS])

    reward = HpsReward(weights=str(weights))
    ours = []
    for prompt in PROMPTS:
        scores = []
        for file in files:
            pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
            scores.append(float(reward(pixels[None] / 255.0, [prompt])))
        ours.append(scores)
    np.testing.assert_allclose(ours, official, rtol=0.0, atol=1e-5)
    np.testing.assert_allclose(wrapped, official, rtol=0.0, atol=1e-6)
    # The images and the prompts are told apart by far more than that.
    assert np.ptp(official, axis=1).min() > 1e-3
    assert np.ptp(official, axis=0).min() > 1e-3
