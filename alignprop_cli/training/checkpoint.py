"""The run folder: write and read its checkpoints, whole or not at all.

runs/<name>/config.yaml            complete; `train --config` on it repeats the run
            metrics.jsonl          one line per optimiser step
            checkpoints/step-000020/pytorch_lora_weights.safetensors   the adapter, for everyone
                                    ema/               the same of its average, with train.ema_decay
                                    optimizer.safetensors              its state, and B where the
                                                       adapter has it scaled
                                    state.json                         counters and hashes
            checkpoints/best/      a checkpoint too: of the step that the guard found best
            samples/               fixed prompts and seeds over time
            before_after.png  curves.png  report.html  summary.json
            .lock                  held by the process that writes here, gone afterwards
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from alignprop_cli.errors import RunError
from alignprop_cli.lora.files import BEST, EMA_FOLDER, LORA_FILE, checkpoints
from alignprop_cli.lora.tensor_file import save_tensors
from alignprop_cli.parsing import read_json
from alignprop_cli.storage import remove, sha256, write_whole

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_FILES = {LORA_FILE, _OPTIMIZER}
_EMA = f"{EMA_FOLDER}/{LORA_FILE}"
# In it, before the names of the LoRA's weights as they are trained.
_TRAINED = "trained:"
# In _STATE: a hash of all the rest of it.
_CHECK = "check"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides the LoRA weights.

    Args:
        step: Optimiser steps done.
        images_seen: Images sampled for training so far.
        optimizer: The optimiser's tensors, as `Optimizer.state` names them.
        skipped_in_row: Steps before this one, without a gap, that were skipped.
        metrics: Hash of the lines of metrics.jsonl up to this step.
        inputs: Hashes of the files that the run reads, by key; see `setup.inputs`.
        trained: Those of the LoRA's weights that the LoRA file holds otherwise than they are
            trained; see `files.as_written`.
    """

    step: int
    images_seen: int
    optimizer: dict[str, Tensor]
    skipped_in_row: int = 0
    metrics: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    trained: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def save(
    run: Path,
    state: State,
    save_lora: Callable[[Path], object],
    save_average: Callable[[Path], object] | None = None,
    name: str | None = None,
) -> Path:
    """Write the checkpoint of a step.

    Args:
        run: The run folder.
        state: Counters and optimiser.
        save_lora: Writes the adapter into a folder.
        save_average: Writes the average of the adapter into a folder; None where there is none.
        name: Of its folder; None is that of the step.

    Returns:
        The checkpoint's folder.
    """
    path = run / "checkpoints" / (name or f"step-{state.step:06d}")

    # The LoRA files are for everyone; the other two are only needed to resume.
    def write(folder: Path) -> None:
        save_lora(folder)
        if save_average is not None:
            (folder / EMA_FOLDER).mkdir()
            save_average(folder / EMA_FOLDER)
        trained = {f"{_TRAINED}{name}": value for name, value in state.trained.items()}
        save_tensors(folder / _OPTIMIZER, {**state.optimizer, **trained}, {"format": "pt"})
        values = {
            "step": state.step,
            "images_seen": state.images_seen,
            "skipped_in_row": state.skipped_in_row,
            "metrics": state.metrics,
            "inputs": dict(state.inputs),
            "sha256": {
                name: sha256(folder / name)
                for name in (LORA_FILE, _OPTIMIZER, *[_EMA] * (save_average is not None))
            },
        }
        text = json.dumps({**values, _CHECK: _digest(values)}, indent=2)
        (folder / _STATE).write_text(text + "\n", encoding="utf-8")

    write_whole(path, write)
    return path


def drop_old(run: Path, keep: int | None) -> None:
    """Delete the oldest checkpoints beyond `keep`; None keeps them all."""
    for old in checkpoints(run)[:-keep] if keep is not None else []:
        drop(old)


