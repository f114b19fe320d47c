"""Stable Diffusion 1.x and 2.x, and everything else in the StableDiffusionPipeline format."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from alignprop_cli import images
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models import configs, loading
from alignprop_cli.models.base import MetaModel, Parts, Source
from alignprop_cli.paths import user_path
from alignprop_cli.prompts import for_tokenizer
from alignprop_cli.schedule import NoiseSchedule, diffusion_schedule

# The safety checker classifies images and is no part of the chain; it costs 1.2 GB.
_NO_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
}


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
        # Padded to the full length, as in diffusers' pipeline: the network was trained to attend to
        # the padding too.
        tokens = self.tokenizer(
            for_tokenizer(prompt),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.encoder(tokens.input_ids.to(self.encoder.device))[0][0]  # (L, D)


class UNet:
    """The network; see `Network`.

    Args:
        module: diffusers' network; it is frozen here.
        scheduler_config: The configuration of the model's own scheduler, of any class.
        factor: Width of an image in pixels divided by the width of its latents.
        model_id: The model's id as the user gave it, for messages.
    """

    def __init__(
        self, module: Any, scheduler_config: dict[str, Any], factor: int, model_id: str
    ) -> None:
        # Convolutions are faster in this memory layout, on the CPU and on tensor cores.
        self.module: Any = _freeze(module).to(memory_format=torch.channels_last)
        self._scheduler_config = scheduler_config
        self._factor = factor
        self._model_id = model_id

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

    def schedule(self, steps: int, latent_shape: tuple[int, int, int]) -> NoiseSchedule:
        """Return DDIM's noise levels with the model's own betas and spacing, for any shape."""
        # 1. DDIM reads the configuration of the model's scheduler, often PNDM: the betas are the
        #    same. Latents are never clipped, which makes sense for pixels alone.
        scheduler = DDIMScheduler.from_config(self._scheduler_config, clip_sample=False)
        total = scheduler.config.num_train_timesteps
        if steps > total:
            raise ConfigError(
                f"sample.num_inference_steps: {steps} is more than the "
                f"{total} timesteps {self._model_id} was trained with"
            )
        # 2. The timesteps. steps_offset moves all of them, so with many steps the first one may lie
        #    beyond the last one that the model was trained with.
        scheduler.set_timesteps(steps)
        # With `trailing` spacing rounding adds one at -1 for some numbers of steps, such as 61.
        timesteps = [int(timestep) for timestep in scheduler.timesteps if timestep >= 0][:steps]
        first = timesteps[0]
        if first >= total:
            raise ConfigError(
                f"sample.num_inference_steps: {steps} reaches timestep {first}, {self._model_id} "
                f"was trained with {total}, numbered from 0: take fewer"
            )
        # 3. (alpha, sigma) of each step.
        try:
            return diffusion_schedule(
                scheduler.alphas_cumprod,
                timesteps,
                float(scheduler.final_alpha_cumprod),
                scheduler.config.prediction_type,
            )
        except ValueError as error:
            raise ConfigError(f"model.id: {self._model_id}: {error}") from error

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision; see `Network`."""
        # The chain stays in the precision of the latents, the network may be in half precision.
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise_pred: Tensor = self.module(
            latents.to(self.module.dtype), timesteps, embeds.tensors["hidden"], return_dict=False
        )[0]
        return noise_pred.to(latents.dtype)

    def recompute_blocks(self, on: bool) -> None:
        """Switch checkpointing of the network's blocks on or off; see `Network`."""
        if on:
            self.module.enable_gradient_checkpointing(_recompute)
        else:
            self.module.disable_gradient_checkpointing()


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
        self.module: Any = _freeze(module).to(memory_format=torch.channels_last)
        self.module.use_tiling = tile_size is not None
        if tile_size is None:
            return
        # Tiles overlap by a quarter (diffusers' tile_overlap_factor), and in whole latents only.
        unit = 4 * factor
        if tile_size % unit:
            raise ConfigError(
                f"model.vae_tile_size: {tile_size} is not a multiple of {unit}, which {model_id} "
                f"needs; nearest: {max(unit, round(tile_size / unit) * unit)}"
            )
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

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode to images in [0, 1]; see `Decoder`."""
        # The switch is a flag of the module that decode reads, so it is set at every call.
        vae = self.module
        if recompute:
            vae.enable_gradient_checkpointing()
        else:
            vae.disable_gradient_checkpointing()
        # (B, C, h, w) -> (B, 3, H, W), about -1 to 1
        decoded = vae.decode(self.to_autoencoder(latents).to(vae.dtype), return_dict=False)
        return images.from_decoder(decoded[0])


def load_text_encoders(source: Source, device: torch.device) -> ClipText:
    """Load the tokenizer and the text encoder, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a setting is wrong or not obeyed, as `configs.check`.
    """
    pipeline = _load(source, "tokenizer", "text_encoder").to(device)
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    with loading.explained(source.config, source.path):
        rows, positions = encoder.config.vocab_size, encoder.config.max_position_embeddings
        if len(tokenizer) > rows:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {rows}")
        if tokenizer.model_max_length > positions:
            raise ValueError(f"the tokenizer writes more tokens than the {positions} that are read")
        made = ClipText(tokenizer, encoder)
        # What is wrong with them shows in the first use.
        made._encode("")
    return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If the network needs more input than latents (inpainting, upscaling), or a
            setting is wrong or not obeyed, as `configs.check`.
    """
    return _parts(_load(source, "unet", "vae", "scheduler").to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from a folder with unet/, vae/, text_encoder/ and scheduler/.

    Args:
        source: Its path is that folder; weights and tokenizer are not read.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    folder, dtype = source.path, source.dtype
    configs.check(folder)
    scheduler_kind: Any = getattr(diffusers, configs.scheduler_class(folder))
    with loading.explained(source.config, folder), torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(folder, subfolder="unet")
        )
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
        text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    # Not on the meta device: the noise levels are numbers that are read.
    with loading.explained(source.config, folder):
        scheduler = scheduler_kind.from_pretrained(folder, subfolder="scheduler")
    # diffusers' own `to` warns about modules that stay in float32; there are none here.
    pipeline = StableDiffusionPipeline(
        vae=torch.nn.Module.to(vae, dtype),
        unet=torch.nn.Module.to(unet, dtype),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        **_NO_CHECKER,
    )
    factor = pipeline.vae_scale_factor
    shape = (1, text.max_position_embeddings, text.hidden_size)  # (1, L, D)
    embeds = Embeds({"hidden": torch.empty(shape, dtype=dtype, device="meta")})
    return MetaModel(
        parts=_parts(pipeline, source),
        conditioning=Conditioning(embeds, embeds),
        image_size=lambda latent_shape: (latent_shape[1] * factor, latent_shape[2] * factor),
    )


