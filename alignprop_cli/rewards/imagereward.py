"""ImageReward: how people would rate an image for its prompt, by a BLIP with cross-attention.

The published weights are one state dict, and the classes they belong to no longer import. Here the
same network is built from transformers' BLIP classes and loaded strictly, with names mapped. Every
size is read from the shapes of the tensors and from med_config.json.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from alignprop_cli.errors import AssetError
from alignprop_cli.hub import folder_or_id, loading, locate
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop
from alignprop_cli.parsing import read_json
from alignprop_cli.paths import read_text, user_path
from alignprop_cli.prompts import for_tokenizer
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import (
    FrozenReward,
    MetaReward,
    exact,
    refuse_other_tensors,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The published code standardises its ratings with these, to about mean 0 and deviation 1."""

# Tokens of a prompt; the published code pads and cuts all prompts to this length.
_TEXT_LENGTH = 35
_OPTION, _TOKENIZER = "reward.imagereward.weights", "reward.imagereward.tokenizer"


class ImageReward(FrozenReward):
    """rewards = (MLP(text token of BLIP(image, prompt)) - MEAN) / STD.

    Most images score between -2 and 2. A vision transformer reads the image. A BERT reads the
    prompt (35 tokens, the rest is cut) and attends to the image in every layer. Its first token
    goes through five linear layers without activations.

    Args:
        weights: A folder with ImageReward.pt and med_config.json, the .pt file itself (with
            med_config.json next to it), or a hub id.
        tokenizer: A folder with the files of a BERT tokenizer, or a hub id.

    Raises:
        AssetError: If weights, configuration or tokenizer are missing, damaged or do not fit.

    Source: Xu et al. 2023, arXiv:2304.05977; THUDM/ImageReward, `score_gard`.
    """

    def __init__(
        self, weights: str = "THUDM/ImageReward", tokenizer: str = "bert-base-uncased"
    ) -> None:
        # 1. The files. med_config.json is looked for where the weights are.
        file = locate(weights, "ImageReward.pt", option=_OPTION)
        place = str(file.parent) if user_path(weights, _OPTION).is_file() else weights
        config_file = locate(place, "med_config.json", option=_OPTION)
        with loading(_OPTION, str(file)):
            state = torch.load(file, map_location="cpu", weights_only=True)
        with loading(_OPTION, str(config_file)):
            config = read_json(read_text(config_file, _OPTION))
            sizes = {name: config[name] for name in _TEXT_SIZES}
        # 2. The networks. Sizes come from the shapes of the tensors, so that smaller models load as
        # well, such as those of the tests.
        with loading(_OPTION, str(file)):
            self._vision = _vision(_below(state, "blip.visual_encoder."))
            width = self._vision.config.hidden_size
            self._text = _text(_below(state, "blip.text_encoder."), sizes, width)
            self._head = _head(_below(state, "mlp.layers."), self._text.config.hidden_size)
        with loading(_TOKENIZER, tokenizer):
            self._tokenizer: Any = BertTokenizer.from_pretrained(
                folder_or_id(tokenizer, _TOKENIZER)
            )
        # A larger vocabulary would index past the embedding: on a GPU a device-side assert.
        if len(self._tokenizer) > self._text.config.vocab_size:
            raise AssetError(
                f"{_TOKENIZER}: {tokenizer} has {len(self._tokenizer)} tokens, the "
                f"model reads {self._text.config.vocab_size}"
            )
        self.networks, self.heads = (self._vision, self._text), (self._head,)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, **_options: Any) -> MetaReward:
        """Return the published networks on the meta device; see `FrozenReward`."""
        with torch.device("meta"):
            vision = BlipVisionModel(_PUBLISHED_VISION)
            text = _text_model(_PUBLISHED_TEXT, _PUBLISHED_VISION.hidden_size)

        # Every prompt has the same number of tokens. The mask is left out: transformers would test
        # whether it is all ones, and tensors on the meta device have no values.
        def measure(images: Tensor) -> Tensor:
            ids = torch.zeros((len(images), _TEXT_LENGTH), dtype=torch.long, device=images.device)
            return _first_tokens(vision, text, images, ids, None, dtype)

        return MetaReward(measure, vision, text, dtype=dtype)

    def cuts(self, prompt: str) -> bool:
        """Return whether the network does not read a prompt to its end."""
        return len(self._tokenizer(for_tokenizer(prompt)).input_ids) > _TEXT_LENGTH

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rating of each image for its prompt, shape (B,). Differentiable in images."""
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=_TEXT_LENGTH,
            return_tensors="pt",
        ).to(images.device)
        first = _first_tokens(
            self._vision, self._text, images, tokens.input_ids, tokens.attention_mask, self.dtype
        )  # (B, D)
        with without_autocast(images.device):
            return (self._head(first).squeeze(-1) - MEAN) / STD


def _see(vision: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tokens of each image, shape (B, 1 + patches, width)."""
    size = vision.config.image_size
    inputs = normalise(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD)
    return vision(pixel_values=inputs.to(dtype)).last_hidden_state


