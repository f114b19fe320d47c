"""Load a Stable Diffusion from a folder, a file or the hub, and say what is wrong with it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from alignprop_cli import device as machine
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.device import resolve_dtype
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError, first_line
from alignprop_cli.models.unet import StableDiffusion

_ELSEWHERE = "set model.id to a local folder or file; `--preset tiny` works without any download"


def load(config: ModelConfig, path: Path | None, device: torch.device) -> StableDiffusion:
    """Load a pipeline from a folder, a single file, or the hub.

    Args:
        config: The `model` section.
        path: The local folder or file; None means that `config.id` is a hub id.
        device: Where the weights go.

    Raises:
        AssetError: If something is missing, damaged, gated or out of reach; says which.
        ConfigError: If the network takes more than latents (inpainting, upscaling).
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    common: dict[str, Any] = {
        "dtype": resolve_dtype(config.dtype, device),
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
    }
    try:
        if path is not None and path.is_file():
            if config.config is not None:
                common["config"] = config.config
            pipeline = StableDiffusionPipeline.from_single_file(str(path), **common)
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(path or config.id),
                revision=config.revision,
                variant=config.variant,
                image_encoder=None,
                **common,
            )
    except _LOADING as error:
        raise _explain(config, path, error) from error
    channels = pipeline.unet.config.in_channels
    if channels != pipeline.vae.config.latent_channels:
        raise ConfigError(
            f"model.id: the network of {config.id} takes {channels} channels, its latents have "
            f"{pipeline.vae.config.latent_channels}: inpainting and upscaling models "
            "cannot be trained"
        )
    machine.allow_tf32(common["dtype"])
    model = StableDiffusion(pipeline.to(device), config.id)
    model.tile_decoder(config.vae_tile_size)
    return model


_LOADING = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    HfHubHTTPError,
    SafetensorError,
    pickle.UnpicklingError,
)


def _explain(config: ModelConfig, path: Path | None, error: BaseException) -> AlignPropError:
    """Say in one message what could not be loaded and what to do."""
    text = first_line(error)
    if path is not None:
        return AssetError(f"model.id: cannot load {path}: {text}", hint=_ELSEWHERE)
    causes = _causes(error)
    if any(isinstance(c, GatedRepoError) for c in causes):
        return AssetError(
            f"model.id: {config.id} is gated: its licence has to be accepted first",
            hint=f"accept it at https://huggingface.co/{config.id}, then `hf auth login`; "
            f"or {_ELSEWHERE}",
        )
    if any(isinstance(c, RevisionNotFoundError) for c in causes):
        return AssetError(f"model.revision: {config.id} has no revision {config.revision!r}")
    if any(isinstance(c, RepositoryNotFoundError) for c in causes):
        return AssetError(f"model.id: the hub has no model {config.id}", hint=_ELSEWHERE)
    if any(isinstance(c, (OfflineModeIsEnabled, LocalEntryNotFoundError)) for c in causes):
        reason = "it is not in the cache and the hub cannot be reached"
        return AssetError(f"model.id: {config.id}: {reason} (model_index.json)", hint=_ELSEWHERE)
    return AssetError(f"model.id: cannot load {config.id} from the hub: {text}", hint=_ELSEWHERE)


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
