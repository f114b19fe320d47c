"""Krea 2 Raw and Turbo: Qwen3-VL, a transformer of a single stream, a rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3VLModel

from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Embeds
from alignprop_cli.models import components, loading
from alignprop_cli.models.base import MetaModel, Parts, Source
from alignprop_cli.models.components import PartRules, check_widths
from alignprop_cli.models.flow import SCHEDULER, FlowTransformer, Sizes, packed, unpacked
from alignprop_cli.models.qwen import LENGTH, longest_prompt, read_texts
from alignprop_cli.models.qwen_vae import VAE, check_vae, qwen_decoder
from alignprop_cli.models.rules import NOTHING, SIZE, Rule, either, list_of, number, one_of, whole
from alignprop_cli.models.sd3 import linear_shift
from alignprop_cli.prompts import for_tokenizer

PIXELS = 1024
"""Height and width of the pipeline's images where none is asked for."""

TURBO_SHIFT = 1.15
"""mu of the distilled model's shift, whatever the size of the image."""

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""The hidden states of Qwen3-VL that are read where the model does not say which."""

# Of the text, of the image's rows and of its columns.
_THREE: Rule = (lambda value: list_of(SIZE)[0](value) and len(value) == 3, "three whole numbers")

# Without a number it has 32 layers.
_TEXT: Rule = (
    lambda value: isinstance(value, dict) and SIZE[0](value.get("num_hidden_layers", 32)),
    "an object whose num_hidden_layers is a whole number",
)

_RULES = {
    "scheduler": SCHEDULER,
    "transformer": PartRules(
        ("Krea2Transformer2DModel",),
        {
            "_class_name": one_of("Krea2Transformer2DModel"),
            "in_channels": SIZE,
            "num_layers": SIZE,
            "attention_head_dim": SIZE,
            "num_attention_heads": SIZE,
            "num_key_value_heads": SIZE,
            "text_hidden_dim": SIZE,
            "num_text_layers": SIZE,
            "axes_dims_rope": _THREE,
            "rope_theta": number(0.0, float("inf")),
        },
    ),
    "vae": VAE,
    "text_encoder": PartRules(
        ("Qwen3VLModel", "Qwen3VLForConditionalGeneration"), {"text_config": _TEXT}
    ),
    "tokenizer": PartRules(("Qwen2TokenizerFast", "Qwen2Tokenizer"), file="tokenizer_config.json"),
}

# What model_index.json says besides the parts.
_INDEX_RULES: dict[str, Rule] = {
    "text_encoder_select_layers": either(list_of(whole(0, 1000)), NOTHING),
    "is_distilled": one_of(True, False),
    "patch_size": one_of(2),
}


class Krea2Text:
    """Qwen3-VL, of which several layers' hidden states are read; see `TextEncoders`.

    Args:
        pipeline: diffusers' pipeline with tokenizer and text encoder, which it encodes with.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself; see `TextEncoders`."""
        return [Embeds({"hidden": self._encode(for_tokenizer(prompt))}) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether the encoder does not read a prompt to its end."""
        pipeline = self.pipeline
        text = pipeline.prompt_template_encode_prefix + for_tokenizer(prompt)
        most = LENGTH + pipeline.prompt_template_encode_start_idx
        most -= pipeline.prompt_template_encode_num_suffix_tokens
        return len(pipeline.tokenizer(text).input_ids) > most

    def _encode(self, prompt: str) -> Tensor:
        """Return the hidden states of a prompt, (tokens, layers, D)."""
        hidden, is_token = self.pipeline.get_text_hidden_states(
            prompt, LENGTH, self.pipeline.text_encoder.device
        )
        if hidden.shape[1] != LENGTH:
            raise ValueError(
                f"the tokenizer makes {hidden.shape[1]} tokens where the pipeline expects {LENGTH}"
            )
        # Padding is in the middle of the template. Without it a prompt of 40 words takes a tenth,
        # and the network, for which texts have no order, masks it anyway.
        return hidden[is_token]


class Krea2Transformer(FlowTransformer):
    """The network; see `Network`. It reads 2 x 2 patches of the latents as tokens.

    Args:
        distilled: Whether it is the distilled model, whose shift is the same for all sizes.
    """

    def __init__(self, *arguments: Any, distilled: bool) -> None:
        super().__init__(*arguments)
        self.distilled = distilled

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return mu, linear in the number of tokens, or that of the distilled model."""
        return (
            TURBO_SHIFT if self.distilled else linear_shift(self._scheduler_config, latent_shape, 2)
        )

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network in its own precision, timesteps of 0 to 1000; see `Network`."""
        dtype, device = self.dtype, latents.device
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        # 1. Texts up to the longest, since tokens that are masked in all rows change nothing. Those
        #    of a text all have the place 0, so it does not matter where the padding is.
        hidden, is_token = read_texts(embeds)  # (B, n, layers, D)
        # 2. The pipeline rounds the time in [0, 1] to the precision of the latents.
        times = torch.full((len(latents),), timestep, device=device) / self.num_train_timesteps
        flow: Tensor = self.module(
            hidden_states=packed(latents).to(dtype),
            encoder_hidden_states=hidden,
            timestep=times.to(dtype),
            position_ids=_places(hidden.shape[1], height, width, device),
            encoder_attention_mask=is_token,
            return_dict=False,
        )[0]
        return unpacked(flow, height, width).to(latents.dtype)

    @property
    def num_train_timesteps(self) -> int:
        """Return the timestep of pure noise."""
        return self._scheduler_config.get("num_train_timesteps", 1000)


def _places(text: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the place (0, row, column) of every token, those of the text first, (N, 3)."""
    axes = [torch.arange(size, device=device) for size in (1, height, width)]
    return torch.cat([torch.zeros(text, 3, device=device), torch.cartesian_prod(*axes)])


def load_text_encoders(source: Source, device: torch.device) -> Krea2Text:
    """Load the tokenizer and the text encoder, and nothing else.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class, or its embeddings are not what the network
            reads.
    """
    layers, _ = _check(source)
    encoder = components.load_network(source, "text_encoder", Qwen3VLModel)
    tokenizer = components.load_tokenizer(
        source, "tokenizer", Qwen2TokenizerFast, encoder.config.text_config.vocab_size
    )
    with loading.explained(source.config, source.path):
        nothing = dict.fromkeys(("scheduler", "vae", "transformer"))
        pipeline = cast(Any, Krea2Pipeline)(
            tokenizer=tokenizer,
            text_encoder=encoder.to(device),
            text_encoder_select_layers=layers,
            **nothing,
        )
        made = Krea2Text(pipeline)
        # What is wrong with them shows in the first use.
        check_widths(made.encode([""])[0], source, hidden="text_hidden_dim")
    return made


def load_parts(source: Source, device: torch.device) -> Parts:
    """Load the network, the decoder and the scheduler's configuration.

    Raises:
        AssetError: If something is missing or damaged.
        ConfigError: If a part is of another class or has a setting that is not obeyed, or if
            network and autoencoder do not fit each other.
    """
    _, distilled = _check(source)
    network = components.load_network(source, "transformer", Krea2Transformer2DModel)
    vae = components.load_network(source, "vae", AutoencoderKLQwenImage)
    return _parts(network.to(device), vae.to(device), source, distilled)


def on_meta(source: Source) -> MetaModel:
    """Build the parts from the configurations in a folder; weights and tokenizers are not read.

    The prompt is as long as any can be, so most steps need less than a plan for it.

    Raises:
        AssetError: If a configuration is missing or damaged.
        ConfigError: As `load_parts`.
    """
    layers, distilled = _check(source)
    network = components.network_on_meta(source, "transformer", Krea2Transformer2DModel)
    vae = components.network_on_meta(source, "vae", AutoencoderKLQwenImage)
    made = _parts(network, vae, source, distilled)
    width = network.config.text_hidden_dim
    prompt = longest_prompt(source, len(layers), width)
    return MetaModel(made, prompt, made.network.sizes.image_size)


def _check(source: Source) -> tuple[tuple[int, ...], bool]:
    """Refuse configurations that are not obeyed.

    Returns:
        The numbers of the hidden states that are read, and whether the model is the distilled one.
    """
    components.check(source.path, _RULES)
    check_vae(source)
    index = components.read_object(source.path / components.INDEX) or {}
    for key, (holds, expected) in _INDEX_RULES.items():
        if key in index and not holds(index[key]):
            raise ConfigError(
                f"model.id: {source.path / components.INDEX}: {key}: expected {expected}, got "
                f"{components.shown(index[key])}"
            )
    layers = tuple(index.get("text_encoder_select_layers") or LAYERS)
    network = components.read_object(source.path / "transformer" / "config.json")
    text = components.read_object(source.path / "text_encoder" / "config.json")
    # Of a part that is not there loading says so; of a key, the libraries' own value.
    read = len(layers) if network is None else network.get("num_text_layers", len(LAYERS))
    there = max(layers)
    if text is not None:
        there = text.get("text_config", {}).get("num_hidden_layers", 32)
    if len(layers) != read or max(layers) > there:
        raise ConfigError(
            f"model.id: {source.path / components.INDEX}: text_encoder_select_layers: expected "
            f"{read} numbers of at most {there}, got {components.shown(list(layers))}"
        )
    return layers, index.get("is_distilled", False)


def _parts(network: Any, vae: Any, source: Source, distilled: bool) -> Parts:
    """Return the network and the decoder, which must fit each other."""
    channels, patches = network.config.in_channels, 4 * vae.config.z_dim
    if channels != patches:
        raise ConfigError(
            f"model.id: the network of {source.config.id} takes {channels} channels, its packed "
            f"latents have {patches}: inpainting models cannot be trained"
        )
    decoder = qwen_decoder(vae, source)
    sizes = Sizes(vae.config.z_dim, decoder.factor, unit=2 * decoder.factor, default=PIXELS)
    scheduler = components.load_config(source, "scheduler", SCHEDULER.file)
    made = Krea2Transformer(network, scheduler, sizes, source.config.id, distilled=distilled)
    return Parts(made, decoder)
