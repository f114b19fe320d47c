"""PickScore: which image people pick for a prompt, by a CLIP model trained on their choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from alignprop_cli.hub import folder_or_id, from_pretrained, loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop
from alignprop_cli.prompts import for_tokenizer
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import CosineReward, MetaReward, known_config, unit

_MODEL = "yuvalkirstain/PickScore_v1"
_TOKENIZER = "reward.pickscore.tokenizer"
# Sizes of the published network, so that its memory can be estimated before a download.
_PUBLISHED = {
    _MODEL: CLIPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
            hidden_act="gelu",
        ).to_dict(),
        text_config=CLIPTextConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            hidden_act="gelu",
        ).to_dict(),
        projection_dim=1024,
    )
}


class PickScore(CosineReward):
    """rewards = s <image, text>, both of unit length, with the model's scale s of about 100.

    Most images score 18 to 24. If the scores of two images of one prompt differ by d, the odds that
    people pick the higher one are e^d.

    Args:
        model: A folder or a hub id of a CLIP in transformers' format.
        tokenizer: A folder or a hub id of its tokenizer.

    Raises:
        AssetError: If weights or tokenizer are missing or damaged, or the hub cannot be reached.

    Source: Kirstain et al. 2023, arXiv:2305.01569, equation 1; yuvalkirstain/PickScore_v1.
    """

    def __init__(
        self,
        model: str = _MODEL,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ) -> None:
        super().__init__()
        # The small part first, as the model has 4 GB.
        with loading(_TOKENIZER, tokenizer):
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(
                folder_or_id(tokenizer, _TOKENIZER)
            )
        self._model: Any = from_pretrained(CLIPModel, model, option="reward.pickscore.model")
        self.networks = (self._model,)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, model: str = _MODEL, **_options: Any) -> MetaReward | None:
        """Return the network on the meta device; see `FrozenReward`."""
        config = known_config(CLIPConfig, model, _PUBLISHED, option="reward.pickscore.model")
        if config is None:
            return None
        with torch.device("meta"):
            network = CLIPModel(config)
        return MetaReward(lambda images: _features(network, images, dtype), network, dtype=dtype)

    def see(self, images: Tensor) -> Tensor:
        """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
        return _features(self._model, images, self.dtype)

    def read(self, texts: list[str]) -> Tensor:
        """Return features of unit length, shape (N, D), of N texts."""
        tokens = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        # The parts of get_text_features, which returns other things in other versions.
        with without_autocast(self.device):
            read = self._model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            return unit(self._model.text_projection(read.pooler_output))

    def cuts(self, prompt: str) -> bool:
        """Return whether the network does not read a prompt to its end."""
        most = self._model.config.text_config.max_position_embeddings
        return len(self._tokenizer(for_tokenizer(prompt)).input_ids) > most

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image for its prompt, shape (B,). Differentiable in images."""
        # The scale that `ClipReward` leaves out is part of the published score.
        cosines = super().__call__(images, prompts)
        return self._model.logit_scale.to(cosines.dtype).exp() * cosines


def _features(model: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
    size = model.config.vision_config.image_size
    inputs = normalise(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD)  # (B, 3, size, size)
    # As for texts, the parts of get_image_features.
    with without_autocast(images.device):
        seen = model.vision_model(pixel_values=inputs.to(dtype))
        return unit(model.visual_projection(seen.pooler_output))
