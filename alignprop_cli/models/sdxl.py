"""Stable Diffusion XL, and everything else in the StableDiffusionXLPipeline format.

Network and decoder are those of Stable Diffusion; the network is told a pooled embedding of the
prompt and the size of the image besides. Source: Podell et al. 2023, arXiv:2307.01952, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models import configs, loading, parts
from alignprop_cli.models.base import MetaModel, Parts, Source, meta_embeds
from alignprop_cli.models.configs import STABLE_DIFFUSION
from alignprop_cli.models.unet import UNet, check_tokenizer, make_parts, token_ids
from alignprop_cli.prompts import for_tokenizer

_SUFFIXES = ("", "_2")

# Of these numbers the network is told: the original height and width of the image, the upper left
# corner of the part that is seen, the height and width of that part.
_TIME_IDS = 6

# The schedulers that clip latents where their configuration says so, as this pipeline lets them.
_CLIPPING = {"DDIMScheduler", "DDPMScheduler", "LCMScheduler"}


def _check_together(folder: Path, found: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse parts that do not fit each other."""
    for suffix in _SUFFIXES:
        configs.check_words(folder, found, suffix)
    # 1. The network attends to the embeddings of both encoders, one beside the other.
    place, network = str(folder / "unet" / "config.json"), found["unet"] or {}
    texts = [found[f"text_encoder{suffix}"] or {} for suffix in _SUFFIXES]
    widths, wanted = [text.get("hidden_size") for text in texts], network.get("cross_attention_dim")
    if None not in widths and wanted not in (None, sum(widths)):
        raise ConfigError(
            f"model.id: {place}: cross_attention_dim: the network reads text embeddings of width "
            f"{wanted}, the two text encoders' have {widths[0]} + {widths[1]}"
        )
    # 2. It is told the pooled embedding of the second one, and the sizes.
    pooled: Any = texts[1].get("projection_dim")
    told: Any = network.get("addition_time_embed_dim")
    if network and network.get("addition_embed_type") != "text_time":
        value = network.get("addition_embed_type")
        raise configs.wrong(place, "addition_embed_type", "text_time", value)
    if network and not isinstance(told, int):
        raise configs.wrong(place, "addition_time_embed_dim", "a whole number", told)
    expected = network.get("projection_class_embeddings_input_dim")
    if network and pooled is not None and expected != _TIME_IDS * told + pooled:
        raise configs.wrong(
            place,
            "projection_class_embeddings_input_dim",
            f"{_TIME_IDS} x {told} + {pooled}, the projection_dim of the second text encoder",
            expected,
        )
    # 3. Stable Diffusion's own pipeline never clips latents; this one would.
    scheduler = found["scheduler"] or {}
    if scheduler.get("clip_sample") and scheduler.get("_class_name") in _CLIPPING:
        place = str(folder / "scheduler" / "scheduler_config.json")
        raise configs.wrong(place, "clip_sample", "false, as latents are no pixels", True)


_SECOND = {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}

LAYOUT = configs.Layout(
    files={
        **STABLE_DIFFUSION.files,
        **{
            second: STABLE_DIFFUSION.files[first].replace(first, second, 1)
            for first, second in _SECOND.items()
        },
    },
    classes={
        **STABLE_DIFFUSION.classes,
        "text_encoder_2": {"CLIPTextModelWithProjection"},
        "tokenizer_2": STABLE_DIFFUSION.classes["tokenizer"],
    },
    not_obeyed={
        **STABLE_DIFFUSION.not_obeyed,
        "unet": {
            key: what
            for key, what in STABLE_DIFFUSION.not_obeyed["unet"].items()
            if key != "addition_embed_type"
        },
        "text_encoder_2": STABLE_DIFFUSION.not_obeyed["text_encoder"],
    },
    rules={
        **STABLE_DIFFUSION.rules,
        **{second: STABLE_DIFFUSION.rules[first] for first, second in _SECOND.items()},
    },
    check_together=_check_together,
    needed=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
)
"""What StableDiffusionXLPipeline is made of."""

KIND = parts.Kind(
    pipeline=StableDiffusionXLPipeline,
    layout=LAYOUT,
    networks={
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    },
    others=("tokenizer", "tokenizer_2", "scheduler"),
    absent={"feature_extractor": None, "add_watermarker": False},
    # Published autoencoders overflow in float16 (`force_upcast`).
    in_float32=("vae",),
)
"""How pipelines of this kind are loaded."""


