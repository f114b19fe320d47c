"""The commands that are disturbed, what they are given, and what they should leave."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.assets import QUICK
from tests.warm import Ended, Warm

STEPS = 3
TRAIN = (
    "train",
    "--preset=tiny_fewstep",
    "--reward=brightness",
    "--set=eval.rewards={}",
    "--set=gradient.method=random_k",
    "--set=guard.best=brightness",
    f"--steps={STEPS}",
    "--set=output.save_every=1",
    *QUICK,
    "--set=eval.every=1",
)
"""Three steps, a checkpoint each, of which each is the best so far: a run of everything.

The quickest model and reward: of what is written nothing depends on them.
"""

TO_RUN = (*TRAIN, "--resume=auto", "--output=run")
"""The line for a scheduler: begins the run or resumes it."""

NOT_REPEATABLE = ("seconds", "peak_memory_gib")


@dataclass(frozen=True)
class Replaced:
    """A command that replaces an earlier result.

    Args:
        args: The command.
        output: What it replaces: a folder or a file.
        writes: A function that it calls while it writes, for signals.
        works: A function that it calls before it writes anything.
    """

    args: tuple[str, ...]
    output: str
    works: str
    writes: str


SMALL = ("--images=1", "--batch-size=1", "--set=sample.num_inference_steps=2")
COMMANDS = {
    "evaluate": Replaced(
        ("evaluate", "run", "--output=e", *SMALL),
        "e",
        "alignprop_cli.evaluation.draw:draw_samples",
        "alignprop_cli.evaluation.results:write",
    ),
    "soup": Replaced(
        ("soup", "run", "base", "--coef=0.7", "--output=s"),
        "s",
        "alignprop_cli.lora.soup:Soup.make",
        "alignprop_cli.lora.files:save",
    ),
    "score": Replaced(
        ("score", "pictures", "--reward=brightness", "--output=o.csv"),
        "o.csv",
        "alignprop_cli.scoring.scorer:score",
        "alignprop_cli.scoring.rows:_convert",
    ),
}


class Commands:
    """What the commands are given, and what they leave when nothing disturbs them.

    Args:
        warm: Starts them.
        folder: For a finished run and pictures.
    """

    def __init__(self, warm: Warm, folder: Path) -> None:
        self.warm, self.folder = warm, folder
        pictures = folder / "pictures"
        pictures.mkdir()
        for number in range(5):
            pixels = np.full((8, 8, 3), 40 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{number}.png")

    @cached_property
    def run(self) -> Path:
        """The finished run."""
        done = self.warm.run(*TO_RUN, cwd=self.folder)
        assert done.code == 0, done.err
        return self.folder / "run"

    @cached_property
    def started(self) -> Path:
        """The same run after its first step."""
        place = self.folder / "first"
        place.mkdir()
        args = (*TO_RUN, "--steps=1")
        done = self.warm.run(*args, cwd=place)
        assert done.code == 0, done.err
        return place / "run"

    def inputs(self, place: Path) -> None:
        """Copy run and pictures into a folder."""
        shutil.copytree(self.run, place / "run")
        shutil.copytree(self.folder / "pictures", place / "pictures")

    def __call__(self, *args: str, cwd: Path, **options: Any) -> Ended:
        return self.warm.run(*args, cwd=cwd, **options)


def tree(path: Path) -> dict[str, bytes]:
    """Return the files below a folder, or the file, with their bytes."""
    if path.is_file():
        return {"": path.read_bytes()}
    files = (p for p in sorted(path.rglob("*")) if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def lasting(path: Path) -> dict[str, Any]:
    """Return what a result says, without times and memory, which no two have in common."""
    found: dict[str, Any] = {}
    for name, data in tree(path).items():
        if name.endswith(("results.json", "summary.json")):
            found[name] = _without(json.loads(data))
        elif name.endswith(("metrics.jsonl",)):
            found[name] = [_without(json.loads(line)) for line in data.splitlines()]
        elif name.endswith("state.json"):
            # Its hash of the metrics is one of times too, and that of itself has it inside.
            values = json.loads(data).items()
            found[name] = {k: v for k, v in values if k not in ("metrics", "check")}
        # Pages have everything again, and pictures of text.
        elif not name.endswith(".html"):
            found[name] = data
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in (*NOT_REPEATABLE, "file")}
    if isinstance(value, list):
        return [_without(each) for each in value]
    return value


def metrics(run: Path) -> list[Any]:
    """Return the lines of a run's metrics without what no two runs share."""
    return [_without(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_end(run: Path, undisturbed: Path, keep: int | None = None) -> None:
    """Assert that a run ended as the one that nothing disturbed."""
    name = f"step-{STEPS:06d}"
    ours, theirs = (lasting(folder / "checkpoints" / name) for folder in (run, undisturbed))
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for file, data in theirs.items():
        assert ours[file] == data, file
    assert metrics(run) == metrics(undisturbed)
    names, expected = ({p.name for p in folder.iterdir()} for folder in (run, undisturbed))
    assert names == expected, names ^ expected
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    best = {p.name for p in (undisturbed / "checkpoints").glob("best")}
    assert best == {name for name in kept if name == "best"}
    kept = [name for name in kept if name != "best"]
    first = 1 if keep is None else STEPS + 1 - keep
    assert kept == [f"step-{n:06d}" for n in range(first, STEPS + 1)]
    assert not left(run.parent)


def left(place: Path) -> list[str]:
    """Return what temporary names are below a folder: hidden ones and locks."""
    return [
        p.relative_to(place).as_posix()
        for p in place.rglob("*")
        if p.name.startswith(".") or p.name.endswith((".unfinished", ".lock", ".half"))
    ]


def grow_old(place: Path) -> None:
    """Let temporary files look as if they were left some time ago."""
    for path in place.rglob(".*"):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)


def spread(numbers: Sequence[int], wanted: int) -> Sequence[int]:
    """Return so many of them, evenly, the first and the last among them."""
    if wanted >= len(numbers):
        return numbers
    return [numbers[round(i * (len(numbers) - 1) / (wanted - 1))] for i in range(wanted)]
