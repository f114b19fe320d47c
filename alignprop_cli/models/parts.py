"""Load single parts of a pipeline, from a folder in diffusers format or from a single file."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import transformers

from alignprop_cli.errors import AssetError
from alignprop_cli.models import configs, loading
from alignprop_cli.models.base import Source
from alignprop_cli.models.quantized import quantize_part
from alignprop_cli.paths import user_path


@dataclass(frozen=True)
class Kind:
    """How the pipelines of a family are loaded.

    Args:
        pipeline: The class in diffusers.
        layout: What their configurations may say.
        networks: The classes of the parts that have weights.
        others: Names of the parts without weights.
        absent: Options of the pipeline that leave out what is not used.
        in_float32: Parts that are never held in float16.
    """

    pipeline: Any
    layout: configs.Layout
    networks: Mapping[str, Any]
    others: tuple[str, ...]
    absent: Mapping[str, Any] = field(default_factory=dict[str, Any])
    in_float32: tuple[str, ...] = ()

    def dtype(self, part: str, wanted: torch.dtype) -> torch.dtype:
        """Return the precision that a part is loaded in."""
        in_float32 = part in self.in_float32 and wanted == torch.float16
        return torch.float32 if in_float32 else wanted


def load(kind: Kind, source: Source, *parts: str) -> Any:
    """Return a pipeline with these parts alone.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a setting is wrong or not obeyed, as `configs.check`.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    path, config = source.path, source.config
    # A part that is passed as None is left out.
    networks = [name for name in parts if name in kind.networks]
    options: dict[str, Any] = dict.fromkeys({*kind.networks, *kind.others} - set(parts))
    options |= {"dtype": source.dtype, **kind.absent}
    if path.is_dir():
        configs.check(path, kind.layout)
        options |= {name: _network(kind, source, name) for name in networks}
        with loading.explained(config, path):
            return kind.pipeline.from_pretrained(
                str(path), variant=config.variant, image_encoder=None, **options
            )
    # A single file has no configuration. Without a folder for it diffusers guesses one from the
    # names of the tensors and downloads it.
    if config.config is not None:
        folder = user_path(config.config, "model.config")
        configs.check(folder, kind.layout)
        options["config"] = str(folder)
    with loading.explained(config, path):
        pipeline = kind.pipeline.from_single_file(str(path), **options)
        for name in networks:
            network = getattr(pipeline, name)
            # Tensors that the file lacks have no values.
            empty = sorted(key for key, value in network.named_parameters() if value.is_meta)
            if empty:
                raise ValueError(f"it lacks {name}.{empty[0]} ({len(empty)} tensors are missing)")
            quantize_part(network.to(kind.dtype(name, source.dtype)), source, name)
    return pipeline


def _network(kind: Kind, source: Source, name: str) -> Any:
    """Load one part of a folder; every tensor of it must be in the file."""
    folder, variant = source.path / name, source.config.variant
    source = replace(source, dtype=kind.dtype(name, source.dtype))
    if not folder.is_dir():
        raise AssetError(f"model.id: cannot load {source.path}: it has no folder {name}")
    # As the pipeline does: parts that have no such files are loaded from the plain ones.
    has_variant = variant is not None and any(folder.glob(f"*.{glob.escape(variant)}*"))
    with loading.explained(source.config, folder):
        network, report = kind.networks[name].from_pretrained(
            str(folder),
            variant=variant if has_variant else None,
            dtype=source.dtype,
            output_loading_info=True,
        )
        # The libraries fill what is missing with random numbers, and pass over what is too much.
        missing, more = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        if missing:
            raise ValueError(f"it lacks {missing[0]} ({len(missing)} tensors are missing)")
        if more and not name.startswith("text_encoder"):
            raise ValueError(f"it has a tensor {more[0]} that the configuration knows no layer for")
    return quantize_part(network, source, name)


def on_meta(kind: Kind, source: Source, texts: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of a network and an autoencoder without weights, and its texts' configs.

    Args:
        kind: Of the pipeline.
        source: Its path is a folder in diffusers format; weights and tokenizers are not read.
        texts: The classes of the configurations of the text encoders, by part.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: If a setting is wrong or not obeyed.
    """
    folder = source.path
    configs.check(folder, kind.layout)
    scheduler_kind: Any = getattr(diffusers, configs.scheduler_class(folder))
    networks: dict[str, Any] = {}
    with loading.explained(source.config, folder), torch.device("meta"):
        for name in ("unet", "vae"):
            made = kind.networks[name]
            network = made.from_config(made.load_config(folder, subfolder=name))
            # diffusers' own `to` warns about modules that stay in float32; there are none here.
            network = torch.nn.Module.to(network, kind.dtype(name, source.dtype))
            networks[name] = quantize_part(network, source, name)
        found = {name: made.from_pretrained(folder / name) for name, made in texts.items()}
    # Not on the meta device: the noise levels are numbers that are read.
    with loading.explained(source.config, folder):
        scheduler = scheduler_kind.from_pretrained(folder, subfolder="scheduler")
    options: dict[str, Any] = dict.fromkeys({*kind.networks, *kind.others})
    options |= {**networks, "scheduler": scheduler, **kind.absent}
    return kind.pipeline(**options), found