class TwoClipTexts:
    """Both text encoders; see `TextEncoders`.

    An empty prompt is zeros where the model was trained so (`force_zeros_for_empty_prompt`). Only
    the unconditional branch has one: sets of prompts have no empty ones.

    Args:
        tokenizers: One of each encoder.
        encoders: Their hidden states before the last, beside each other, condition the network, and
            the projected embedding of the second.
        zeros_for_empty: Whether an empty prompt is zeros.
    """

    def __init__(
        self, tokenizers: Sequence[Any], encoders: Sequence[Any], zeros_for_empty: bool
    ) -> None:
        self.tokenizers = tokenizers
        self.encoders = [encoder.eval().requires_grad_(False) for encoder in encoders]
        self._zeros_for_empty = zeros_for_empty

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself; see `TextEncoders`."""
        return [self._encode(prompt) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether an encoder does not read a prompt to its end."""
        return any(
            len(tokenizer(for_tokenizer(prompt)).input_ids) > tokenizer.model_max_length
            for tokenizer in self.tokenizers
        )

    def _encode(self, prompt: str) -> Embeds:
        outputs = [
            encoder(token_ids(tokenizer, prompt).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2][0] for output in outputs], dim=-1)
        tensors = {"hidden": hidden, "pooled": outputs[-1].text_embeds[0]}  # (L, D), (P,)
        if not prompt and self._zeros_for_empty:
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        return Embeds(tensors)


class XlUNet(UNet):
    """The network; see `Network`."""

    _time_ids: Tensor | None = None

    def _added(self, latents: Tensor, embeds: Embeds) -> dict[str, Tensor]:
        """Return the pooled embedding and the sizes: an image of this size, seen as a whole."""
        pooled, kept = embeds.tensors["pooled"], self._time_ids
        height, width = (self._factor * size for size in latents.shape[2:])
        sizes = [height, width, 0, 0, height, width]
        # Kept for the next call, as the size is mostly the same: copying it waits for a GPU.
        if kept is None or self._told != (sizes, pooled.device, pooled.dtype):
            kept = self._time_ids = pooled.new_tensor(sizes)
            self._told = (sizes, pooled.device, pooled.dtype)
        return {"text_embeds": pooled, "time_ids": kept.expand(len(latents), _TIME_IDS)}


def load_text_encoders(source: Source, device: torch.device) -> TwoClipTexts:
    """Load tokenizers and text encoders, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a setting is wrong or not obeyed, as `configs.check`.
    """
    names = [f"{part}{suffix}" for part in ("tokenizer", "text_encoder") for suffix in _SUFFIXES]
    pipeline = parts.load(KIND, source, *names).to(device)
    made = TwoClipTexts(
        [pipeline.tokenizer, pipeline.tokenizer_2],
        [pipeline.text_encoder, pipeline.text_encoder_2],
        bool(pipeline.config.force_zeros_for_empty_prompt),
    )
    with loading.explained(source.config, source.path):
        for tokenizer, encoder in zip(made.tokenizers, made.encoders, strict=True):
            check_tokenizer(tokenizer, encoder)
        # What is wrong with them shows in the first use.
        made._encode("a")
    return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError, ConfigError: As `unet.load_parts`.
    """
    pipeline = parts.load(KIND, source, "unet", "vae", "scheduler")
    return _made(pipeline.to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from a folder with unet/, vae/, both text encoders' and scheduler/.

    Args:
        source: Its path is that folder; weights and tokenizers are not read.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    kinds = {f"text_encoder{suffix}": CLIPTextConfig for suffix in _SUFFIXES}
    pipeline, texts = parts.on_meta(KIND, source, kinds)
    first, second = (texts[name] for name in kinds)
    width = first.hidden_size + second.hidden_size
    embeds = meta_embeds(
        source,
        hidden=(first.max_position_embeddings, width),
        pooled=(second.projection_dim,),
    )
    factor = pipeline.vae_scale_factor
    return MetaModel(
        parts=_made(pipeline, source),
        conditioning=Conditioning(embeds, embeds),
        image_size=lambda latent_shape: (latent_shape[1] * factor, latent_shape[2] * factor),
    )


def _made(pipeline: Any, source: Source) -> Parts:
    """Return the network and the decoder of a pipeline."""
    # An autoencoder that was made for float16 says so.
    if not pipeline.vae.config.force_upcast:
        torch.nn.Module.to(pipeline.vae, source.dtype)
    return make_parts(pipeline, source, KIND, XlUNet)
