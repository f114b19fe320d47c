"""A base model with a LoRA merged into its weights, written as a folder or as a single file.

Weights are merged in float64 and rounded once, to the precision that the base model's files have;
what that rounding costs is measured. Only the network is loaded for a folder: the other parts are
copied as they are.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.lora import fit, modelspec
from alignprop_cli.lora.factors import Layers
from alignprop_cli.lora.files import Adapter
from alignprop_cli.lora.tensor_file import save_tensors
from alignprop_cli.models import components, original_layout, parts, sdxl, single_files, unet
from alignprop_cli.models.base import Family, Source
from alignprop_cli.models.families import find, source_of
from alignprop_cli.parsing import read_json
from alignprop_cli.paths import read_text
from alignprop_cli.storage import check_space

CPU = torch.device("cpu")
# Precisions of files, the most exact first.
_PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
_PRECISIONS |= {"F16": torch.float16}

# Files of weights, of which a part may have several sets, and the names that the libraries load.
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".pb")
_LOADED = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(-\d+-of-\d+)?"
    r"\.(?P<kind>safetensors|bin)(\.index\.json)?"
)


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        layers: Layers of the network that were changed.
        dtype: Precision of the network's weights, such as float16.
        rounding: L2 distance of the merged weights from the exact ones, divided by the norm of the
            LoRA's update.
    """

    layers: int
    dtype: str
    rounding: float


def save_folder(config: ModelConfig, adapter: Adapter, folder: Path) -> Merged:
    """Write a folder in diffusers format that `from_pretrained` loads.

    Args:
        config: The base model.
        adapter: The LoRA.
        folder: Existing and empty.

    Raises:
        AlignPropError: If the base model cannot be loaded, the LoRA does not fit it, or there is
            not enough space.
    """
    family, source = _full(config)
    if source.path.is_file():
        # A single file has no parts to copy, so all of it is loaded.
        kind = _kind(family)
        source = replace(source, dtype=_stored([source.path]))
        pipeline = parts.load(kind, source, *kind.networks, *kind.others)
        merged = _merge(pipeline.unet, adapter, config.id)
        networks = [getattr(pipeline, name) for name in kind.networks]
        check_space(folder, sum(map(_bytes, networks)), "the merged model")
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
        pipeline.save_pretrained(folder)
        return merged
    # 1. The network alone is loaded, in the precision of its files, and merged.
    part = family.lora_prefix.rstrip(".")
    source = replace(source, dtype=_stored(_weights(source.path / part, source.config.variant)))
    network: Any = family.load_parts(source, CPU).network.module
    merged = _merge(network, adapter, config.id)
    # 2. What is written is counted before the first byte of it.
    copied = _copied(source, part)
    size = sum(file.stat().st_size for file in copied.values()) + _bytes(network)
    check_space(folder, size, "the merged model")
    # 3. The other parts as they are, then the network.
    for name, file in copied.items():
        _copy(file, folder / name, source.config.variant)
    _write_index(source.path, folder, part)
    network.to(memory_format=torch.contiguous_format).save_pretrained(folder / part)
    return merged


def save_single_file(config: ModelConfig, adapter: Adapter, file: Path, title: str) -> Merged:
    """Write one .safetensors file in the original layout, which `from_single_file` loads.

    Args:
        config: The base model.
        adapter: The LoRA.
        file: The file.
        title: What a user interface shows.

    Raises:
        AlignPropError: As `save_folder`.
        ConfigError: If the family has no such files, or the model has a part that they lack.
    """
    family, source = _full(config)
    if not family.single_files:
        raise ConfigError(
            f"--export merged-single-file: {family.name} is not written as a single file",
            hint="--export merged writes a folder in diffusers format",
        )
    # 1. All parts, in the most exact precision that one of them is stored in.
    kind = _kind(family)
    files = [source.path]
    if source.path.is_dir():
        folders = (source.path / name for name in kind.networks)
        files = [file for folder in folders for file in _weights(folder, source.config.variant)]
    source = replace(source, dtype=_stored(files))
    pipeline = parts.load(kind, source, *kind.networks, "scheduler")
    merged = _merge(pipeline.unet, adapter, config.id)
    # 2. By the other names.
    state = original_layout.single_file(pipeline)
    if family.pipeline_class == single_files.STABLE_DIFFUSION_XL:
        state |= single_files.marks_of(pipeline.scheduler.config, source.dtype)
    check_space(file.parent, sum(t.numel() * t.element_size() for t in state.values()), "the file")
    architecture = modelspec.architecture(adapter.layers, family.lora_prefix, config.id)
    # 3. A header that says what it is.
    sides = pipeline.unet.config.sample_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    size = (width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor)
    prediction = pipeline.scheduler.config.prediction_type
    header = modelspec.of_model(architecture, title, size, prediction)
    save_tensors(file, state, {"format": "pt", **header})
    return merged


