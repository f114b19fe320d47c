"""LAION's aesthetic score: how people rate an image, predicted from its CLIP features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from alignprop_cli.hub import from_pretrained, loading, locate
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import (
    FrozenReward,
    MetaReward,
    known_config,
    refuse_other_tensors,
    unit,
)

_FILE = "aesthetic-model.pth"
_OPTION = "reward.aesthetic.head"
_MODEL = "openai/clip-vit-large-patch14"
_PUBLISHED = {
    _MODEL: CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
}
# Where the linear layers are in the published head; dropouts take the places between them.
_LAYERS = (0, 2, 4, 6, 7)


class AestheticReward(FrozenReward):
    """rewards = w . e + b, with e the features of CLIP ViT-L/14, of unit length. Reads no prompt.

    It predicts ratings from 1 to 10. Images of Stable Diffusion 1.5 score 5 to 6.5; look at images
    that score above 8. The published head is five linear layers with nothing but dropout between
    them, so together they are one affine map, and are computed as one.

    Args:
        head: The head's file, a folder that holds aesthetic-model.pth, or a hub id.
        model: A folder or a hub id of CLIP ViT-L/14 in transformers' format.

    Raises:
        AssetError: If head or model is missing or damaged, they do not fit each other, or the hub
            cannot be reached.

    Source: christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.
    """

    def __init__(
        self,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        model: str = _MODEL,
    ) -> None:
        file = locate(head, _FILE, option=_OPTION)
        with loading(_OPTION, str(file)):
            weight, bias = affine(torch.load(file, map_location="cpu", weights_only=True))
        self._model: Any = from_pretrained(
            CLIPVisionModelWithProjection, model, option="reward.aesthetic.model"
        )
        width = self._model.config.projection_dim
        with loading(_OPTION, str(file)):
            if len(weight) != width:
                raise ValueError(f"it reads {len(weight)} features, {model} has {width}")
            self._head = torch.nn.Linear(width, 1)
            self._head.load_state_dict({"weight": weight[None], "bias": bias[None]})
        self._head.eval().requires_grad_(False)
        self.networks, self.heads = (self._model,), (self._head,)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, model: str = _MODEL, **_options: Any) -> MetaReward | None:
        """Return the vision model on the meta device; see `FrozenReward`."""
        config = known_config(CLIPVisionConfig, model, _PUBLISHED, option="reward.aesthetic.model")
        if config is None:
            return None
        with torch.device("meta"):
            network: Any = CLIPVisionModelWithProjection(config)
        return MetaReward(lambda images: _features(network, images, dtype), network, dtype=dtype)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image, shape (B,). Differentiable in images."""
        features = _features(self._model, images, self.dtype)  # (B, D)
        with without_autocast(images.device):
            return self._head(features).squeeze(-1)


def _features(model: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
    size = model.config.image_size
    inputs = normalise(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD)  # (B, 3, size, size)
    with without_autocast(images.device):
        return unit(model(pixel_values=inputs.to(dtype)).image_embeds)


def affine(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compose the layers of a published head into one affine map.

    Args:
        state: `layers.N.weight` and `layers.N.bias` for N = 0, 2, 4, 6, 7.

    Returns:
        w, shape (D,), and b, shape (), both float64.

    Raises:
        ValueError: If tensors are missing, unknown, or do not lead to one number.
    """
    expected = {f"layers.{place}.{part}" for place in _LAYERS for part in ("weight", "bias")}
    refuse_other_tensors(state, expected)
    # W = W5 W4 W3 W2 W1 and b = W5 (W4 (...) + b4) + b5, in float64 so that composing adds no error
    # of its own. The identity, shape (D, D), is the map of no layer.
    weight = torch.eye(state["layers.0.weight"].shape[1], dtype=torch.float64)
    bias = weight.new_zeros(len(weight))
    for place in _LAYERS:
        layer, shift = (state[f"layers.{place}.{part}"].double() for part in ("weight", "bias"))
        weight, bias = layer @ weight, layer @ bias + shift
    if len(weight) != 1:
        raise ValueError(f"it gives {len(weight)} numbers instead of one")
    return weight[0], bias[0]
