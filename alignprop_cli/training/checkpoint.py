"""The run folder: make it, and write and read its checkpoints, whole or not at all.

runs/<name>/config.yaml            complete; `train --config` on it repeats the run
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
    """What a checkpoint holds besides the LoRA weights.

    Args:
        step: Optimiser steps done.
        images_seen: Images sampled for training so far.
        optimizer: The optimiser's tensors, as `Optimizer.state` names them.
    """

    step: int
    images_seen: int
    optimizer: dict[str, Tensor]


def sweep(run: Path) -> None:
    """Remove half-written checkpoints, which a killed run leaves behind."""
    # `write_whole` fills a folder whose name starts with a dot before it renames it.
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def save(run: Path, state: State, save_lora: Callable[[Path], object], *, keep: int | None) -> Path:
    """Write the checkpoint of a step and delete the oldest ones beyond `keep`.

    Args:
        run: The run folder.
        state: Counters and optimiser.
        save_lora: Writes the adapter into a folder.
        keep: Number of checkpoints to keep; None keeps them all.

    Returns:
        The checkpoint's folder.
    """
    path = run / "checkpoints" / f"step-{state.step:06d}"

    # The LoRA file is for everyone; the other two are only needed to resume.
    def write(folder: Path) -> None:
        save_lora(folder)
        save_file(state.optimizer, folder / "optimizer.safetensors")
        counters = {"step": state.step, "images_seen": state.images_seen}
        (folder / "state.json").write_text(json.dumps(counters) + "\n", encoding="utf-8")

    # The new one first: at no moment is there none.
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
    """Read the LoRA weights of a checkpoint, by the names that `layers.weights` uses.

    Args:
        path: The checkpoint.
        prefix: What the file has before these names: the family's `lora_prefix`.

    Raises:
        RunError: If the file is damaged or missing.
    """
    try:
        state = load_file(path / LORA_FILE)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path / LORA_FILE}: damaged checkpoint: {error}") from error
    return {name.removeprefix(prefix): value for name, value in state.items()}


def header(path: Path) -> dict[str, str]:
    """Return the texts in the header of a checkpoint's LoRA file: its configuration and base model.

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
        wanted: The folder that the user asked for; None is runs/<name>, or runs/<name>-2 and so on
            if that exists.
        name: Name of the preset or the config file.

    Raises:
        ConfigError: If the wanted folder exists and is not empty.
    """
    # An empty folder is fine: it may have been made for this run.
    if wanted is not None:
        run = Path(wanted).expanduser()
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ConfigError(
                f"--output: {run} exists and is not empty",
                hint="choose another folder, remove it, or resume the run with --resume",
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
    """Remove the folder if the block fails before anything is written into it."""
    try:
        yield
    except BaseException:
        # rmdir fails, and should, if the folder is not empty.
        with suppress(OSError):
            run.rmdir()
        raise
