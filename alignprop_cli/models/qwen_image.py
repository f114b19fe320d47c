"""Qwen-Image: Qwen2.5-VL's language model, a transformer of dual blocks, a rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Embeds
from alignprop_cli.models import components, loading
from alignprop_cli.models.base import MetaModel, Parts, Source
from alignprop_cli.models.components import PartRules, check_widths
from alignprop_cli.models.flow import (
    SCHEDULER,
    FlowTransformer,
    Sizes,
    packed,
    patches_of,
    refuse_float16,
    unpacked,
)
from alignprop_cli.models.qwen import LENGTH, longest_prompt, read_texts
from alignprop_cli.models.qwen_vae import VAE, check_vae, qwen_decoder
from alignprop_cli.models.rules import NOTHING, SIZE, either, list_of, one_of
from alignprop_cli.models.sd3 import linear_shift
from alignprop_cli.prompts import for_tokenizer

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What the prompt is put into, as in the pipeline."""

START = 34
"""Tokens of it before the prompt, which the network does not read."""

# Of rows and columns, which are counted from the middle of the image, and of the text behind them.
_POSITIONS = 4096

_RULES = {
    "scheduler": SCHEDULER,
    "transformer": PartRules(
        ("QwenImageTransformer2DModel",),
        {
            "_class_name": one_of("QwenImageTransformer2DModel"),
            "patch_size": one_of(2),
            "in_channels": SIZE,
            "out_channels": either(SIZE, NOTHING),
            "num_layers": SIZE,
            "attention_head_dim": SIZE,
            "num_attention_heads": SIZE,
            "joint_attention_dim": SIZE,
            "axes_dims_rope": list_of(SIZE),
            # The network has no input for it, whatever the configuration says.
            "guidance_embeds": one_of(False),
            # Those of the pipelines that edit images or draw layers.
            "zero_cond_t": one_of(False),
            "use_additional_t_cond": one_of(False),
            "use_layer3d_rope": one_of(False),
        },
    ),
    "vae": VAE,
    "text_encoder": PartRules(("Qwen2_5_VLForConditionalGeneration",)),
    "tokenizer": PartRules(("Qwen2TokenizerFast", "Qwen2Tokenizer"), file="tokenizer_config.json"),
}


