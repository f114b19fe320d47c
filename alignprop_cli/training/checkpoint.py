"""The run folder: what is in it, written whole or not at all, and read back.

runs/<name>/config.yaml            resolved; `train --config` on it repeats the run
            metrics.jsonl          one line per optimiser step
            checkpoints/step-000020/pytorch_lora_weights.safetensors   the adapter, for everyone
                                    optimizer.safetensors              AdamW's moments
                                    state.json                         counters
            samples/               fixed prompts and seeds over time
            before_after.png  summary.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.lora.files import LORA_FILE, checkpoints
from alignprop_cli.storage import write_whole


@dataclass(frozen=True)
class State:
    """What a run is resumed from, besides its LoRA weights.

    Args:
        step: Optimiser steps done.
        images_seen: Images sampled for training so far.
        optimizer: Its tensors, as `Optimizer.state` names them.
    """

    step: int
    images_seen: int
    optimizer: dict[str, Tensor]


def sweep(run: Path) -> None:
    """Remove what a killed run left half-written among its checkpoints."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def save(run: Path, state: State, save_lora: Callable[[Path], object], *, keep: int | None) -> Path:
    """Write the checkpoint of a step and drop the oldest beyond `keep`.

    Args:
        run: The run folder.
        state: Counters and optimiser.
        save_lora: Writes the adapter into a folder.
        keep: How many checkpoints stay; None keeps them all.

    Returns:
        The checkpoint's folder.
    """
    path = run / "checkpoints" / f"step-{state.step:06d}"

    def write(folder: Path) -> None:
        save_lora(folder)
        save_file(state.optimizer, folder / "optimizer.safetensors")
        counters = {"step": state.step, "images_seen": state.images_seen}
        (folder / "state.json").write_text(json.dumps(counters) + "\n", encoding="utf-8")

    write_whole(path, write)
    if keep is not None:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return path


def load(path: Path) -> State:
    """Read a checkpoint's counters and optimiser.

    Raises:
        RunError: If it is damaged.
    """
    try:
        counters: Mapping[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        optimizer = load_file(path / "optimizer.safetensors")
        return State(int(counters["step"]), int(counters["images_seen"]), optimizer)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{path}: damaged checkpoint: {type(error).__name__}: {error}",
            hint="remove this folder to resume from the checkpoint before it",
        ) from error


def load_lora(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read the adapter of a checkpoint, named as `lora.weights` names it.

    Args:
        path: The checkpoint.
        prefix: What the file has before these names: that of the model's family.

    Raises:
        RunError: If the file is damaged or missing.
    """
    try:
        state = load_file(path / LORA_FILE)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path / LORA_FILE}: damaged checkpoint: {error}") from error
    return {name.removeprefix(prefix): value for name, value in state.items()}


def header(path: Path) -> dict[str, str]:
    """Return the texts in the header of a checkpoint's adapter: what made it, and on what base.

    Raises:
        RunError: If the file is damaged or missing.
    """
    try:
        with safe_open(path / LORA_FILE, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path / LORA_FILE}: damaged checkpoint: {error}") from error


def new_run(wanted: str | None, name: str) -> Path:
    """Choose the folder of a new run; `make_run` makes it.

    Args:
        wanted: What the user asked for; None is runs/<name>, numbered where it exists.
        name: Of the preset or the config file.

    Raises:
        ConfigError: If the wanted folder exists and is not empty.
    """
    if wanted is not None:
        run = Path(wanted).expanduser()
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ConfigError(
                f"--output: {run} exists and is not empty",
                hint="choose another folder, remove it, or go on with it by --resume",
            )
        return run
    number = 1
    while (run := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return run


def make_run(run: Path) -> None:
    """Make the folder of a new run.

    Raises:
        ConfigError: If it cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot make the folder {run}: {error}") from error


@contextmanager
def removed_if_empty(run: Path) -> Iterator[None]:
    """Do what is inside the block; if that fails before it wrote a file, remove the folder."""
    try:
        yield
    except BaseException:
        # Refused for a folder that holds anything.
        with suppress(OSError):
            run.rmdir()
        raise
