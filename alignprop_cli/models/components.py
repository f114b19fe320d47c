"""The parts of a pipeline of any family, each loaded and checked by itself from its folder.

For Stable Diffusion and SDXL parts.py puts them into the pipeline, and also reads single files.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.guidance import Embeds
from alignprop_cli.models import full_weights, loading
from alignprop_cli.models.base import Source
from alignprop_cli.models.quantized import quantize_part
from alignprop_cli.models.rules import Rule
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text

INDEX = "model_index.json"

# Bytes of a configuration.
_MOST_CONFIG = 2**20


@dataclass(frozen=True)
class PartRules:
    """What is demanded of one part of a pipeline.

    Args:
        classes: Names that model_index.json may give it.
        rules: What values of its configuration must be, where they are given.
        file: Its configuration, in the folder of the part.
    """

    classes: tuple[str, ...]
    rules: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    file: str = "config.json"


def check(folder: Path, parts: Mapping[str, PartRules]) -> None:
    """Refuse a folder whose parts are of other classes, or have settings that are not obeyed.

    Files that are not there are passed over: loading says that they are missing.

    Raises:
        AssetError: If a file cannot be read.
        ConfigError: If a class or a value is not what it must be, or weights are quantised; with
            the file and the key.
    """
    index = read_object(folder / INDEX) or {}
    for name, part in parts.items():
        # [library, class]; nulls for a part that the model has not.
        named = index.get(name)
        kind = cast(list[Any], named)[-1] if isinstance(named, list) and named else None
        if kind is not None and kind not in part.classes:
            raise ConfigError(
                f"model.id: {folder / INDEX}: {name}: {shown(kind)} is not supported; it is: "
                f"{', '.join(part.classes)}"
            )
        file = folder / name / part.file
        values = read_object(file) or {}
        full_weights.check_config(values, str(file))
        for key, (holds, expected) in part.rules.items():
            if key in values and not holds(values[key]):
                raise ConfigError(
                    f"model.id: {file}: {key}: expected {expected}, got {shown(values[key])}"
                )


def has_part(folder: Path, name: str) -> bool:
    """Return whether model_index.json says that the model has a part."""
    named = (read_object(folder / INDEX) or {}).get(name)
    return isinstance(named, list) and any(cast(list[Any], named))


def read_object(file: Path, option: str = "model.id") -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no such file.

    Args:
        file: The file.
        option: The key that names it or its folder, for messages.

    Raises:
        AssetError: If it cannot be read.
    """
    if not file.exists():
        return None
    try:
        found = read_json(read_text(file, option, most=_MOST_CONFIG), strict=False)
    except ParseError as error:
        raise AssetError(f"{option}: cannot load {file}: {error}") from error
    if not isinstance(found, dict):
        raise AssetError(f"{option}: cannot load {file}: expected an object")
    return cast(dict[str, Any], found)


def load_network(source: Source, name: str, kind: Any, *, hint: str | None = None) -> Any:
    """Load one part with weights, frozen; every tensor of it must be in the file.

    Args:
        source: The model.
        name: The part's folder.
        kind: Its class.
        hint: What to do where the folder is missing.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If the weights are quantised, or no part has files of the variant.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder, variant = _folder(source, name, hint), source.config.variant
    # As diffusers does: parts that have no such files are loaded from the plain ones.
    names = f"*.{glob.escape(variant)}*" if variant is not None else None
    has_variant = names is not None and any(folder.glob(names))
    if names is not None and not has_variant and not any(source.path.glob(f"*/{names}")):
        raise ConfigError(
            f"model.variant: no part of {source.path} has files of the variant {shown(variant)}"
        )
    with loading.explained(source.config, folder):
        network, report = kind.from_pretrained(
            str(folder),
            variant=variant if has_variant else None,
            dtype=source.dtype,
            output_loading_info=True,
        )
        # The libraries fill what is missing with random numbers, and pass over what is too much.
        missing, more = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        full_weights.check_names(more, str(folder))
        if missing:
            raise ValueError(f"it lacks {missing[0]} ({len(missing)} tensors are missing)")
        if more and issubclass(kind, torch.nn.Module) and hasattr(kind, "load_config"):
            raise ValueError(f"it has a tensor {more[0]} that the configuration knows no layer for")
    return quantize_part(freeze(network), source, name)


def load_tokenizer(source: Source, name: str, kind: Any, rows: int) -> Any:
    """Load a tokenizer.

    Args:
        source: The model.
        name: The part's folder.
        kind: Its class.
        rows: How many tokens its text encoder knows.

    Raises:
        AssetError: If it is missing or damaged, or has more tokens than that.
    """
    folder = _folder(source, name, None)
    with loading.explained(source.config, folder):
        tokenizer = kind.from_pretrained(str(folder))
        if len(tokenizer) > rows:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {rows}")
    return tokenizer


def network_on_meta(source: Source, name: str, kind: Any) -> Any:
    """Build one part without weights.

    Raises:
        AssetError: If its configuration is missing or damaged.
    """
    with loading.explained(source.config, source.path), torch.device("meta"):
        network = kind.from_config(kind.load_config(source.path, subfolder=name))
    # diffusers' own `to` warns about the modules that stay in float32 where it loads them.
    network = freeze(torch.nn.Module.to(network, source.dtype))
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for path, parameter in network.named_parameters():
        if kept & set(path.split(".")):
            parameter.data = parameter.data.float()
    return quantize_part(network, source, name)


def load_config(source: Source, name: str, file: str = "config.json") -> dict[str, Any]:
    """Return the configuration of one part.

    Raises:
        AssetError: If it is missing or damaged.
    """
    found = read_object(_folder(source, name, None) / file)
    if found is None:
        raise AssetError(f"model.id: cannot load {source.path}: it has no {name}/{file}")
    return found


def check_widths(found: Embeds, source: Source, **keys: str) -> None:
    """Refuse text encoders whose embeddings are not what the network reads.

    Args:
        found: Embeddings of a prompt.
        source: The model.
        keys: By the name of an embedding, the key of its width in the network's configuration.

    Raises:
        ConfigError: With both widths.
    """
    network = load_config(source, "transformer")
    for name, key in keys.items():
        have, wanted = found.tensors[name].shape[-1], network.get(key)
        if wanted not in (None, have):
            raise ConfigError(
                f"model.id: {source.path}: transformer: {key}: the network reads embeddings of "
                f"width {wanted}, those of the texts have {have}"
            )


def freeze(module: Any) -> Any:
    """Return the module in evaluation mode, none of its weights trainable."""
    return module.eval().requires_grad_(False)


def recompute(block: torch.nn.Module, hidden_states: Tensor, *others: Any) -> Any:
    """Run a block of a network with activation checkpointing."""
    # Reentrant where there is a gradient into the block, for the reason given in `sampling._call`.
    # In the first call of a path the first block has none.
    reentrant = hidden_states.requires_grad
    return checkpoint(
        block, hidden_states, *others, use_reentrant=reentrant, preserve_rng_state=False
    )


def shown(value: object) -> str:
    """Return a foreign value, short enough for a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _folder(source: Source, name: str, hint: str | None) -> Path:
    folder = source.path / name
    if not folder.is_dir():
        raise AssetError(f"model.id: cannot load {source.path}: it has no folder {name}", hint=hint)
    return folder
