"""A small autoencoder that approximates a family's decoder: `model.decoder` other than `full`.

It decodes the images that are rewarded in training, where the decoder's activations are a large
part of the memory. Samples and evaluation keep the model's own decoder, so that what is shown and
reported are the model's images. Source: TAESD, github.com/madebyollin/taesd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from huggingface_hub import hf_hub_download
from torch import Tensor

from alignprop_cli import hub, images
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.models import components
from alignprop_cli.models.base import Decoder, Family
from alignprop_cli.models.components import read_object
from alignprop_cli.models.recompute import decoder_blocks
from alignprop_cli.paths import user_path

FULL = "full"
TAESD = "taesd"

_OPTION = "model.decoder"
_ALTERNATIVE = "full, which needs no other file"


class TinyDecoder:
    """The decoder; see `Decoder`.

    Args:
        module: diffusers' AutoencoderTiny, frozen.
        to_tiny: From the chain's latents to those of the autoencoder, up to scale and shift.
    """

    def __init__(self, module: Any, to_tiny: Callable[[Tensor], Tensor]) -> None:
        self.module: Any = components.freeze(module).to(memory_format=torch.channels_last)
        self._to_tiny = to_tiny

    def parameters(self) -> list[Tensor]:
        """Return the weights that `decode` uses."""
        return list(self.module.decoder.parameters())

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode to approximate images in [0, 1]; see `Decoder`."""
        # As in the pipelines, with this autoencoder's numbers: the published ones read the latents
        # as the network leaves them (1 and 0).
        config = self.module.config
        latents = self._to_tiny(latents) / config.scaling_factor + config.shift_factor
        with decoder_blocks(self.module, recompute):
            # (B, C, h, w) -> (B, 3, H, W), about -1 to 1
            decoded = self.module.decode(latents.to(self.module.dtype), return_dict=False)[0]
        return images.from_decoder(decoded)


def describe(config: ModelConfig, family: Family) -> str | None:
    """Return the line that says what decodes in training; None where it is the model's own."""
    if config.decoder == FULL:
        return None
    return (
        f"decoder: {_place(config, family)} for the rewards of training, an approximation; "
        "samples and evaluation use the model's own"
    )


def load(
    config: ModelConfig, family: Family, full: Decoder, dtype: torch.dtype, device: torch.device
) -> TinyDecoder | None:
    """Load what decodes in training, frozen; None where that is the model's own decoder.

    Args:
        config: The `model` section.
        family: Of the model.
        full: The model's own decoder.
        dtype: Precision of the weights.
        device: Where they go.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If none is published for the family, or it does not fit the model.
    """
    if config.decoder == FULL:
        return None
    place = _place(config, family)
    _check(_values(config, full, place), full, config, place)
    kind: Any = AutoencoderTiny
    with hub.loading(_OPTION, place, alternative=_ALTERNATIVE), _quiet():
        module, report = kind.from_pretrained(
            place, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        # diffusers fills what is missing with random numbers.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {missing[0]} ({len(missing)} tensors are missing)")
        if more := sorted(report["unexpected_keys"]):
            raise ValueError(f"it has a tensor {more[0]} that the configuration knows no layer for")
    _check(module.config, full, config, place)
    return TinyDecoder(module.to(device), full.to_tiny)  # type: ignore[attr-defined]


def on_meta(
    config: ModelConfig, family: Family, full: Decoder, dtype: torch.dtype
) -> TinyDecoder | None:
    """Build what decodes in training without weights, to plan with; None as in `load`.

    Raises:
        AssetError, ConfigError: As `load`, but weights are not looked for.
    """
    if config.decoder == FULL:
        return None
    place = _place(config, family)
    values = _values(config, full, place)
    _check(values, full, config, place)
    with hub.loading(_OPTION, place), _quiet(), torch.device("meta"):
        module: Any = AutoencoderTiny.from_config(dict(values))
    return TinyDecoder(torch.nn.Module.to(module, dtype), full.to_tiny)  # type: ignore[attr-defined]


def local_folder(config: ModelConfig) -> Path | None:
    """Return the folder that `model.decoder` names; None for names and hub ids.

    Raises:
        AssetError: If it is a path, and nothing is there.
    """
    if config.decoder in (FULL, TAESD):
        return None
    path = user_path(config.decoder, _OPTION)
    if path.is_dir():
        return path
    # What cannot be a hub id is a mistyped path: the hub is not asked for it.
    if config.decoder.count("/") != 1 or config.decoder.startswith((".", "~", "/")):
        raise AssetError(
            f"{_OPTION}: no such folder: {config.decoder}",
            hint="give taesd, the folder or hub id of an AutoencoderTiny in diffusers format, "
            f"or {_ALTERNATIVE}",
        )
    return None


def _place(config: ModelConfig, family: Family) -> str:
    """Return the folder or hub id of the autoencoder.

    Raises:
        ConfigError: If none is published for the family.
    """
    if config.decoder != TAESD:
        return str(local_folder(config) or config.decoder)
    if family.taesd is None:
        raise ConfigError(
            f"{_OPTION}: no AutoencoderTiny in diffusers format is published for {family.name}",
            hint=f"give the folder of one, or {_ALTERNATIVE}",
        )
    return family.taesd


def _values(config: ModelConfig, full: Decoder, place: str) -> Mapping[str, Any]:
    """Return the configuration of an autoencoder; of the published ones it need not be read."""
    if not hasattr(full, "to_tiny"):
        raise ConfigError(
            f"{_OPTION}: no AutoencoderTiny reads the latents of {config.id}",
            hint=f"leave it at {_ALTERNATIVE}",
        )
    # They differ in the channels of the latents alone.
    if config.decoder == TAESD:
        return {"latent_channels": _autoencoder(full).latent_channels}
    return _configuration(place)


def _configuration(place: str) -> Mapping[str, Any]:
    """Return what the configuration of an autoencoder says; of a hub id it is downloaded alone."""
    path = Path(place)
    if path.is_dir():
        file = path / "config.json"
    else:
        with hub.loading(_OPTION, place, alternative=_ALTERNATIVE):
            file = Path(hf_hub_download(place, "config.json"))
    found = read_object(file, _OPTION)
    if found is None:
        raise AssetError(f"{_OPTION}: cannot load {place}: it has no config.json")
    return found


def _check(values: Mapping[str, Any], full: Decoder, config: ModelConfig, place: str) -> None:
    """Refuse an autoencoder of another kind, or whose latents or images are not the model's."""
    kind = values.get("_class_name", "AutoencoderTiny")
    if kind != "AutoencoderTiny":
        raise ConfigError(
            f"{_OPTION}: {place} is a {components.shown(kind)}; it must be an AutoencoderTiny"
        )
    own = _autoencoder(full)
    steps = values.get("num_decoder_blocks", (3, 3, 3, 1))
    growth = values.get("upsampling_scaling_factor", 2)
    try:
        factor = growth ** (len(steps) - 1)
    except TypeError:
        factor = None
    for what, have, wanted in (
        ("latent_channels", values.get("latent_channels", 4), own.latent_channels),
        ("pixels a latent", factor, 2 ** (len(own.block_out_channels) - 1)),
        ("out_channels", values.get("out_channels", 3), 3),
    ):
        if have != wanted:
            raise ConfigError(
                f"{_OPTION}: {place} does not fit {config.id}: {what}: "
                f"{components.shown(have)}, the model has {wanted}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from warning about a key that this very class writes to every file."""
    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _autoencoder(full: Decoder) -> Any:
    """Return the configuration of the model's own autoencoder."""
    module: Any = full.module
    return module.config
