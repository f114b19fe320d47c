"""Stable Diffusion 1.x and 2.x, and everything else in the StableDiffusionPipeline format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from alignprop_cli import images
from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models import configs, loading, parts, schedulers
from alignprop_cli.models.base import MetaModel, Parts, Source, meta_embeds
from alignprop_cli.models.components import freeze, recompute
from alignprop_cli.models.recompute import decoder_blocks
from alignprop_cli.prompts import for_tokenizer
from alignprop_cli.schedule import NoiseSchedule

KIND = parts.Kind(
    pipeline=StableDiffusionPipeline,
    layout=configs.STABLE_DIFFUSION,
    networks={
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
    },
    others=("tokenizer", "scheduler"),
    # The safety checker classifies images and is no part of the chain; it costs 1.2 GB.
    absent={"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None},
)
"""How pipelines of this kind are loaded."""


class ClipText:
    """CLIP's text encoder; see `TextEncoders`.

    Args:
        tokenizer: CLIP's tokenizer.
        encoder: Its last hidden states, (L, D) for one prompt, condition the network.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself; see `TextEncoders`."""
        return [Embeds({"hidden": self._encode(prompt)}) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether the encoder does not read a prompt to its end."""
        tokens = self.tokenizer(for_tokenizer(prompt)).input_ids
        return len(tokens) > self.tokenizer.model_max_length

    def _encode(self, prompt: str) -> Tensor:
        return self.encoder(token_ids(self.tokenizer, prompt).to(self.encoder.device))[0][
            0
        ]  # (L, D)


def token_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Return the numbers of a prompt's tokens, shape (1, L)."""
    # Padded to the full length, as in diffusers' pipeline: the network was trained to attend to the
    # padding too.
    tokens = tokenizer(
        for_tokenizer(prompt),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


class UNet:
    """The network; see `Network`.

    Args:
        module: diffusers' network; it is frozen here.
        scheduler_config: The configuration of the model's own scheduler, its class under
            `_class_name`.
        factor: Width of an image in pixels divided by the width of its latents.
        model_id: The model's id as the user gave it, for messages.
    """

    def __init__(
        self, module: Any, scheduler_config: dict[str, Any], factor: int, model_id: str
    ) -> None:
        # Convolutions are faster in this memory layout, on the CPU and on tensor cores.
        self.module: Any = freeze(module).to(memory_format=torch.channels_last)
        self._scheduler_config = scheduler_config
        self._factor = factor
        self._model_id = model_id
        self.embeds_guidance = self.module.config.time_cond_proj_dim is not None

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w); see `Network`."""
        factor, config = self._factor, self.module.config
        default_size = config.sample_size
        if isinstance(default_size, int):
            default_size = (default_size, default_size)
        # The network halves its input at every level but the last.
        unit = factor * 2 ** (len(config.block_out_channels) - 1)
        sizes: list[int] = []
        for name, pixels, default in (
            ("height", height, default_size[0] * factor),
            ("width", width, default_size[1] * factor),
        ):
            if pixels is not None and pixels % unit and pixels != default:
                raise ConfigError(
                    f"sample.{name}: {pixels} is not a multiple of {unit}, which {self._model_id} "
                    f"needs; nearest: {max(unit, round(pixels / unit) * unit)}"
                )
            sizes.append((pixels or default) // factor)
        return config.in_channels, sizes[0], sizes[1]

    def schedule(
        self,
        steps: int,
        latent_shape: tuple[int, int, int],
        scheduler: str = schedulers.MODEL,
        spacing: str = schedulers.MODEL,
    ) -> NoiseSchedule:
        """Return the noise levels of the model's own or a chosen scheduler, for any shape."""
        return schedulers.noise_schedule(
            self._scheduler_config, steps, self._model_id, scheduler=scheduler, spacing=spacing
        )

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision; see `Network`."""
        # The chain stays in the precision of the latents, the network may be in half precision.
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise_pred: Tensor = self.module(
            latents.to(self.module.dtype),
            timesteps,
            embeds.tensors["hidden"],
            timestep_cond=self._guidance(embeds) if self.embeds_guidance else None,
            added_cond_kwargs=self._added(latents, embeds),
            return_dict=False,
        )[0]
        return noise_pred.to(latents.dtype)

    def _guidance(self, embeds: Embeds) -> Tensor:
        """Return the embedding of the guidance scale, (B, D)."""
        # The scale minus 1, as papers count it, in sines and cosines of 1000 times that.
        scale = 1000.0 * (embeds.tensors["guidance"] - 1.0)
        width = self.module.config.time_cond_proj_dim
        return get_timestep_embedding(scale, width, downscale_freq_shift=1).to(self.module.dtype)

    def _added(self, latents: Tensor, embeds: Embeds) -> dict[str, Tensor] | None:
        """Return what the network is told besides; nothing here."""
        return None

    def recompute_blocks(self, on: bool) -> None:
        """Switch checkpointing of the network's blocks on or off; see `Network`."""
        if on:
            self.module.enable_gradient_checkpointing(recompute)
        else:
            self.module.disable_gradient_checkpointing()


def check_tiles(tile_size: int, factor: int, model_id: str) -> None:
    """Refuse tiles of which a quarter is not a whole number of latents.

    Args:
        tile_size: Pixels in a row of a tile.
        factor: Width of an image in pixels divided by the width of its latents.
        model_id: The model's id as the user gave it, for the message.

    Raises:
        ConfigError: With the nearest size.
    """
    unit = 4 * factor
    if tile_size % unit:
        raise ConfigError(
            f"model.vae_tile_size: {tile_size} is not a multiple of {unit}, which {model_id} "
            f"needs; nearest: {max(unit, round(tile_size / unit) * unit)}"
        )


