"""What is written for others: exports, uploads to the hub, and what trackers are told.

The hub is offline and there is no token, so nothing is ever uploaded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

from tests.fuzz import strange
from tests.fuzz.assets import QUICK, Assets, copy_run
from tests.fuzz.domains.base import SMALL, argument
from tests.fuzz.domains.flags import options

_KINDS = ("comfyui", "merged", "merged-single-file")
_TRACKERS = ("tensorboard", "tensorboard", "wandb", "trackio", "mlflow", "swanlab", "all")
_IDS = (
    "someone/name", "someone/na.me_1", "name", "a/b/c", "/a", "a/", "../x", "-x/y", "x/-y",
    "x/y.git", "x/y--z", "x/y..z", "x/" + "y" * 97, "https://huggingface.co/x/y", "~/x", "x y/z",
)  # fmt: skip
_COMMANDS = {
    "train": ("--export", "--push-to-hub", "--log-with"),
    "evaluate": ("--export", "--log-with"),
    "soup": ("--export", "--push-to-hub", "--log-with", "--format", "--layout"),
}


def sharing(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Options that give a result away, with known and with strange values."""
    command = rng.choice(list(_COMMANDS))
    wanted = [name for name in _COMMANDS[command] if name in options(command)]
    chosen = rng.sample(wanted, k=rng.choice((1, 1, 2, len(wanted))))
    parts = [argument(f"{name}={_value(name, rng)}") for name in chosen]
    if command == "train":
        # A run of one step takes seconds.
        ending = ["--dry-run"] if rng.random() < 0.9 else ["--steps=1", *QUICK]
        if rng.random() < 0.2:
            ending += [f"--set=lora.dora={rng.choice(('true', 'false'))}"]
        _in_the_way(place / "o", rng)
        return ["train", "--preset=tiny", "--output=o", *parts, *ending]
    run = copy_run(assets, place)
    if rng.random() < 0.3:
        _change(run, rng)
    _in_the_way(place / "o", rng)
    if command == "evaluate":
        models = rng.choice((["run"], ["run"], ["run", "base"], ["base"], ["run", "run"]))
        strength = rng.choice(([], [], [], ["--scale=0.5"], ["--base-until=0,0.5"], ["--ema"]))
        over = rng.choice(([], ["--overwrite"]))
        return ["evaluate", *models, *strength, *parts, *over, "--output=o", *SMALL]
    compared = ["--evaluate", "--images=1"] if rng.random() < 0.1 else []
    compared = ["--sweep=0:1:1", "--images=1"] if rng.random() < 0.05 else compared
    over = rng.choice(([], ["--overwrite"]))
    return ["soup", "run", rng.choice(("base", "run")), *parts, *compared, *over, "--output=o"]


def _value(name: str, rng: Random) -> str:
    known = {
        "--export": _KINDS,
        "--push-to-hub": _IDS,
        "--log-with": _TRACKERS,
        "--format": ("diffusers", "comfyui"),
    }.get(name, ("flat", "folders", "diffusers"))
    if rng.random() < 0.15:
        return rng.choice(strange.TEXTS)
    text = rng.choice(known)
    if name in ("--export", "--log-with"):
        text = rng.choice((",", ", ", ",,")).join(rng.choices(known, k=rng.choice((1, 1, 2, 3))))
    if rng.random() < 0.15:
        text = strange.damage(text.encode(), rng).decode("utf-8", "replace")
    return text


def _change(run: Path, rng: Random) -> None:
    """Change what a run says of itself, or damage its weights."""
    last = run / "checkpoints" / "step-000002" / "pytorch_lora_weights.safetensors"
    config = run / "config.yaml"
    if rng.random() < 0.3:
        last.write_bytes(strange.damage(last.read_bytes(), rng))
        return
    text = config.read_text()
    before, after = rng.choice(
        (
            ("id: tiny", "id: tiny-flow"),
            ("id: tiny", "id: stable-diffusion-v1-5/stable-diffusion-v1-5"),
            ("id: tiny", "id: ./nosuch"),
            ("quantize: none", "quantize: int8"),
            ("prompts: shapes", "prompts: p\u202e.txt"),
            ("dora: false", "dora: true"),
        )
    )
    config.write_text(text.replace(before, after))


def _in_the_way(folder: Path, rng: Random) -> None:
    """Put something where results are written, sometimes."""
    if rng.random() < 0.7:
        return
    if rng.random() < 0.2:
        rng.choice((lambda p: p.write_text("x"), lambda p: p.symlink_to("o"), os.mkfifo))(folder)
        return
    folder.mkdir()
    name = rng.choice(("export", "hub", "README.md", "tensorboard", "export/comfyui", "notes.txt"))
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    makes = (
        Path.mkdir,
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("/nosuch"),
        lambda path: path.symlink_to("."),
        os.mkfifo,
    )
    rng.choice(makes)(file)
    if rng.random() < 0.2:
        shutil.rmtree(folder)