def _first_tokens(
    vision: Any, text: Any, images: Tensor, ids: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the first token of the text model, shape (B, D), float32 at least.

    Args:
        vision: The vision transformer.
        text: The text model, with cross-attention.
        images: Shape (B, 3, H, W), in [0, 1].
        ids: Tokens of the prompts, shape (B, 35).
        mask: 1 for tokens, 0 for padding, shape (B, 35); None for no padding.
        dtype: Precision of both networks.
    """
    with without_autocast(images.device):
        seen = _see(vision, images, dtype)
        read = text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            is_decoder=False,  # no causal mask: the model is an encoder with cross-attention
        ).last_hidden_state  # (B, 35, D)
        return read[:, 0].to(exact(read.dtype))


def _vision(state: Mapping[str, Tensor]) -> BlipVisionModel:
    """Build the vision transformer of a state dict with timm's names."""
    # One position more than patches: the class token's.
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(state, "blocks."),
        num_attention_heads=max(1, width // 64),  # heads of vision transformers are 64 wide
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # timm's; the default here, 1e-5, changes the tokens by 5e-5
    )
    model = BlipVisionModel(config)
    _load(model, {_renamed(name): tensor for name, tensor in state.items()})
    return model


def _text(state: Mapping[str, Tensor], sizes: Mapping[str, Any], width: int) -> BlipTextModel:
    """Build the text model of a state dict and med_config.json, for vision tokens of a width."""
    model = _text_model(sizes, width)
    # Older versions of transformers saved position_ids, a constant, as if it were a weight.
    _load(model, {n: t for n, t in state.items() if n != "embeddings.position_ids"})
    return model


def _text_model(sizes: Mapping[str, Any], width: int) -> BlipTextModel:
    """Return a text model with cross-attention to vision tokens of this width."""
    # med_config.json says encoder_width 768, but the published code replaces that by the width of
    # the vision model. is_decoder is what gives the layers their cross-attention.
    config = BlipTextConfig(**sizes, encoder_hidden_size=width, is_decoder=True)
    return BlipTextModel(config, add_pooling_layer=False)


# Sizes of the published networks: a ViT-L/16 and a BERT-base.
_PUBLISHED_VISION = BlipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
)
_PUBLISHED_TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
# What is read from med_config.json, and must be in it.
_TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)


def _head(state: Mapping[str, Tensor], width: int) -> torch.nn.Sequential:
    """Build the linear layers of the head, named by their place, with dropouts left out."""
    # Each layer must take what the one before gives, from the text model's width to one number.
    places = sorted({int(name.split(".")[0]) for name in state})
    shapes = [tuple(state[f"{place}.weight"].shape) for place in places]
    if [shape[1] for shape in shapes] + [1] != [width] + [shape[0] for shape in shapes]:
        raise ValueError(f"the layers mlp.layers.* do not lead from {width} to 1: {shapes}")
    layers: list[torch.nn.Module] = [torch.nn.Linear(shape[1], shape[0]) for shape in shapes]
    head = torch.nn.Sequential(OrderedDict(zip(map(str, places), layers, strict=True)))
    _load(head, state)
    return head


# From timm's names to those of transformers' BLIP, applied in this order.
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)


def _renamed(name: str) -> str:
    """Return transformers' name of a tensor of timm's vision transformer."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    if not found:
        raise ValueError(f"it holds no tensor {prefix}*")
    return found


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbered blocks there are under a prefix."""
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def _load(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, freeze the module and set it to evaluation."""
    refuse_other_tensors(state, module.state_dict())
    module.load_state_dict(state, strict=True)
    module.eval().requires_grad_(False)