class VaeDecoder:
    """The decoder; see `Decoder`.

    Args:
        module: The whole autoencoder; it is frozen here.
        factor: Width of an image in pixels divided by the width of its latents.
        tile_size: Decode in overlapping tiles of this many pixels; None decodes the whole image.
        model_id: The model's id as the user gave it, for messages.

    Raises:
        ConfigError: If tiles cannot have this size.
    """

    def __init__(self, module: Any, factor: int, tile_size: int | None, model_id: str) -> None:
        self.module: Any = freeze(module).to(memory_format=torch.channels_last)
        self.module.use_tiling = tile_size is not None
        if tile_size is None:
            return
        # Tiles overlap by a quarter: diffusers' tile_overlap_factor.
        check_tiles(tile_size, factor, model_id)
        self.module.tile_sample_min_size = tile_size
        self.module.tile_latent_min_size = tile_size // factor

    def parameters(self) -> list[Tensor]:
        """Return the weights that `decode` uses."""
        # Some autoencoders have no convolution there.
        used = (self.module.post_quant_conv, self.module.decoder)
        return [p for module in used if module is not None for p in module.parameters()]

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """Return the latents in the autoencoder's own units; differentiable."""
        return latents / self.module.config.scaling_factor

    def to_tiny(self, latents: Tensor) -> Tensor:
        """Return the latents as an AutoencoderTiny of the family reads them; differentiable."""
        return latents

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode to images in [0, 1]; see `Decoder`."""
        vae = self.module
        with decoder_blocks(vae, recompute):
            # (B, C, h, w) -> (B, 3, H, W), about -1 to 1
            decoded = vae.decode(self.to_autoencoder(latents).to(vae.dtype), return_dict=False)[0]
        return images.from_decoder(decoded)


def load_text_encoders(source: Source, device: torch.device) -> ClipText:
    """Load the tokenizer and the text encoder, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a setting is wrong or not obeyed, as `configs.check`.
    """
    pipeline = parts.load(KIND, source, "tokenizer", "text_encoder").to(device)
    made = ClipText(pipeline.tokenizer, pipeline.text_encoder)
    with loading.explained(source.config, source.path):
        check_tokenizer(made.tokenizer, made.encoder)
        # What is wrong with them shows in the first use.
        made._encode("")
    return made


def check_tokenizer(tokenizer: Any, encoder: Any) -> None:
    """Refuse a tokenizer whose tokens the text encoder has no place for.

    Raises:
        ValueError: With what does not fit.
    """
    rows, positions = encoder.config.vocab_size, encoder.config.max_position_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {rows}")
    if tokenizer.model_max_length > positions:
        raise ValueError(f"the tokenizer writes more tokens than the {positions} that are read")


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If the network needs more input than latents (inpainting, upscaling), or a
            setting is wrong or not obeyed, as `configs.check`.
    """
    pipeline = parts.load(KIND, source, "unet", "vae", "scheduler").to(device)
    return make_parts(pipeline, source, KIND, UNet)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from a folder with unet/, vae/, text_encoder/ and scheduler/.

    Args:
        source: Its path is that folder; weights and tokenizer are not read.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    pipeline, found = parts.on_meta(KIND, source, {"text_encoder": CLIPTextConfig})
    text = found["text_encoder"]
    embeds = meta_embeds(source, hidden=(text.max_position_embeddings, text.hidden_size))
    factor = pipeline.vae_scale_factor
    return MetaModel(
        parts=make_parts(pipeline, source, KIND, UNet),
        conditioning=Conditioning(embeds, embeds),
        image_size=lambda latent_shape: (latent_shape[1] * factor, latent_shape[2] * factor),
    )


def make_parts(pipeline: Any, source: Source, kind: parts.Kind, network: type[UNet]) -> Parts:
    """Return the network and the decoder of a pipeline.

    Args:
        pipeline: With network, autoencoder and scheduler.
        source: Where it is from.
        kind: Of the pipeline.
        network: The class of the network's part.

    Raises:
        ConfigError: As `load_parts`.
    """
    config = source.config
    for name in ("unet", "vae", "scheduler"):
        values = getattr(pipeline, name).config
        configs.check_part(name, values, f"{source.path}: {name}", kind.layout)
    channels = pipeline.unet.config.in_channels
    latent_channels = pipeline.vae.config.latent_channels
    if channels != latent_channels:
        raise ConfigError(
            f"model.id: the network of {config.id} takes {channels} channels, its latents have "
            f"{latent_channels}: inpainting and upscaling models cannot be trained"
        )
    if pipeline.unet.config.out_channels != channels:
        raise ConfigError(
            f"model.id: the network of {config.id} gives {pipeline.unet.config.out_channels} "
            f"channels for {channels}: a learned variance is not supported"
        )
    factor = pipeline.vae_scale_factor
    scheduler = {
        **pipeline.scheduler.config,
        "_class_name": type(pipeline.scheduler).__name__,
    }
    return Parts(
        network=network(pipeline.unet, scheduler, factor, config.id),
        decoder=VaeDecoder(pipeline.vae, factor, config.vae_tile_size, config.id),
    )
