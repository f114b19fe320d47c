"""Write a LoRA, or a model with the LoRA merged in, in the formats that other programs read.

    comfyui              one LoRA file with the names of ComfyUI, A1111 and Forge
    merged               a folder in diffusers format
    merged-single-file   one .safetensors file of Stable Diffusion or SDXL in the original layout

Each goes into a folder of its own, export/<kind>, whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import files
from alignprop_cli.lora.factors import is_dora
from alignprop_cli.lora.files import Adapter
from alignprop_cli.publishing import shared
from alignprop_cli.publishing.request import EXPORT, Kind
from alignprop_cli.storage import write_whole

# Above this share of the LoRA's update, what rounding changes is said as a warning would be.
_MUCH = 0.05


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        kind: The format.
        path: The file, or the folder.
        note: What else is to be said; empty for nothing.
    """

    kind: Kind
    path: Path
    note: str = ""


def check(kinds: Sequence[Kind], *, dora: bool, model: ModelConfig | None) -> None:
    """Refuse what cannot be written, before anything is trained, sampled or mixed.

    Args:
        kinds: What is asked for.
        dora: Whether it is a DoRA.
        model: The base model; None where it is not known yet.

    Raises:
        ConfigError: If a format cannot hold a DoRA, or the base model is written in no single file.
        AssetError: If the base model is not found.
    """
    # ComfyUI's rule for `dora_scale` differs from peft's, so the images would be others.
    if dora and "comfyui" in kinds:
        raise ConfigError(
            "--export comfyui: this is a DoRA, and ComfyUI reads DoRAs of another kind alone",
            hint="--export merged writes a model with the DoRA merged in",
        )
    if model is not None and "merged-single-file" in kinds:
        from alignprop_cli.models.families import find

        family, _ = find(model)
        if not family.single_files:
            raise ConfigError(
                f"--export merged-single-file: {family.name} is not written as a single file",
                hint="--export merged writes a folder in diffusers format",
            )


def write(
    kinds: Sequence[Kind], adapter: Adapter, model: ModelConfig | None, folder: Path, title: str
) -> list[Exported]:
    """Write a LoRA in other formats; what is there of an earlier export is replaced.

    Args:
        kinds: The formats.
        adapter: The LoRA.
        model: The base model; not needed for `comfyui`.
        folder: That of the result.
        title: Name of the files.

    Raises:
        AlignPropError: If it cannot be done: see `check`; the base model cannot be loaded, the LoRA
            does not fit it, or there is no space.
    """
    # All of it before the first file: an export that fails half-way would leave half of them.
    check(kinds, dora=is_dora(adapter.layers), model=model)
    return [_write(kind, adapter, model, folder, title) for kind in kinds]


def _write(
    kind: Kind, adapter: Adapter, model: ModelConfig | None, folder: Path, title: str
) -> Exported:
    place = folder / EXPORT / kind
    # A name that is safe in every file system, and that tells the files of a folder apart.
    name = re.sub(r"[^\w.-]+", "-", title)[:100].strip(".-") or "lora"
    name += ".safetensors"
    # 1. A LoRA file needs no base model.
    if kind == "comfyui":
        texts = shared.header(adapter.header)

        def save(made: Path) -> None:
            files.save_for_comfyui(
                made / name, adapter.layers, texts, prefix=adapter.prefix, title=title
            )

        write_whole(place, save)
        return Exported(kind, place / name)
    # 2. A merged model. Imported here, as it loads diffusers.
    from alignprop_cli.models import merged

    assert model is not None
    done: list[merged.Merged] = []
    if kind == "merged":
        write_whole(place, lambda made: done.append(merged.save_folder(model, adapter, made)))
        return Exported(kind, place, _note(done[0], model))
    one_file = partial(merged.save_single_file, model, adapter, title=title)
    write_whole(place, lambda made: done.append(one_file(made / name)))
    return Exported(kind, place / name, _note(done[0], model))


def _note(done: object, model: ModelConfig) -> str:
    """Return what is to be said about a merged model."""
    from alignprop_cli.models.merged import Merged

    assert isinstance(done, Merged)
    # In float32 the rounding is 1e-7 of the weights, and nothing is said.
    said = f"{done.layers} layers merged in {done.dtype}"
    if done.rounding >= 1e-4:
        said += f"; its rounding changes the LoRA's update by {done.rounding:.1%}"
        said += " (much: a LoRA file keeps all of it)" if done.rounding >= _MUCH else ""
    if model.quantize != "none":
        # The images of the run were sampled with other weights.
        said += f"; into the full weights, not those in {model.quantize} that were used here"
    return said
