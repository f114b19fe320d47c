"""Stable Diffusion 1.x and 2.x, and everything else in the StableDiffusionPipeline format."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_cli import images
from alignprop_cli.errors import AssetError, ConfigError, first_line
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.attention import use_narrow_attention
from alignprop_cli.models.base import LORA_FILE, Conditioning
from alignprop_cli.sampling import Denoise, guide
from alignprop_cli.schedule import NoiseSchedule, diffusion_schedule

# 236 kB each for Stable Diffusion 1.x in float32.
_CACHED_PROMPTS = 1024


class StableDiffusion:
    """Adapter of a StableDiffusionPipeline to `DiffusionModel`.

    Args:
        pipeline: Loaded, on its device, frozen here.
        model_id: What the user called it.
        device_type: Where it will run; None is where it is.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, model_id: str, device_type: str | None = None
    ) -> None:
        self.id = model_id
        self.pipeline = pipeline
        self.network = pipeline.unet
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._cached = functools.lru_cache(maxsize=_CACHED_PROMPTS)(self._encode)
        self._kept: dict[str, Tensor] = {}
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False)
            module.eval()
        # Convolutions are faster so, on the CPU and on tensor cores; the numbers are the same.
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        if (device_type or self.device.type) == "cpu":
            use_narrow_attention(pipeline.unet)
        self.fingerprint = _fingerprint(pipeline.unet)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        # Diffusers' own property looks through all modules for what moves them first.
        return next(self.network.parameters()).device

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w); see `DiffusionModel`."""
        factor = self.pipeline.vae_scale_factor
        own = self.network.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        # The network halves its input at every level but the last.
        unit = factor * 2 ** (len(self.network.config.block_out_channels) - 1)
        sizes: list[int] = []
        for name, pixels, default in (
            ("height", height, own_height * factor),
            ("width", width, own_width * factor),
        ):
            if pixels is not None and pixels % unit and pixels != default:
                raise ConfigError(
                    f"sample.{name}: {pixels} is not a multiple of {unit}, which {self.id} needs; "
                    f"nearest: {max(unit, round(pixels / unit) * unit)}"
                )
            sizes.append((pixels or default) // factor)
        return self.network.config.in_channels, sizes[0], sizes[1]

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        """Return the levels of DDIM with the model's own betas and spacing."""
        # Latents are never clipped, as in diffusers' own pipeline.
        scheduler = DDIMScheduler.from_config(self._scheduler_config, clip_sample=False)
        total = scheduler.config.num_train_timesteps
        if num_inference_steps > total:
            raise ConfigError(
                f"sample.num_inference_steps: {num_inference_steps} is more than the "
                f"{total} timesteps {self.id} was trained with"
            )
        scheduler.set_timesteps(num_inference_steps)
        try:
            return diffusion_schedule(
                scheduler.alphas_cumprod,
                scheduler.timesteps.tolist(),
                float(scheduler.final_alpha_cumprod),
                scheduler.config.prediction_type,
            )
        except ValueError as error:
            raise ConfigError(f"model.id: {self.id}: {error}") from error

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return encoder(tokens.input_ids.to(encoder.device))[0][0].to(self.device)

    def _embed(self, prompt: str) -> Tensor:
        kept = self._kept.get(prompt)
        return self._cached(prompt) if kept is None else kept.to(self.device)

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts for good; see `DiffusionModel`."""
        self._kept |= {prompt: self._embed(prompt).cpu() for prompt in dict.fromkeys(prompts)}
        self._cached.cache_clear()
        self.pipeline.text_encoder.to("cpu")

    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """Encode prompts, each text once; see `DiffusionModel`."""
        text = torch.stack([self._embed(prompt) for prompt in prompts])
        return Conditioning(text, self._embed(negative_prompt).expand_as(text))

    def denoiser(
        self,
        conditioning: Conditioning,
        guidance_scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Denoise:
        """Return the guided network call; see `DiffusionModel`."""
        network = self.network
        text = conditioning.prompt_embeds
        both = torch.cat([conditioning.negative_prompt_embeds, text])
        last = self._scheduler_config["num_train_timesteps"] - 1
        low, high = (last * share for share in interval)

        def denoise(latents: Tensor, timestep: float) -> Tensor:
            guided = guidance_scale != 1.0 and low <= timestep <= high
            # One use of latents, so that its gradient is the same sum where the call is recomputed.
            inputs, embeds = (latents.repeat(2, 1, 1, 1), both) if guided else (latents, text)
            timesteps = torch.full((len(inputs),), timestep, device=inputs.device)
            noise_pred: Tensor = network(
                inputs.to(network.dtype), timesteps, embeds, return_dict=False
            )[0]
            noise_pred = noise_pred.to(latents.dtype)
            return guide(*noise_pred.chunk(2), guidance_scale) if guided else noise_pred

        return denoise

    def recompute_blocks(self, on: bool) -> None:
        """Switch recomputation of the network's blocks; see `DiffusionModel`."""
        if on:
            self.network.enable_gradient_checkpointing(_recompute)
        else:
            self.network.disable_gradient_checkpointing()

    def decoder_parameters(self) -> list[Tensor]:
        """Return the weights that `decode` uses."""
        vae = self.pipeline.vae
        return [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]

    def tile_decoder(self, size: int | None) -> None:
        """Decode in overlapping tiles of so many pixels from now on; None decodes whole.

        Raises:
            ConfigError: If the size is not one that tiles can have.
        """
        vae = self.pipeline.vae
        vae.use_tiling = size is not None
        if size is None:
            return
        # A quarter overlaps, which has to be whole latents.
        unit = 4 * self.pipeline.vae_scale_factor
        if size % unit:
            raise ConfigError(
                f"model.vae_tile_size: {size} is not a multiple of {unit}, which {self.id} needs; "
                f"nearest: {max(unit, round(size / unit) * unit)}"
            )
        vae.tile_sample_min_size = size
        vae.tile_latent_min_size = size // self.pipeline.vae_scale_factor

    def decode(self, latents: Tensor, *, use_checkpoint: bool = False) -> Tensor:
        """Decode to images in [0, 1]; see `DiffusionModel`."""
        vae = self.pipeline.vae
        if use_checkpoint:
            vae.enable_gradient_checkpointing()
        else:
            vae.disable_gradient_checkpointing()
        decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)
        return images.from_decoder(decoded[0])

    def load_lora(self, path: Path) -> None:
        """Add a LoRA made here or elsewhere (diffusers, peft or kohya format)."""
        file = path / LORA_FILE if path.is_dir() else path
        if not file.is_file():
            raise AssetError(f"no LoRA at {path}: {file.name} is missing")
        try:
            state, alphas, metadata = read_lora(file, unet_config=self.network.config)
        except (SafetensorError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise AssetError(f"{file}: cannot be read as a LoRA: {first_line(error)}") from error
        if not any("lora" in name for name in state):
            raise AssetError(f"{file}: holds no LoRA weights")
        self._check_fits(state, file)
        try:
            StableDiffusionPipeline.load_lora_into_unet(
                state,
                network_alphas=alphas or None,
                unet=self.network,
                adapter_name=lora.ADAPTER,
                metadata=metadata,
                _pipeline=self.pipeline,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise _foreign(file, self.id, first_line(error)) from error
        if not lora.is_present(self.network):
            raise _foreign(file, self.id, "it changes no layer of this model's network")

    def unload_lora(self) -> None:
        """Take the LoRA out of the network: the base model is back, exactly."""
        self.pipeline.unload_lora_weights()

    def _check_fits(self, state: Mapping[str, Tensor], file: Path) -> None:
        """Refuse a LoRA whose layers are not this network's, before anything is changed."""
        shapes = {
            name.removesuffix(".weight").removesuffix(".base_layer"): tuple(p.shape)
            for name, p in self.network.named_parameters()
        }
        for name, value in state.items():
            if not name.startswith("unet.") or not name.endswith(
                ("lora_A.weight", "lora.down.weight")
            ):
                continue
            layer = name.removeprefix("unet.").rpartition(".lora")[0]
            if layer not in shapes:
                raise _foreign(file, self.id, f"it has a layer {layer}, which this model lacks")
            if shapes[layer][1] != value.shape[1]:
                raise _foreign(
                    file,
                    self.id,
                    f"{layer} takes {shapes[layer][1]} channels here, {value.shape[1]} there",
                )

    def save_lora(
        self, directory: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """Write pytorch_lora_weights.safetensors, readable by plain diffusers."""
        adapter = {f"unet.{k}": v for k, v in lora.adapter_metadata(self.network).items()}
        header = {
            "format": "pt",
            **metadata,
            "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True),
        }

        def save(state: dict[str, Tensor], filename: str) -> None:
            save_file({k: v.contiguous() for k, v in state.items()}, filename, metadata=header)

        StableDiffusionPipeline.save_lora_weights(
            directory,
            unet_lora_layers=dict(weights),
            save_function=save,
        )
        return directory / LORA_FILE


def read_lora(
    file: Path, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any] | None]:
    """Read a LoRA by the names of diffusers, whatever its format.

    Args:
        file: In diffusers', peft's or kohya's format.
        **options: Of diffusers' `lora_state_dict`.

    Returns:
        Tensors, the alpha of each layer where the file has one beside its tensors
        (`unet.<layer>.alpha`), and the adapter's configuration where the file has one.

    Raises:
        SafetensorError, OSError, ValueError, KeyError, UnpicklingError: As diffusers.
    """
    loaded: Any = StableDiffusionPipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True, **options
    )
    state, alphas, metadata = loaded
    # Alphas of attention layers are named after one of their matrices, where diffusers itself
    # does not find them any more if layers differ in alpha (0.42).
    named: dict[str, float] = convert_unet_state_dict_to_peft(alphas or {})
    plain = {name.replace(".lora_A.weight", ""): float(alpha) for name, alpha in named.items()}
    return convert_unet_state_dict_to_peft(state), plain, metadata


def _foreign(file: Path, model_id: str, why: str) -> ConfigError:
    return ConfigError(
        f"{file}: this LoRA does not belong to model {model_id}: {why}",
        hint="give the model it was trained on with --model",
    )


def _fingerprint(network: torch.nn.Module) -> str:
    lines = sorted(f"{name} {tuple(p.shape)}" for name, p in network.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _recompute(block: torch.nn.Module, hidden_states: Tensor, *others: Any) -> Any:
    """Run a block of the network so that backward computes it again; as in `sampling.sample`."""
    reentrant = hidden_states.requires_grad
    return checkpoint(
        block, hidden_states, *others, use_reentrant=reentrant, preserve_rng_state=False
    )