def _full(config: ModelConfig) -> tuple[Family, Source]:
    """Return the family of a model and where its weights are, which are loaded in full."""
    # What is quantised in memory is stored in full; the precision is chosen by the files.
    family, path = find(config)
    full = config.model_copy(update={"quantize": "none", "dtype": "float32"})
    return family, source_of(full, path, CPU)


def _kind(family: Family) -> parts.Kind:
    """Return how pipelines of a family with single files are loaded: each part as it is stored."""
    kind = sdxl.KIND if family.pipeline_class == sdxl.KIND.pipeline.__name__ else unet.KIND
    return replace(kind, in_float32=())


@torch.no_grad()
def merge(network: torch.nn.Module, layers: Layers) -> float:
    """Merge a LoRA into a network, in place.

    Args:
        network: Without a LoRA, its weights in full.
        layers: Fit the network.

    Returns:
        L2 distance of the rounded weights from the exact ones, divided by the update's norm.

    Raises:
        RunError: If a merged weight is too large for the network's precision.
    """
    lost = change = 0.0
    for name, factors in layers.items():
        weight = network.get_submodule(name).get_parameter("weight")
        # Layer by layer: in float64 the whole network would take four times its size.
        exact = factors.merged(weight)
        rounded = exact.to(weight.dtype)
        if not bool(rounded.isfinite().all()):
            kind = str(weight.dtype).removeprefix("torch.")
            raise RunError(f"the merged weight of layer {name} is too large for {kind}")
        lost += float((rounded.double() - exact).square().sum())
        change += float((exact - weight.double()).square().sum())
        weight.copy_(rounded)
    return math.sqrt(lost / change) if change else 0.0


def _merge(network: torch.nn.Module, adapter: Adapter, model_id: str) -> Merged:
    fit.check(network, adapter, model_id)
    kind = next(network.parameters()).dtype
    rounding = merge(network, adapter.layers)
    return Merged(len(adapter.layers), str(kind).removeprefix("torch."), rounding)


def _bytes(module: torch.nn.Module) -> int:
    tensors: Mapping[str, Tensor] = module.state_dict()
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _stored(files: Iterable[Path]) -> torch.dtype:
    """Return the most exact precision in safetensors files; float32 where there are none."""
    found: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as opened:
                slices = map(opened.get_slice, opened.keys())
                # An empty tensor is a mark, whatever its precision.
                found |= {one.get_dtype() for one in slices if 0 not in one.get_shape()}
    return next((kind for name, kind in _PRECISIONS.items() if name in found), torch.float32)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of weights that are loaded of a part, indices of several among them."""
    # As the libraries choose: the variant before the plain files, safetensors before pickles.
    files = [file for file in sorted(folder.glob("*")) if file.is_file()]
    for mark in (*[f".{variant}"] * bool(variant), ""):
        for kind in ("safetensors", "bin"):
            found = [
                file
                for file in files
                if mark in file.name
                and (match := _LOADED.fullmatch(file.name.replace(mark, "")))
                and match["kind"] == kind
            ]
            if found:
                return found
    return []


def _copied(source: Source, network: str) -> dict[str, Path]:
    """Return the files of all parts but the network, by their place in the copy."""
    index = components.read_object(source.path / components.INDEX) or {}
    copied: dict[str, Path] = {}
    for part in sorted(index):
        # A name that is no plain one could lead out of the folder.
        if part == network or not part.isidentifier() or not isinstance(index[part], list):
            continue
        folder, variant = source.path / part, source.config.variant
        chosen = _weights(folder, variant)
        for file in sorted(folder.rglob("*")):
            is_weights = file.suffix in _WEIGHTS or ".index." in file.name
            if file.is_file() and (file in chosen or not is_weights):
                # Plain names, so that the copy is loaded without a variant.
                name = file.name.replace(f".{variant}", "") if file in chosen else file.name
                copied[str(file.relative_to(source.path).with_name(name))] = file
    return copied


def _copy(file: Path, target: Path, variant: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if ".index." not in file.name or not variant:
        shutil.copyfile(file, target)
        return
    # The index of a variant names its files.
    found = read_json(read_text(file, "model.id"), strict=False)
    names = found["weight_map"].items()
    found["weight_map"] = {tensor: name.replace(f".{variant}", "") for tensor, name in names}
    target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _write_index(source: Path, folder: Path, network: str) -> None:
    """Write model_index.json: that of the base model, without the parts that are not there."""
    index = components.read_object(source / components.INDEX) or {}
    # A hub id is downloaded without what is not used, such as the safety checker.
    for part, value in index.items():
        # [library, class]; a list of numbers is a setting of the pipeline.
        is_part = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if is_part and part != network and not (folder / part).is_dir():
            index[part] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    text = json.dumps(index, indent=2)
    (folder / components.INDEX).write_text(text + "\n", encoding="utf-8")