class QwenImageText:
    """The language model of Qwen2.5-VL, read after its last layer; see `TextEncoders`.

    Args:
        tokenizer: Of Qwen2.
        encoder: The language model alone, without its head.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself and as long as it is; see `TextEncoders`."""
        return [Embeds({"hidden": self._encode(prompt)}) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether the network does not read a prompt to its end."""
        return len(self.tokenizer(_in_template(prompt)).input_ids) > START + LENGTH

    def _encode(self, prompt: str) -> Tensor:
        # The pipeline cuts later. No token sees those behind it, so the others are the same.
        tokens = self.tokenizer(
            _in_template(prompt), max_length=START + LENGTH, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        found = self.encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
        )
        return found.last_hidden_state[0, START:]  # (n, D), as long as the prompt is


def _in_template(prompt: str) -> str:
    return TEMPLATE.format(for_tokenizer(prompt))


class QwenImageTransformer(FlowTransformer):
    """The network; see `Network`. It reads 2 x 2 patches of the latents as tokens."""

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return mu, linear in the number of tokens; a static shift does not use it."""
        return linear_shift(self._scheduler_config, latent_shape, 2)

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision, timesteps of 0 to 1000; see `Network`."""
        dtype = self.dtype
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        # 1. As in the pipeline a mask leaves out what fills up the shorter texts.
        hidden, mask = read_texts(embeds)
        # 2. The pipeline rounds the timestep to the precision of the latents, and then divides it.
        timesteps = torch.full((len(latents),), timestep, device=latents.device).to(dtype) / 1000
        flow: Tensor = self.module(
            hidden_states=packed(latents).to(dtype),
            timestep=timesteps,
            encoder_hidden_states=hidden,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height, width)]] * len(latents),
            return_dict=False,
        )[0]
        return unpacked(flow, height, width).to(latents.dtype)


def rescale_to_text(guided: Tensor, text: Tensor) -> Tensor:
    """Give every token of the guided prediction the norm of the text branch's.

    Args:
        guided: Predictions with guidance, (B, C, h, w); a token is a 2 x 2 patch of them.
        text: Those of the text branch, same shape and dtype.

    Returns:
        guided x |text| / |guided|, same shape. Differentiable in both; NaN where a token of
        `guided` is zero, as in the pipeline.

    Source: QwenImagePipeline in diffusers.
    """
    tokens = patches_of(guided)  # (B, C, h / 2, 2, w / 2, 2)
    norms = [
        torch.linalg.vector_norm(one, dim=(1, 3, 5), keepdim=True)
        for one in (patches_of(text), tokens)
    ]
    return (tokens * (norms[0] / norms[1])).flatten(4, 5).flatten(2, 3)


def load_text_encoders(source: Source, device: torch.device) -> QwenImageText:
    """Load the tokenizer and the text encoder, of which the language model alone is kept.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class, its embeddings are not what the network reads,
            or the precision is float16.
    """
    _check(source)
    whole = components.load_network(source, "text_encoder", Qwen2_5_VLForConditionalGeneration)
    # Prompts are texts: what sees images stays where it is, and is dropped.
    encoder = whole.model.language_model
    tokenizer = components.load_tokenizer(
        source, "tokenizer", Qwen2TokenizerFast, encoder.config.vocab_size
    )
    with loading.explained(source.config, source.path):
        made = QwenImageText(tokenizer, encoder.to(device))
        # What is wrong with them shows in the first use.
        check_widths(made.encode([""])[0], source, hidden="joint_attention_dim")
    return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class or has a setting that is not obeyed, if network
            and autoencoder do not fit each other, or if the precision is float16.
    """
    _check(source)
    network = components.load_network(source, "transformer", QwenImageTransformer2DModel)
    vae = components.load_network(source, "vae", AutoencoderKLQwenImage)
    return _parts(network.to(device), vae.to(device), source)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from the configurations in a folder; weights and tokenizers are not read.

    The prompt is as long as any can be, so most steps need less than a plan for it.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    _check(source)
    network = components.network_on_meta(source, "transformer", QwenImageTransformer2DModel)
    vae = components.network_on_meta(source, "vae", AutoencoderKLQwenImage)
    made = _parts(network, vae, source)
    prompt = longest_prompt(source, network.config.joint_attention_dim)
    return MetaModel(made, prompt, made.network.sizes.image_size)


def _check(source: Source) -> None:
    """Refuse configurations that are not obeyed, and float16."""
    refuse_float16(source)
    components.check(source.path, _RULES)
    check_vae(source)
    values = components.read_object(source.path / "transformer" / "config.json") or {}
    head, axes = values.get("attention_head_dim", 128), values.get("axes_dims_rope", (16, 56, 56))
    if sum(axes) != head or len(axes) != 3 or any(size % 2 for size in axes):
        raise ConfigError(
            f"model.id: {source.path}: transformer: axes_dims_rope: expected three even numbers "
            f"that add up to attention_head_dim = {head}, got {axes}"
        )


def _parts(network: Any, vae: Any, source: Source) -> Parts:
    """Return the network and the decoder, which must fit each other."""
    channels, of_latents = network.config.in_channels, vae.config.z_dim
    out = 4 * (network.config.out_channels or channels)
    if not channels == out == 4 * of_latents:
        raise ConfigError(
            f"model.id: the network of {source.config.id} takes {channels} channels and gives "
            f"{out}, its packed latents have {4 * of_latents}: inpainting models cannot be trained"
        )
    decoder = qwen_decoder(vae, source)
    unit = 2 * decoder.factor
    # The pipeline's default is 128 latents in a row, whatever the network's size. Text begins at
    # the position behind half of the longer side.
    sizes = Sizes(
        channels=of_latents,
        per_latent=decoder.factor,
        unit=unit,
        default=128 * decoder.factor,
        most=2 * (_POSITIONS - LENGTH) * unit,
    )
    scheduler = components.load_config(source, "scheduler", SCHEDULER.file)
    return Parts(QwenImageTransformer(network, scheduler, sizes, source.config.id), decoder)
