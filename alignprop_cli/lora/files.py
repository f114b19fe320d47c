"""LoRA files: find them, read them, write them. Nothing else opens one.

formats.py knows what the tensors of a file mean. Files are written in diffusers' format, which its
`load_lora_weights` reads, with rank and alpha as JSON in the header under `lora_adapter_metadata`.
Those of transformers mean the same to ComfyUI, by the same names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignprop_cli.errors import AssetError, first_line
from alignprop_cli.lora import formats, modelspec, names
from alignprop_cli.lora.factors import Layers
from alignprop_cli.lora.settings import shown
from alignprop_cli.lora.tensor_file import save_tensors
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text, user_path
from alignprop_cli.storage import sha256

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Diffusers' name for the LoRA file in a folder."""

EMA_FOLDER = "ema"
"""The folder in a checkpoint that holds the average of the LoRA, under the same file name."""

PEFT_FILE = "adapter_model.safetensors"
"""PEFT's name for it."""

PEFT_CONFIG = "adapter_config.json"
"""The file next to `PEFT_FILE` that holds rank and alpha."""

BEST = "best"
"""Name of the checkpoint that the guard keeps beside those of the steps."""

# At least six digits, so that names sort by step in a listing of the folder.
_STEP = re.compile(r"step-[0-9]{6,}")
_METADATA = "lora_adapter_metadata"
# Most bytes of `PEFT_CONFIG`.
_MOST_CONFIG = 16 * 2**20


@dataclass(frozen=True)
class Located:
    """Where the weights are that a user named.

    Args:
        file: The LoRA file.
        run: The run that the file belongs to; None where there is none.
        step: The checkpoint's name, such as step-000020; None unless the user named a checkpoint.
    """

    file: Path
    run: Path | None = None
    step: str | None = None

    @property
    def label(self) -> str:
        """Return a short name for tables and folders, made of the run's or the file's name."""
        if self.run is not None:
            return self.run.resolve().name + self.suffix
        # These two names say nothing; the folder's does.
        file = self.file.resolve()
        folder = file.parent.parent if self.is_average else file.parent
        return folder.name + self.suffix if file.name in (LORA_FILE, PEFT_FILE) else file.stem

    @property
    def is_average(self) -> bool:
        """Return whether these are the averaged weights of a checkpoint."""
        return self.file.parent.name == EMA_FOLDER

    @property
    def suffix(self) -> str:
        """Return what tells it from other weights of the same run: -step-000020-ema."""
        return (f"-{self.step}" if self.step else "") + "-ema" * self.is_average


@dataclass(frozen=True)
class Adapter:
    """A LoRA file.

    Args:
        file: Where it is.
        layers: Factors by the name of the layer in the network.
        header: The texts in the header of the file.
        sha256: Hash of the whole file, hexadecimal.
        left_out: Number of text-encoder layers in the file, which are not used.
        target_modules: How the file's configuration names the layers: endings of their names, or a
            regular expression for whole names; None where there is no configuration.
        prefix: What diffusers puts before the names of this network's layers.
    """

    file: Path
    layers: Layers
    header: Mapping[str, str]
    sha256: str
    left_out: int = 0
    target_modules: tuple[str, ...] | str | None = None
    prefix: str = names.NETWORKS[0]


def locate(
    name: str, where: str = "LoRA", checkpoint: str | None = None, *, averaged: bool = False
) -> Located:
    """Find the LoRA file of a run, a checkpoint, a LoRA folder or a file.

    Args:
        name: As the user or a configuration has it.
        where: The option or key, for messages.
        checkpoint: Of a run: `best`, or a step's, such as step-000020 or 20; None is the newest.
        averaged: Whether the average (EMA) of the checkpoint is meant, instead of its weights.

    Raises:
        AssetError: If there is none.
        ConfigError: If it can be no path.
    """
    found = _locate(name, where, checkpoint)
    if not averaged or found.is_average:
        return found
    file = found.file.parent / EMA_FOLDER / LORA_FILE
    if not file.is_file():
        raise AssetError(
            f"{name}: has no average of its weights (EMA): {file} is missing",
            hint="it is kept by runs with train.ema_decay, such as --set train.ema_decay=0.995",
        )
    return replace(found, file=file)


