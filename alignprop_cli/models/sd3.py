"""Stable Diffusion 3 and 3.5: three text encoders, a transformer, a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models import components, loading
from alignprop_cli.models.base import MetaModel, Parts, Source, meta_embeds
from alignprop_cli.models.components import PartRules, check_widths
from alignprop_cli.models.flow import SCHEDULER, FlowTransformer, Sizes
from alignprop_cli.models.padding import CountedPadding
from alignprop_cli.models.rules import NOTHING, SIZE, either, list_of, number, one_of
from alignprop_cli.models.unet import VaeDecoder
from alignprop_cli.prompts import for_tokenizer

T5_LENGTH = 256
"""Tokens of T5 that the pipeline conditions on by default."""

VAE = PartRules(
    ("AutoencoderKL",),
    {
        "_class_name": one_of("AutoencoderKL"),
        "latent_channels": SIZE,
        "block_out_channels": list_of(SIZE),
        "scaling_factor": number(0.0, float("inf")),
        "shift_factor": number(-float("inf"), float("inf")),
        # Statistics by channel would be one more step that the pipeline does not take.
        "latents_mean": NOTHING,
        "latents_std": NOTHING,
    },
)
"""The autoencoder of `ShiftedDecoder`."""

_CLIP = PartRules(("CLIPTextModelWithProjection",), {"hidden_size": SIZE, "projection_dim": SIZE})
_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast")
_RULES = {
    "scheduler": SCHEDULER,
    "transformer": PartRules(
        ("SD3Transformer2DModel",),
        {
            "_class_name": one_of("SD3Transformer2DModel"),
            "sample_size": SIZE,
            "patch_size": SIZE,
            "in_channels": SIZE,
            "out_channels": either(SIZE, NOTHING),
            "joint_attention_dim": SIZE,
            "pooled_projection_dim": SIZE,
            "pos_embed_max_size": SIZE,
        },
    ),
    "vae": VAE,
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "text_encoder_3": PartRules(("T5EncoderModel",), {"d_model": SIZE}),
    "tokenizer": PartRules(_WORDS, file="tokenizer_config.json"),
    "tokenizer_2": PartRules(_WORDS, file="tokenizer_config.json"),
    "tokenizer_3": PartRules(("T5TokenizerFast", "T5Tokenizer"), file="tokenizer_config.json"),
}


class Sd3Text:
    """Two CLIP text encoders and T5; see `TextEncoders`.

    Args:
        clips: (tokenizer, encoder) of CLIP-L and of CLIP bigG.
        t5: (tokenizer, encoder) of T5; None conditions on zeros instead, as the pipeline does.
        width: Width of the embeddings that the network attends to.
        zeros: How many tokens of zeros stand in for T5.
    """

    def __init__(
        self,
        clips: Sequence[tuple[Any, Any]],
        t5: tuple[Any, Any] | None,
        width: int,
        zeros: int = T5_LENGTH,
    ) -> None:
        self.clips, self.t5, self.width, self.zeros = clips, t5, width, zeros
        # The pipeline cuts for both where the first tokenizer says.
        self.length: int = clips[0][0].model_max_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself; see `TextEncoders`."""
        return [self._encode(for_tokenizer(prompt)) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether no encoder reads a prompt to its end."""
        tokenizer, length = (
            (self.clips[0][0], self.length) if self.t5 is None else (self.t5[0], T5_LENGTH)
        )
        return len(tokenizer(for_tokenizer(prompt)).input_ids) > length

    def _encode(self, prompt: str) -> Embeds:
        # 1. CLIP: the last hidden states but one, side by side, and the pooled ones.
        found = [
            encoder(padded_tokens(words, prompt, self.length, encoder), output_hidden_states=True)
            for words, encoder in self.clips
        ]
        clip = torch.cat([f.hidden_states[-2][0] for f in found], dim=-1)  # (L, D)
        pooled = torch.cat([f.text_embeds[0] for f in found], dim=-1)
        # 2. T5, to the full width; no mask, since the network attends to the padding too.
        if self.t5 is None:
            t5 = clip.new_zeros(self.zeros, self.width)
        else:
            words, encoder = self.t5
            t5 = encoder(padded_tokens(words, prompt, T5_LENGTH, encoder))[0][0]
        # 3. One after the other, CLIP's filled up with zeros.
        clip = torch.nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        return Embeds({"hidden": torch.cat([clip, t5.to(clip.dtype)]), "pooled": pooled})


def padded_tokens(tokenizer: Any, prompt: str, length: int, encoder: Any) -> Tensor:
    """Return the tokens of a prompt, (1, length), cut and padded, on the encoder's device."""
    tokens = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(encoder.device)


def linear_shift(
    scheduler_config: Mapping[str, Any],
    latent_shape: tuple[int, int, int],
    patch: int,
    *,
    largest: float = 1.15,
) -> float:
    """Return mu of a dynamic shift, linear in the number of patches.

    Args:
        scheduler_config: The configuration of the model's scheduler.
        latent_shape: (C, h, w).
        patch: Latents in a row of a patch.
        largest: mu of 1024 x 1024 pixels where the configuration does not say it.
    """
    return calculate_shift(
        (latent_shape[1] // patch) * (latent_shape[2] // patch),
        scheduler_config.get("base_image_seq_len", 256),
        scheduler_config.get("max_image_seq_len", 4096),
        scheduler_config.get("base_shift", 0.5),
        scheduler_config.get("max_shift", largest),
    )


class Sd3Transformer(FlowTransformer):
    """The network; see `Network`."""

    def own_sigmas(self, steps: int) -> Any:
        """Return None: the scheduler makes the levels."""
        # Of a list that is shifted already, which it shifts again. So the last step is tiny: 0.9 %
        # of the path with 28 steps.
        return None

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return mu by the number of patches; None where the shift is static."""
        config, patch = self._scheduler_config, self.module.config.patch_size
        if not config.get("use_dynamic_shifting"):
            return None
        return linear_shift(config, latent_shape, patch, largest=1.16)

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision, timesteps of 0 to 1000; see `Network`."""
        # The pipeline keeps the timestep in float32 whatever the precision of the network.
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        flow: Tensor = self.module(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=embeds.tensors["hidden"],
            pooled_projections=embeds.tensors["pooled"],
            return_dict=False,
        )[0]
        return flow.to(latents.dtype)


class ShiftedDecoder(VaeDecoder):
    """The decoder of latents that are scaled and shifted; see `Decoder`."""

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """Return latents / scaling_factor + shift_factor; differentiable."""
        config = self.module.config
        return latents / config.scaling_factor + config.shift_factor


def shifted_decoder(vae: Any, source: Source) -> ShiftedDecoder:
    """Return the decoder of an autoencoder.

    Raises:
        ConfigError: If its configuration has no shift.
    """
    if vae.config.shift_factor is None:
        raise ConfigError(
            f"model.id: {source.path}: vae: shift_factor: expected a number, got null"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return ShiftedDecoder(vae, factor, source.config.vae_tile_size, source.config.id)


def load_text_encoders(source: Source, device: torch.device) -> Sd3Text:
    """Load the tokenizers and text encoders, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class or has a setting that is not obeyed.
    """
    components.check(source.path, _RULES)
    clips: list[tuple[Any, Any]] = []
    for which in ("", "_2"):
        encoder = components.load_network(
            source, f"text_encoder{which}", CLIPTextModelWithProjection
        )
        rows = encoder.config.vocab_size
        words = components.load_tokenizer(source, f"tokenizer{which}", CLIPTokenizer, rows)
        clips.append((words, encoder.to(device)))
    t5 = None
    if _has_t5(source):
        hint = "model.t5: none samples without it, as diffusers does for such a model"
        encoder = components.load_network(source, "text_encoder_3", T5EncoderModel, hint=hint)
        rows = encoder.config.vocab_size
        words = components.load_tokenizer(source, "tokenizer_3", T5TokenizerFast, rows)
        t5 = words, encoder.to(device)
    network = components.load_config(source, "transformer")
    with loading.explained(source.config, source.path):
        width = network.get("joint_attention_dim", 4096)
        made = Sd3Text(clips, t5, width, 1 if _counts_padding(source, network) else T5_LENGTH)
        # What is wrong with them shows in the first use.
        found = made.encode([""])[0]
        check_widths(found, source, hidden="joint_attention_dim", pooled="pooled_projection_dim")
        return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If the network needs more input than latents (inpainting, ControlNet), or a
            part is of another class or has a setting that is not obeyed.
    """
    components.check(source.path, _RULES)
    network = components.load_network(source, "transformer", SD3Transformer2DModel)
    vae = components.load_network(source, "vae", AutoencoderKL)
    return _parts(network.to(device), vae.to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from the configurations in a folder; weights and tokenizers are not read.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    components.check(source.path, _RULES)
    network = components.network_on_meta(source, "transformer", SD3Transformer2DModel)
    vae = components.network_on_meta(source, "vae", AutoencoderKL)
    made = _parts(network, vae, source)
    clip = components.read_object(source.path / "text_encoder" / "config.json") or {}
    padding = 1 if _counts_padding(source, network.config) else T5_LENGTH
    length, config = clip.get("max_position_embeddings", 77) + padding, network.config
    embeds = meta_embeds(
        source,
        hidden=(length, config.joint_attention_dim),
        pooled=(config.pooled_projection_dim,),
    )
    return MetaModel(made, Conditioning(embeds, embeds), made.network.sizes.image_size)


def _has_t5(source: Source) -> bool:
    """Return whether T5 is among the text encoders."""
    return source.config.t5 == "model" and components.has_part(source.path, "text_encoder_3")


def _counts_padding(source: Source, config: Mapping[str, Any]) -> bool:
    """Return whether one token stands for the zeros in the place of T5, by the network's config."""
    # Only where most tokens are zeros. Counting needs a mask, without which attention on a GPU is
    # faster, and at the published sizes the zeros are a sixteenth of the tokens.
    patches = (config.get("sample_size", 128) // config.get("patch_size", 2)) ** 2
    return not _has_t5(source) and patches < T5_LENGTH


def _parts(network: Any, vae: Any, source: Source) -> Parts:
    """Return the network and the decoder, which must fit each other."""
    config, model_id = network.config, source.config.id
    if config.in_channels != vae.config.latent_channels:
        raise ConfigError(
            f"model.id: the network of {model_id} takes {config.in_channels} channels, its latents "
            f"have {vae.config.latent_channels}: inpainting models cannot be trained"
        )
    if (config.out_channels or config.in_channels) != config.in_channels:
        raise ConfigError(
            f"model.id: the network of {model_id} gives {config.out_channels} channels for "
            f"{config.in_channels}"
        )
    if _counts_padding(source, config):
        network.set_attn_processor(CountedPadding(T5_LENGTH))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    unit = factor * config.patch_size
    sizes = Sizes(
        channels=config.in_channels,
        per_latent=factor,
        unit=unit,
        default=config.sample_size * factor,
        most=config.pos_embed_max_size * unit,
    )
    return Parts(
        network=Sd3Transformer(
            network, components.load_config(source, "scheduler", SCHEDULER.file), sizes, model_id
        ),
        decoder=shifted_decoder(vae, source),
    )
