"""FLUX.1: CLIP and T5, a transformer of dual and single blocks, a rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models import components, loading
from alignprop_cli.models.base import MetaModel, Parts, Source, meta_embeds
from alignprop_cli.models.components import PartRules, check_widths
from alignprop_cli.models.flow import SCHEDULER, FlowTransformer, Sizes, packed, unpacked
from alignprop_cli.models.rules import NOTHING, SIZE, either, one_of
from alignprop_cli.models.sd3 import VAE, linear_shift, padded_tokens, shifted_decoder
from alignprop_cli.prompts import for_tokenizer

LENGTH = 512
"""Tokens of T5 that the pipeline conditions on by default, of every model of the family."""

_RULES = {
    "scheduler": SCHEDULER,
    "transformer": PartRules(
        ("FluxTransformer2DModel",),
        {
            "_class_name": one_of("FluxTransformer2DModel"),
            "in_channels": SIZE,
            "out_channels": either(SIZE, NOTHING),
            # Latents are packed before the network, so it has no patches of its own.
            "patch_size": one_of(1),
            "joint_attention_dim": SIZE,
            "pooled_projection_dim": SIZE,
            "guidance_embeds": one_of(True, False),
        },
    ),
    "vae": VAE,
    "text_encoder": PartRules(("CLIPTextModel",), {"hidden_size": SIZE}),
    "text_encoder_2": PartRules(("T5EncoderModel",), {"d_model": SIZE}),
    "tokenizer": PartRules(("CLIPTokenizer", "CLIPTokenizerFast"), file="tokenizer_config.json"),
    "tokenizer_2": PartRules(("T5TokenizerFast", "T5Tokenizer"), file="tokenizer_config.json"),
}


class Flux1Text:
    """CLIP, of which one vector a prompt is read, and T5; see `TextEncoders`.

    Args:
        clip: (tokenizer, encoder) of CLIP.
        t5: (tokenizer, encoder) of T5.
    """

    def __init__(self, clip: tuple[Any, Any], t5: tuple[Any, Any]) -> None:
        self.clip, self.t5 = clip, t5

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself; see `TextEncoders`."""
        return [self._encode(for_tokenizer(prompt)) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether no encoder reads a prompt to its end."""
        return len(self.t5[0](for_tokenizer(prompt)).input_ids) > LENGTH

    def _encode(self, prompt: str) -> Embeds:
        words, encoder = self.clip
        pooled = encoder(padded_tokens(words, prompt, words.model_max_length, encoder))
        # No mask, since the network attends to the padding too.
        words, t5 = self.t5
        hidden = t5(padded_tokens(words, prompt, LENGTH, t5))[0][0]  # (L, D)
        return Embeds({"hidden": hidden.to(t5.dtype), "pooled": pooled.pooler_output[0]})


class Flux1Transformer(FlowTransformer):
    """The network; see `Network`. It reads 2 x 2 patches of the latents as tokens."""

    def __init__(self, module: Any, *arguments: Any) -> None:
        super().__init__(module, *arguments)
        # dev and its kin; schnell was distilled into few steps without guidance.
        self.embeds_guidance: bool = module.config.guidance_embeds

    def own_sigmas(self, steps: int) -> Any:
        """Return linear levels, unless the scheduler is told to make its own."""
        return None if self._scheduler_config.get("use_flow_sigmas") else super().own_sigmas(steps)

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return mu, linear in the number of tokens; a static shift does not use it."""
        return linear_shift(self._scheduler_config, latent_shape, 2)

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision, timesteps of 0 to 1000; see `Network`."""
        dtype, hidden = self.dtype, embeds.tensors["hidden"]
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        # The pipeline rounds the timestep to the precision of the latents, and then divides it.
        timesteps = torch.full((len(latents),), timestep, device=latents.device).to(dtype) / 1000
        flow: Tensor = self.module(
            hidden_states=packed(latents).to(dtype),
            timestep=timesteps,
            guidance=embeds.tensors.get("guidance"),
            encoder_hidden_states=hidden,
            pooled_projections=embeds.tensors["pooled"],
            txt_ids=torch.zeros(hidden.shape[1], 3, device=latents.device),
            img_ids=_places(height, width, latents.device),
            return_dict=False,
        )[0]
        return unpacked(flow, height, width).to(latents.dtype)


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Return the place (0, row, column) of every token, (N, 3)."""
    axes = [torch.arange(size, device=device) for size in (1, height, width)]
    return torch.cartesian_prod(*axes)


def load_text_encoders(source: Source, device: torch.device) -> Flux1Text:
    """Load the tokenizers and text encoders, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class or has a setting that is not obeyed.
    """
    components.check(source.path, _RULES)
    pairs: list[tuple[Any, Any]] = []
    for which, kind, words in (
        ("", CLIPTextModel, CLIPTokenizer),
        ("_2", T5EncoderModel, T5TokenizerFast),
    ):
        encoder = components.load_network(source, f"text_encoder{which}", kind)
        rows = encoder.config.vocab_size
        tokenizer = components.load_tokenizer(source, f"tokenizer{which}", words, rows)
        pairs.append((tokenizer, encoder.to(device)))
    with loading.explained(source.config, source.path):
        made = Flux1Text(*pairs)
        # What is wrong with them shows in the first use.
        found = made.encode([""])[0]
        check_widths(found, source, hidden="joint_attention_dim", pooled="pooled_projection_dim")
        return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If the network needs more input than latents (Fill, Control), or a part is of
            another class or has a setting that is not obeyed.
    """
    components.check(source.path, _RULES)
    network = components.load_network(source, "transformer", FluxTransformer2DModel)
    vae = components.load_network(source, "vae", AutoencoderKL)
    return _parts(network.to(device), vae.to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from the configurations in a folder; weights and tokenizers are not read.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    components.check(source.path, _RULES)
    network = components.network_on_meta(source, "transformer", FluxTransformer2DModel)
    vae = components.network_on_meta(source, "vae", AutoencoderKL)
    made = _parts(network, vae, source)
    embeds = meta_embeds(
        source,
        hidden=(LENGTH, network.config.joint_attention_dim),
        pooled=(network.config.pooled_projection_dim,),
    )
    return MetaModel(made, Conditioning(embeds, embeds), made.network.sizes.image_size)


def _parts(network: Any, vae: Any, source: Source) -> Parts:
    """Return the network and the decoder, which must fit each other."""
    channels, packed = network.config.in_channels, 4 * vae.config.latent_channels
    out = network.config.out_channels or channels
    if not channels == out == packed:
        raise ConfigError(
            f"model.id: the network of {source.config.id} takes {channels} channels and gives "
            f"{out}, its packed latents have {packed}: Fill, Control and other inpainting models "
            "cannot be trained"
        )
    decoder = shifted_decoder(vae, source)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    # The pipeline's default is 128 latents in a row, whatever the network's size.
    sizes = Sizes(vae.config.latent_channels, factor, unit=2 * factor, default=128 * factor)
    scheduler = components.load_config(source, "scheduler", SCHEDULER.file)
    return Parts(Flux1Transformer(network, scheduler, sizes, source.config.id), decoder)