# The parts of a pipeline that are used, with the classes of those that have weights.
_PARTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": None,
    "scheduler": None,
}


def _load(source: Source, *parts: str) -> StableDiffusionPipeline:
    """Load a pipeline with these parts alone."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    path, config = source.path, source.config
    # A part that is passed as None is left out.
    options: dict[str, Any] = dict.fromkeys(set(_PARTS) - set(parts))
    options |= {"dtype": source.dtype, **_NO_CHECKER}
    if path.is_dir():
        configs.check(path)
        options |= {name: _network(source, name) for name in parts if _PARTS[name] is not None}
        with loading.explained(config, path):
            return StableDiffusionPipeline.from_pretrained(
                str(path), variant=config.variant, image_encoder=None, **options
            )
    # A single file has no configuration. Without a folder for it diffusers guesses one from the
    # names of the tensors and downloads it.
    if config.config is not None:
        folder = user_path(config.config, "model.config")
        configs.check(folder)
        options["config"] = str(folder)
    with loading.explained(config, path):
        pipeline = StableDiffusionPipeline.from_single_file(str(path), **options)
        # Tensors that the file lacks have no values.
        for name in (name for name in parts if _PARTS[name] is not None):
            named = getattr(pipeline, name).named_parameters()
            empty = sorted(key for key, value in named if value.is_meta)
            if empty:
                raise ValueError(f"it lacks {name}.{empty[0]} ({len(empty)} tensors are missing)")
    return pipeline


def _network(source: Source, name: str) -> Any:
    """Load one part of a folder; every tensor of it must be in the file."""
    folder, variant = source.path / name, source.config.variant
    if not folder.is_dir():
        raise AssetError(f"model.id: cannot load {source.path}: it has no folder {name}")
    # As the pipeline does: parts that have no such files are loaded from the plain ones.
    has_variant = variant is not None and any(folder.glob(f"*.{glob.escape(variant)}*"))
    with loading.explained(source.config, folder):
        network, report = _PARTS[name].from_pretrained(
            str(folder),
            variant=variant if has_variant else None,
            dtype=source.dtype,
            output_loading_info=True,
        )
        # The libraries fill what is missing with random numbers, and pass over what is too much.
        missing, more = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        if missing:
            raise ValueError(f"it lacks {missing[0]} ({len(missing)} tensors are missing)")
        if more and name != "text_encoder":
            raise ValueError(f"it has a tensor {more[0]} that the configuration knows no layer for")
    return network


def _parts(pipeline: StableDiffusionPipeline, source: Source) -> Parts:
    """Return the network and the decoder of a pipeline."""
    config = source.config
    for name in ("unet", "vae", "scheduler"):
        configs.check_part(name, getattr(pipeline, name).config, f"{source.path}: {name}")
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
    return Parts(
        network=UNet(pipeline.unet, dict(pipeline.scheduler.config), factor, config.id),
        decoder=VaeDecoder(pipeline.vae, factor, config.vae_tile_size, config.id),
    )


def _freeze(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def _recompute(block: torch.nn.Module, hidden_states: Tensor, *others: Any) -> Any:
    """Run a block of the network with activation checkpointing."""
    # Reentrant where there is a gradient into the block, for the reason given in `sampling._call`.
    # In the first call of a path the first block has none.
    reentrant = hidden_states.requires_grad
    return checkpoint(
        block, hidden_states, *others, use_reentrant=reentrant, preserve_rng_state=False
    )