def _locate(name: str, where: str, checkpoint: str | None) -> Located:
    # 1. A file is taken as it is.
    path = user_path(name, where)
    if path.is_file():
        return Located(path)
    if not path.is_dir():
        raise AssetError(
            f"{name}: no such file or folder",
            hint="name a run, a checkpoint, a LoRA file or folder, or `base`",
        )
    # 2. A run means its newest checkpoint, or the one that is named.
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        found = latest(path) if checkpoint is None else named_checkpoint(path, checkpoint)
        return Located(found / LORA_FILE, run=path, step=checkpoint and found.name)
    # 3. A folder with a LoRA, ours or diffusers' before PEFT's.
    if not (path / LORA_FILE).is_file():
        if (path / PEFT_FILE).is_file():
            return Located(path / PEFT_FILE)
        raise AssetError(f"{name}: is no run and holds no LoRA ({LORA_FILE} or {PEFT_FILE})")
    # 4. That folder may be a checkpoint, <run>/checkpoints/step-000020: by its own name, as it may
    #    be a link to another disk, or by that of the folder it is a link to.
    for place in (Path(os.path.abspath(path)), path.resolve()):  # noqa: PTH100
        run = place.parent.parent
        if place.parent.name == "checkpoints" and (run / "config.yaml").is_file():
            return Located(path / LORA_FILE, run=run.resolve(), step=place.name)
    return Located(path / LORA_FILE)


def named_checkpoint(run: Path, name: str) -> Path:
    """Return a checkpoint of a run by its name, or by its step.

    Raises:
        AssetError: If there is none.
    """
    # Only what is listed there: a name may not lead anywhere else.
    places = (*checkpoints(run), run / "checkpoints" / BEST)
    there = {path.name: path for path in places if path.is_dir()}
    # As text: Python reads no number of thousands of digits.
    digits = name.lstrip("0").zfill(6)
    whole = f"step-{digits}" if name.isascii() and name.isdigit() else name
    if whole not in there:
        told = f"there are: {', '.join(there) or 'none'}"
        raise AssetError(f"{run}: has no checkpoint {name[:80]!r}", hint=told)
    return there[whole]


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; links to folders are among them."""
    inside = (run / "checkpoints").glob("step-*")
    # Copies under other names are none, nor is a link whose target is gone.
    found = [path for path in inside if _STEP.fullmatch(path.name) and path.is_dir()]
    # By number: as texts step-1000000 would come before step-999999.
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        AssetError: If the run does not exist or has none.
    """
    found = checkpoints(run)
    if not found:
        # The run may be called anything; `runs/` is where it goes by default.
        what = "has no checkpoint" if run.is_dir() else "does not exist"
        raise AssetError(f"{run}: {what}", hint="`ls runs/` shows the runs there are")
    return found[-1]


def read_header(file: Path) -> dict[str, str]:
    """Return the texts in the header of a LoRA file.

    Raises:
        AssetError: If it cannot be read.
    """
    _refuse_pipe(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def recorded_config(header: Mapping[str, str], file: Path) -> dict[str, Any] | None:
    """Return the configuration that training put into a header, None where there is none.

    Raises:
        AssetError: If it is damaged.
    """
    if "alignprop.config" not in header:
        return None
    try:
        found = read_json(header["alignprop.config"])
        if not isinstance(found, dict):
            raise ParseError("no object")
    except ParseError as error:
        raise AssetError(
            f"{file}: alignprop.config in its header is damaged: {error}",
            hint="take the file from its run again",
        ) from error
    return found


def read(file: Path) -> Adapter:
    """Read a LoRA file in diffusers', PEFT's, kohya's or ComfyUI's format.

    The update of every layer is exactly alpha / rank B A (rsLoRA: alpha / sqrt(rank) B A). A file
    of any other kind is refused, and the message says which kind it is.

    Raises:
        AssetError: If it is missing, damaged, not a LoRA, or of another format.
        ConfigError: If its update is something else (DoRA and others), or it is for text encoders
            alone.
        RunError: If it holds NaN or infinity.
    """
    _refuse_pipe(file)
    # 1. Tensors and header. `.keys()` is needed: the handle is no mapping.
    try:
        with safe_open(file, framework="pt") as opened:
            header = dict(opened.metadata() or {})
            state: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error
    # 2. Rank and alpha: in the header, or where PEFT keeps them, in a file next to this one.
    settings = formats.read_settings(header.get(_METADATA, "{}"), f"{file}: {_METADATA}")
    if any(name.startswith(names.PEFT) for name in state):
        settings = _read_peft_config(file)
    # 3. The factors of every layer.
    layers, left_out = formats.read_layers(state, settings, file)
    targets = settings.get("target_modules")
    named = tuple(targets) if isinstance(targets, list) else targets
    prefix = names.network_of(state)
    digest = sha256(file)
    _refuse_rot(file, digest)
    return Adapter(file, layers, header, digest, left_out, named, prefix)


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    header: Mapping[str, str],
    *,
    prefix: str,
    adapter_metadata: Mapping[str, Any],
) -> Path:
    """Write pytorch_lora_weights.safetensors, readable by plain diffusers.

    Args:
        folder: Existing.
        weights: Tensors by their names in the network, as from `layers.weights` or `packed`.
        header: Further texts for the header.
        prefix: What diffusers puts before these names: the family's `lora_prefix`.
        adapter_metadata: The adapter's configuration, as fields of peft's `LoraConfig`.

    Returns:
        The file.
    """
    weights, adapter_metadata = as_written(weights, adapter_metadata, prefix)
    state = {f"{prefix}{name}": value.contiguous() for name, value in weights.items()}
    settings = {f"{prefix}{name}": value for name, value in adapter_metadata.items()}
    text = json.dumps(settings, indent=2, sort_keys=True)
    file = folder / LORA_FILE
    save_tensors(file, state, {"format": "pt", **header, _METADATA: text})
    return file


