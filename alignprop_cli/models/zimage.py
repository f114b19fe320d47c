"""Z-Image and Z-Image-Turbo: Qwen3, a transformer that reads lists, a rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Model

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Embeds
from alignprop_cli.models import components, loading
from alignprop_cli.models.base import MetaModel, Parts, Source
from alignprop_cli.models.components import PartRules, check_widths
from alignprop_cli.models.flow import SCHEDULER, FlowTransformer, Sizes, refuse_float16
from alignprop_cli.models.qwen import LENGTH, QwenText, longest_prompt
from alignprop_cli.models.rules import NOTHING, SIZE, Rule, list_of, number, one_of
from alignprop_cli.models.sd3 import VAE, linear_shift, shifted_decoder

PIXELS = 1024
"""Height and width of the pipeline's images where none is asked for."""

# Latents in a row of a patch. The pipeline never asks for another size.
_PATCH = 2

# Of the text and the image after it, of the image's rows, of its columns.
_THREE: Rule = (lambda value: list_of(SIZE)[0](value) and len(value) == 3, "three whole numbers")

_RULES = {
    "scheduler": SCHEDULER,
    "transformer": PartRules(
        ("ZImageTransformer2DModel",),
        {
            "_class_name": one_of("ZImageTransformer2DModel"),
            "all_patch_size": one_of([_PATCH]),
            "all_f_patch_size": one_of([1]),
            "in_channels": SIZE,
            "dim": SIZE,
            "n_layers": SIZE,
            "n_refiner_layers": SIZE,
            "n_heads": SIZE,
            "cap_feat_dim": SIZE,
            # The network of the Omni pipeline, which reads images beside the prompt.
            "siglip_feat_dim": NOTHING,
            "t_scale": number(0.0, float("inf")),
            "rope_theta": number(0.0, float("inf")),
            "axes_dims": _THREE,
            "axes_lens": _THREE,
        },
    ),
    "vae": VAE,
    "text_encoder": PartRules(("Qwen3Model", "Qwen3ForCausalLM"), {"hidden_size": SIZE}),
    "tokenizer": PartRules(("Qwen2TokenizerFast", "Qwen2Tokenizer"), file="tokenizer_config.json"),
}


class ZImageText(QwenText):
    """Qwen3 without its language head, read before its last layer; see `TextEncoders`."""

    thinking = True

    def _encode(self, prompt: str) -> Tensor:
        # The padding is dropped again; with it the rounding in bfloat16 is that of the pipeline.
        tokens = self._tokens(prompt)
        is_token = tokens.attention_mask.bool()
        found = self.encoder(
            input_ids=tokens.input_ids,
            attention_mask=is_token,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return found[-2][is_token]  # (n, D), as long as the prompt is


class ZImageTransformer(FlowTransformer):
    """The network; see `Network`."""

    def own_sigmas(self, steps: int) -> Any:
        """Return linear levels, rounded as the pipeline rounds them."""
        return get_default_z_image_sigmas(steps)

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return mu by the number of patches; None where the shift is static, as published."""
        if not self._scheduler_config.get("use_dynamic_shifting"):
            return None
        return linear_shift(self._scheduler_config, latent_shape, _PATCH)

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision, timesteps of 0 to 1000; see `Network`."""
        # 1. Lists, since the network takes texts of different length: one image and one text a row.
        images = list(latents.to(self.dtype).unsqueeze(2).unbind())  # each (C, 1, h, w)
        lengths: list[int] = embeds.tensors["length"].tolist()
        rows = zip(embeds.tensors["hidden"], lengths, strict=True)
        texts = [hidden[:length] for hidden, length in rows]  # each (n, D)
        # 2. Its time runs from noise to image, so time and flow are turned round. The pipeline
        #    keeps the time in float32 whatever the precision of the network.
        times = (1000 - torch.full((len(latents),), timestep, device=latents.device)) / 1000
        flows: list[Tensor] = self.module(images, times, texts, return_dict=False)[0]
        return -torch.stack(flows).squeeze(2).to(latents.dtype)


def load_text_encoders(source: Source, device: torch.device) -> ZImageText:
    """Load the tokenizer and the text encoder, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class, its embeddings are not what the network reads,
            or the precision is float16.
    """
    _check(source)
    encoder = components.load_network(source, "text_encoder", Qwen3Model)
    tokenizer = components.load_tokenizer(
        source, "tokenizer", Qwen2TokenizerFast, encoder.config.vocab_size
    )
    with loading.explained(source.config, source.path):
        made = ZImageText(tokenizer, encoder.to(device))
        # What is wrong with them shows in the first use.
        check_widths(made.encode([""])[0], source, hidden="cap_feat_dim")
    return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class or has a setting that is not obeyed, if network
            and autoencoder do not fit each other, or if the precision is float16.
    """
    _check(source)
    network = components.load_network(source, "transformer", ZImageTransformer2DModel)
    vae = components.load_network(source, "vae", AutoencoderKL)
    return _parts(network.to(device), vae.to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from the configurations in a folder; weights and tokenizers are not read.

    The prompt is as long as any can be, so most steps need less than a plan for it.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    _check(source)
    network = components.network_on_meta(source, "transformer", ZImageTransformer2DModel)
    vae = components.network_on_meta(source, "vae", AutoencoderKL)
    made = _parts(network, vae, source)
    prompt = longest_prompt(source, network.config.cap_feat_dim)
    return MetaModel(made, prompt, made.network.sizes.image_size)


def _check(source: Source) -> None:
    """Refuse configurations that are not obeyed, and float16."""
    refuse_float16(source)
    components.check(source.path, _RULES)
    values = components.read_object(source.path / "transformer" / "config.json") or {}
    dim, heads, axes = (values.get(key) for key in ("dim", "n_heads", "axes_dims"))
    if dim and heads and axes and heads * sum(axes) != dim:
        raise ConfigError(
            f"model.id: {source.path}: transformer: axes_dims: expected numbers that add up to "
            f"dim / n_heads = {dim} / {heads}, got {axes}"
        )


def _parts(network: Any, vae: Any, source: Source) -> Parts:
    """Return the network and the decoder, which must fit each other."""
    config, model_id = network.config, source.config.id
    if config.in_channels != vae.config.latent_channels:
        raise ConfigError(
            f"model.id: the network of {model_id} takes {config.in_channels} channels, its latents "
            f"have {vae.config.latent_channels}: inpainting models cannot be trained"
        )
    decoder = shifted_decoder(vae, source)
    # Text has positions from 1 on, and the image the one after the longest text.
    texts, *sides = config.axes_lens
    if texts < LENGTH + 2:
        raise ConfigError(
            f"model.id: {source.path}: transformer: axes_lens: expected at least {LENGTH + 2} "
            f"positions for texts, got {texts}"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    unit = _PATCH * factor
    sizes = Sizes(
        channels=config.in_channels,
        per_latent=factor,
        unit=unit,
        default=PIXELS,
        most=min(sides) * unit,
    )
    scheduler = components.load_config(source, "scheduler", SCHEDULER.file)
    return Parts(ZImageTransformer(network, scheduler, sizes, model_id), decoder)
