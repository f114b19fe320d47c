"""PickScore: which picture people pick for a prompt, a CLIP trained on their choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from alignprop_cli.hub import from_pretrained, loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import FrozenReward, TextCache, unit


class PickScore(FrozenReward):
    """rewards = s <image, text>, both of unit length, s the model's scale (about 100): 18 to 24.

    A difference of d between two pictures of one prompt stands for odds of e^d that people pick the
    better one.

    Args:
        model: A folder or a hub id of a CLIP in transformers' format.
        tokenizer: A folder or a hub id of its tokenizer.

    Raises:
        AssetError: If weights or tokenizer are missing or damaged, or the hub cannot be reached.

    Source: Kirstain et al. 2023, arXiv:2305.01569, equation 1; yuvalkirstain/PickScore_v1.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ) -> None:
        self._model: Any = from_pretrained(CLIPModel, model, option="reward.pickscore.model")
        with loading("reward.pickscore.tokenizer", tokenizer):
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(tokenizer)
        self.networks = (self._model,)
        self.image_size: int = self._model.config.vision_config.image_size
        self._length: int = self._model.config.text_config.max_position_embeddings
        self.text_features = TextCache(self._read)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> PickScore:
        """Move the model to a device, in a precision, and return self."""
        self.text_features.clear()
        return super().to(device, dtype)

    def _read(self, texts: list[str]) -> Tensor:
        """Return features of unit length, shape (N, D)."""
        tokens = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).to(self.device)
        with without_autocast(self.device):
            read = self._model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            return unit(self._model.text_projection(read.pooler_output))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image for its prompt, shape (B,). Differentiable in images."""
        inputs = normalise(resize_and_crop(images, self.image_size), CLIP_MEAN, CLIP_STD)
        with without_autocast(images.device):
            seen = self._model.vision_model(pixel_values=inputs.to(self.dtype))
            features = unit(self._model.visual_projection(seen.pooler_output))
        scale = self._model.logit_scale.to(features.dtype).exp()
        return scale * (features * self.text_features(prompts)).sum(dim=-1)
