"""Human preference score v2: the cosine of a CLIP that was trained on people's choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor

from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.hub import loading, locate
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, letterbox, normalise
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import FrozenReward, TextCache, unit

ARCHITECTURE = "ViT-H-14"

FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
"""Checkpoint of each version in the repository."""


class HpsReward(FrozenReward):
    """rewards = <image, text>, both of unit length; about 0.2 to 0.35.

    The plain cosine, without the model's scale, as the published code returns it; its tables show
    100 times that. v2.1 spreads about four times as far as v2.0; the two are not comparable. The
    whole picture is shown, letterboxed, not its centre.

    Args:
        version: `v2.1` or `v2.0`.
        weights: The checkpoint, a folder that holds it under its published name, or a hub id.

    Raises:
        ConfigError: If the version is unknown.
        AssetError: If the checkpoint is missing or damaged, has other tensors, or the hub cannot be
            reached.

    Source: Wu et al. 2023, arXiv:2306.09341; tgxs002/HPSv2, `img_score`.
    """

    def __init__(self, version: str = "v2.1", weights: str = "xswu/HPSv2") -> None:
        if version not in FILES:
            raise ConfigError(
                f"reward.hps.version: unknown version '{version}'.{did_you_mean(version, FILES)}",
                hint=f"known: {', '.join(FILES)}",
            )
        file = locate(weights, FILES[version], option="reward.hps.weights")
        # Without weights of its own: those of LAION, 4 GB more, would all be replaced.
        self._model: Any = open_clip.create_model(ARCHITECTURE, pretrained=None, precision="fp32")
        with loading("reward.hps.weights", str(file)):
            state = torch.load(file, map_location="cpu", weights_only=True)
            self._model.load_state_dict(state["state_dict"], strict=True)
        self._model.eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
        self.networks = (self._model,)
        self.image_size = self._model.visual.image_size[0]
        self.text_features = TextCache(self._read)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> HpsReward:
        """Move the model to a device, in a precision, and return self."""
        self.text_features.clear()
        return super().to(device, dtype)

    def _read(self, texts: list[str]) -> Tensor:
        """Return features of unit length, shape (N, D)."""
        with without_autocast(self.device):
            return unit(self._model.encode_text(self._tokenizer(texts).to(self.device)))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image for its prompt, shape (B,). Differentiable in images."""
        inputs = normalise(letterbox(images, self.image_size), CLIP_MEAN, CLIP_STD)
        with without_autocast(images.device):
            seen = unit(self._model.encode_image(inputs.to(self.dtype)))
        return (seen * self.text_features(prompts)).sum(dim=-1)