def as_written(
    weights: Mapping[str, Tensor], adapter_metadata: Mapping[str, Any], prefix: str
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Return the weights and the configuration that `save` writes; its arguments.

    Those of a transformer have the scaling multiplied into B. ComfyUI does not read diffusers'
    header, and diffusers refuses the `.alpha` tensors that ComfyUI reads.
    """
    if prefix != names.NETWORKS[1]:
        return weights, adapter_metadata
    return formats.folded(weights, adapter_metadata)


def layers_as_written(layers: Layers, prefix: str) -> Layers:
    """Return a LoRA with the same update, scaled as `as_written` does."""
    if prefix != names.NETWORKS[1]:
        return layers
    return {name: factors.folded() for name, factors in layers.items()}


def save_for_comfyui(
    file: Path, layers: Layers, header: Mapping[str, str], *, prefix: str, title: str
) -> Path:
    """Write a file with the names that ComfyUI reads, and ModelSpec's texts in its header.

    Args:
        file: Replaced if it exists.
        layers: The LoRA.
        header: Further texts for the header.
        prefix: As in `save`.
        title: What a user interface shows.

    Returns:
        The file.
    """
    state = formats.for_comfyui(layers, prefix)
    tensors = {name: value.contiguous() for name, value in state.items()}
    texts = modelspec.of_lora(layers, tensors, prefix, header, title)
    save_tensors(file, tensors, {"format": "pt", **header, **texts})
    return file


def _refuse_pipe(file: Path) -> None:
    """Refuse pipes and devices: safetensors would wait for them, whatever signal comes."""
    if file.exists() and not file.is_file():
        raise AssetError(f"{file}: is no file", hint="name a .safetensors file")


def _refuse_rot(file: Path, digest: str) -> None:
    """Refuse the LoRA of a checkpoint that is not the one that was written there.

    Raises:
        AssetError: If its hash is not that in the checkpoint's state.json.
    """
    folder = file.parent.parent if file.parent.name == EMA_FOLDER else file.parent
    state = folder / "state.json"
    if not state.is_file():
        return
    try:
        wanted = read_json(read_text(state, str(file)))["sha256"]
        wanted = wanted[file.relative_to(folder).as_posix()]
    except (AssetError, ParseError, LookupError, TypeError):
        return  # some other program's, or of no use: the file may be as it was
    if file.name == LORA_FILE and digest != wanted:
        raise AssetError(
            f"{file}: damaged: it is not the file that training wrote",
            hint="name another checkpoint of the run",
        )


def _read_peft_config(file: Path) -> dict[str, Any]:
    """Return the configuration that PEFT writes next to its file; without it alpha is unknown."""
    place = file.parent / PEFT_CONFIG
    try:
        text = read_text(place, "LoRA", most=_MOST_CONFIG)
    except AssetError as error:
        raise AssetError(
            f"{file}: is in PEFT's format, whose rank and alpha are in {PEFT_CONFIG} next to it, "
            f"which cannot be read: {error.message.removeprefix('LoRA: ')}",
            hint=f"put {PEFT_CONFIG} of the same LoRA into {file.parent}",
        ) from error
    return formats.read_settings(text, str(place))


def _unreadable(file: Path, error: Exception) -> AssetError:
    return AssetError(
        f"{file}: cannot be read as a LoRA: {shown(first_line(error))}",
        hint="only .safetensors files are read",
    )
