"""Command lines: the options that commands have with strange values, and strange options."""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Any

import typer

from tests.fuzz import strange
from tests.fuzz.assets import Assets, copy_run
from tests.fuzz.domains.base import SMALL, argument

# Of values that some options take.
GOOD = (
    "1", "2", "0.5", "0,1", "0:1:0.5", "clip", "brightness", "run", "base", "tiny", "shapes",
    "file.txt", "12GB", "csv", "exact", "o.csv", "o", "train.steps=2", "best", "comfyui",
    "tensorboard", "someone/name", "skip", "rtx4090", "auto", "-1", "1e999", "99999999999999999999",
)  # fmt: skip

# Shows tracebacks, which nothing else may.
_LEFT_OUT = {"--debug"}


@functools.cache
def options(command: str) -> dict[str, bool]:
    """Return the options of a command with whether they take no value; of no command the usual."""
    from alignprop_cli.cli import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if command not in commands:
        return dict.fromkeys(("--help", "--version", "--nosuch"), True)
    found = commands[command].params
    names = {p.opts[0]: p.is_flag for p in found if p.opts[0].startswith("--")}
    return {name: is_flag for name, is_flag in names.items() if name not in _LEFT_OUT}


def flags(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Command lines: known options with strange values, and strange options."""
    (place / "pictures").symlink_to(assets.pictures)
    copy_run(assets, place)
    (place / "file.txt").write_text("a red circle\n")
    command = rng.choice(("train", "evaluate", "soup", "score", rng.choice(strange.TEXTS)))
    known = options(command)
    parts = []
    for _ in range(rng.choice((1, 2, 3))):
        flag = rng.choice(list(known))
        if known[flag] and rng.random() < 0.97:
            parts.append(flag)
            continue
        if rng.random() < 0.03:
            flag = strange.damage(flag.encode(), rng).decode("utf-8", "replace")
        text = rng.choice(
            (rng.choice(strange.TEXTS), rng.choice(GOOD), str(rng.choice(strange.NUMBERS)))
        )
        # Numbers of processes and of mixes are obeyed, and are not what is tried here.
        if flag in ("--workers", "--images", "--sweep") and text[:1].isdigit():
            text = "1" if flag != "--sweep" else "0:1:1"
        parts.append(argument(f"{flag}={text}"))
    targets = _targets(command, rng)
    # What would take long without being strange comes last, and wins.
    ending = {"evaluate": list(SMALL) if rng.random() < 0.95 else [], "soup": ["--images=1"]}.get(
        command, []
    )
    if command == "evaluate" and rng.random() < 0.6:
        # Most end at the first check; the others would sample.
        targets = [*targets, "nosuch-either"]
    return [argument(command), *map(argument, targets), *parts, *ending]


def _targets(command: str, rng: Random) -> list[str]:
    """Return what a command works on."""
    odd = rng.choice(strange.TEXTS)
    if command == "train":
        return rng.choice((["--dry-run"], ["--show-preset"], ["--dry-run", "--preset=tiny"]))
    if command == "evaluate":
        step = "run/checkpoints/step-000001"
        return [rng.choice(("run", "base", "file.txt", "nosuch", step, odd))]
    if command == "soup":
        return ["run", rng.choice(("base", "run", "run=0.5", "base=nan", "=", odd))]
    if command == "score":
        return [rng.choice(("pictures", "pictures/0.png", "file.txt", "pic*/*.png", "-", odd))]
    return []