def drop(path: Path) -> None:
    """Delete a checkpoint, whole or not at all."""
    # A link is somebody's own; only its name is removed.
    if path.is_symlink():
        path.unlink()
    else:
        remove(path)


def keep_best(run: Path, step: int | None) -> bool:
    """Make `best` the checkpoint of a step again, where it is of another one.

    It is after a kill between two checkpoints, or where an older one was resumed.

    Args:
        run: The run folder.
        step: That of the best measurement; None where there is none.

    Returns:
        Whether `best` is of this step now. Otherwise there is none.
    """
    best = run / "checkpoints" / BEST
    if step is not None:
        if best.is_dir() and damage(best) is None and load(best).step == step:
            return True
        same = run / "checkpoints" / f"step-{step:06d}"
        if same.is_dir() and damage(same) is None:
            write_whole(best, lambda made: shutil.copytree(same, made, dirs_exist_ok=True))
            return True
    if best.exists():
        drop(best)
    return False


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, in words; None if it is as it was written."""
    # First of all: reading a pipe would wait for ever.
    for name in (_STATE, LORA_FILE, _OPTIMIZER):
        if not (path / name).is_file():
            return f"{name} is missing"
    try:
        values = _counters(path)
        if values.get(_CHECK) != _digest({k: v for k, v in values.items() if k != _CHECK}):
            return f"{_STATE} is not as it was written (its hash differs)"
        hashes = values["sha256"]
        # The names too: hashes of no file would always agree.
        if hashes.keys() - {_EMA} != _FILES:
            return f"{_STATE} lacks a hash"
        for name, wanted in hashes.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256(path / name) != wanted:
                return f"{name} is not as it was written (its SHA-256 differs)"
        if path.name not in (BEST, f"step-{values['step']:06d}"):
            return f"{_STATE} is of step {values['step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_STATE} cannot be read: {type(error).__name__}: {error}"
    return None


def load(path: Path) -> State:
    """Read a checkpoint's counters and optimiser.

    Raises:
        RunError: If it is damaged.
        OSError: If a file is there and cannot be read.
    """
    wrong = damage(path)
    if wrong is not None:
        raise damaged(path, wrong)
    values = _counters(path)
    try:
        tensors = load_file(path / _OPTIMIZER)
        trained = {name for name in tensors if name.startswith(_TRAINED)}
        return State(
            int(values["step"]),
            int(values["images_seen"]),
            {name: value for name, value in tensors.items() if name not in trained},
            int(values["skipped_in_row"]),
            str(values["metrics"]),
            dict(values["inputs"]),
            {name.removeprefix(_TRAINED): tensors[name] for name in trained},
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def damaged(path: Path, what: str) -> RunError:
    """Return the error for a damaged checkpoint, with which other one there is."""
    hint = "remove this folder to resume from the checkpoint before it"
    if path.name == BEST:
        hint = "the newest checkpoint is resumed without --checkpoint best"
    elif (best := path.parent / BEST).is_dir() and damage(best) is None:
        hint += f"; --checkpoint best resumes from the best one, of step {_counters(best)['step']}"
    return RunError(f"{path}: damaged checkpoint: {what}", hint=hint)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _counters(path: Path) -> Mapping[str, Any]:
    return read_json((path / _STATE).read_text(encoding="utf-8"))


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
    except (FileNotFoundError, SafetensorError) as error:
        raise damaged(path, f"{LORA_FILE}: {error}") from error
    return {name.removeprefix(prefix): value for name, value in state.items()}


def header(path: Path) -> dict[str, str]:
    """Return the texts in the header of a checkpoint's LoRA file: its configuration and base model.

    Raises:
        RunError: If the file is damaged or missing.
    """
    try:
        with safe_open(path / LORA_FILE, "pt") as file:
            return dict(file.metadata() or {})
    except (FileNotFoundError, SafetensorError) as error:
        raise damaged(path, f"{LORA_FILE}: {error}") from error
