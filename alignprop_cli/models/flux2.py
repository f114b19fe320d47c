"""FLUX.2-klein: Qwen3, a transformer of dual and single blocks, a rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models import components, loading
from alignprop_cli.models.base import MetaModel, Parts, Source, meta_embeds
from alignprop_cli.models.components import PartRules, check_widths
from alignprop_cli.models.flow import SCHEDULER, FlowTransformer, Sizes
from alignprop_cli.models.qwen import LENGTH, QwenText
from alignprop_cli.models.rules import SIZE, list_of, number, one_of
from alignprop_cli.models.unet import VaeDecoder

LAYERS = (9, 18, 27)
"""The layers of Qwen3 whose hidden states condition the network, as in the pipeline."""

_RULES = {
    "scheduler": SCHEDULER,
    "transformer": PartRules(
        ("Flux2Transformer2DModel",),
        {
            "_class_name": one_of("Flux2Transformer2DModel"),
            "in_channels": SIZE,
            # Latents are packed before the network, so it has no patches of its own.
            "patch_size": one_of(1),
            "joint_attention_dim": SIZE,
            # Distilled guidance would need a scale that the klein pipeline does not give.
            "guidance_embeds": one_of(False),
        },
    ),
    "vae": PartRules(
        ("AutoencoderKLFlux2",),
        {
            "_class_name": one_of("AutoencoderKLFlux2"),
            "latent_channels": SIZE,
            "block_out_channels": list_of(SIZE),
            "batch_norm_eps": number(0.0, 1.0),
            "patch_size": one_of([2, 2], (2, 2)),
        },
    ),
    "text_encoder": PartRules(("Qwen3ForCausalLM",), {"hidden_size": SIZE}),
    "tokenizer": PartRules(("Qwen2TokenizerFast", "Qwen2Tokenizer"), file="tokenizer_config.json"),
}


class Flux2Text(QwenText):
    """Qwen3 with its language head, which is not used, read in the middle; see `TextEncoders`."""

    def _encode(self, prompt: str) -> Tensor:
        tokens = self._tokens(prompt)
        # Padding is masked here, and not in the network.
        found = self.encoder.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([found[layer][0] for layer in LAYERS], dim=-1)  # (L, 3 D)


class Flux2Transformer(FlowTransformer):
    """The network; see `Network`. A latent pixel is a 2 x 2 patch of the autoencoder's latents."""

    def own_sigmas(self, steps: int) -> Any:
        """Return linear levels, unless the scheduler is told to make its own."""
        return None if self._scheduler_config.get("use_flow_sigmas") else super().own_sigmas(steps)

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return the mu that was fitted to the number of latent pixels and steps."""
        return compute_empirical_mu(latent_shape[1] * latent_shape[2], steps)

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision, timesteps of 0 to 1000; see `Network`."""
        dtype, hidden = self.dtype, embeds.tensors["hidden"]
        # The pipeline rounds the timestep to the precision of the latents, and then divides it.
        timesteps = torch.full((len(latents),), timestep, device=latents.device).to(dtype) / 1000
        flow: Tensor = self.module(
            hidden_states=latents.flatten(2).transpose(1, 2).to(dtype),  # (B, h w, C)
            encoder_hidden_states=hidden,
            timestep=timesteps,
            txt_ids=_places(1, 1, hidden.shape[1], latents.device),
            img_ids=_places(latents.shape[2], latents.shape[3], 1, latents.device),
            return_dict=False,
        )[0]
        return flow.transpose(1, 2).reshape(latents.shape).to(latents.dtype)


def _places(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Return the place (time, row, column, number of the token) of every token, (N, 4)."""
    axes = [torch.arange(size, device=device) for size in (1, height, width, length)]
    return torch.cartesian_prod(*axes)


class Flux2Decoder(VaeDecoder):
    """The decoder; see `Decoder`."""

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """Undo the batch normalisation and the patches: (B, 4 C, h, w) -> (B, C, 2 h, 2 w)."""
        # The statistics in their own precision, as the pipeline takes them.
        norm = self.module.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(latents.dtype)
        deviation = torch.sqrt(
            norm.running_var.view(1, -1, 1, 1) + self.module.config.batch_norm_eps
        )
        return self.to_tiny(latents * deviation.to(latents.dtype) + mean)

    def to_tiny(self, latents: Tensor) -> Tensor:
        """Undo the patches alone: (B, 4 C, h, w) -> (B, C, 2 h, 2 w); differentiable."""
        # Channels c, 2 x 2 patches: (B, c 2 2, h, w) -> (B, c, h 2, w 2).
        patches = latents.unflatten(1, (-1, 2, 2))
        return patches.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def load_text_encoders(source: Source, device: torch.device) -> Flux2Text:
    """Load the tokenizer and the text encoder, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class, or its embeddings are not what the network
            reads.
    """
    components.check(source.path, _RULES)
    encoder = components.load_network(source, "text_encoder", Qwen3ForCausalLM)
    tokenizer = components.load_tokenizer(
        source, "tokenizer", Qwen2TokenizerFast, encoder.config.vocab_size
    )
    with loading.explained(source.config, source.path):
        if encoder.config.num_hidden_layers < LAYERS[-1]:
            layers = encoder.config.num_hidden_layers
            raise ValueError(f"the text encoder has {layers} layers, {LAYERS[-1]} are read")
        made = Flux2Text(tokenizer, encoder.to(device))
        # What is wrong with them shows in the first use.
        check_widths(made.encode([""])[0], source, hidden="joint_attention_dim")
    return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class or has a setting that is not obeyed, or if
            network and autoencoder do not fit each other.
    """
    components.check(source.path, _RULES)
    network = components.load_network(source, "transformer", Flux2Transformer2DModel)
    vae = components.load_network(source, "vae", AutoencoderKLFlux2)
    return _parts(network.to(device), vae.to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from the configurations in a folder; weights and tokenizers are not read.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    components.check(source.path, _RULES)
    network = components.network_on_meta(source, "transformer", Flux2Transformer2DModel)
    vae = components.network_on_meta(source, "vae", AutoencoderKLFlux2)
    made = _parts(network, vae, source)
    embeds = meta_embeds(source, hidden=(LENGTH, network.config.joint_attention_dim))
    return MetaModel(made, Conditioning(embeds, embeds), made.network.sizes.image_size)


def _parts(network: Any, vae: Any, source: Source) -> Parts:
    """Return the network and the decoder, which must fit each other."""
    channels, packed = network.config.in_channels, 4 * vae.config.latent_channels
    out = network.config.out_channels or channels
    if not channels == out == packed:
        raise ConfigError(
            f"model.id: the network of {source.config.id} takes {channels} channels and gives "
            f"{out}, its latents have {packed}: inpainting models cannot be trained"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    # The pipeline's default is 128 of the autoencoder's latents, whatever the network's size.
    sizes = Sizes(channels, per_latent=2 * factor, unit=2 * factor, default=128 * factor)
    scheduler = components.load_config(source, "scheduler", SCHEDULER.file)
    return Parts(
        network=Flux2Transformer(network, scheduler, sizes, source.config.id),
        decoder=Flux2Decoder(vae, factor, source.config.vae_tile_size, source.config.id),
    )
