"""Load single parts of a pipeline, from a folder in diffusers format or from a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import transformers

from alignprop_cli.models import components, configs, loading, single_files
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

    def of(self, source: Source, part: str) -> Source:
        """Return the source of a part, which has its own precision."""
        return replace(source, dtype=self.dtype(part, source.dtype))


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
        options |= {
            name: components.load_network(kind.of(source, name), name, kind.networks[name])
            for name in networks
        }
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
            # diffusers' own `to` warns about modules that stay in float32; there are none here.
            torch.nn.Module.to(network, kind.dtype(name, source.dtype))
            quantize_part(network, source, name)
        if "scheduler" in parts:
            pipeline.scheduler = _as_marked(pipeline.scheduler, source)
    return pipeline


def _as_marked(scheduler: Any, source: Source) -> Any:
    """Return the scheduler with what a single file says of its noise."""
    # The configuration is a guess, of the model that most files were fine-tuned from.
    marks = single_files.noise_marks(source.path)
    values = {**scheduler.config, **marks}
    defaults = values.get("_use_default_values", ())
    values["_use_default_values"] = [key for key in defaults if key not in marks]
    return type(scheduler).from_config(values) if marks else scheduler


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
    networks = {
        name: components.network_on_meta(kind.of(source, name), name, kind.networks[name])
        for name in ("unet", "vae")
    }
    with loading.explained(source.config, folder):
        found = {name: made.from_pretrained(folder / name) for name, made in texts.items()}
    # Not on the meta device: the noise levels are numbers that are read.
    with loading.explained(source.config, folder):
        scheduler = scheduler_kind.from_pretrained(folder, subfolder="scheduler")
    options: dict[str, Any] = dict.fromkeys({*kind.networks, *kind.others})
    options |= {**networks, "scheduler": scheduler, **kind.absent}
    return kind.pipeline(**options), found
