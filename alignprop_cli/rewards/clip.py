"""Cosine between image and prompt in the space of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.hub import loading
from alignprop_cli.images import normalise, resize_and_crop
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import FrozenReward, TextCache, unit

TINY = Path(__file__).parent.parent / "tiny" / "aligner"
"""The embedded image-text model, in open_clip's format."""


class ClipReward(FrozenReward):
    """rewards = <image, text>, both features of unit length, in [-1, 1].

    The features of a prompt are computed once and cached.

    Args:
        model: `tiny`, a folder with open_clip_config.json, a name that open_clip knows (ViT-B-32),
            or hf-hub:OWNER/NAME.
        pretrained: For a name: open_clip's tag of the weights (such as openai), or a file.

    Raises:
        ConfigError: If open_clip knows no such model or tag.
        AssetError: If weights are missing or damaged, or the hub cannot be reached.

    Source: Radford et al. 2021, arXiv:2103.00020; CLIPScore (Hessel et al. 2021, arXiv:2104.08718)
        is 2.5 max(cosine, 0), whose clamp has no gradient and is left out.
    """

    def __init__(self, model: str = "tiny", pretrained: str | None = None) -> None:
        self._model, self._tokenizer = load_open_clip("clip", model, pretrained)
        self.networks = (self._model,)
        visual = self._model.visual
        size = visual.image_size
        self.image_size: int = size if isinstance(size, int) else int(size[0])
        self._mean, self._std = visual.image_mean, visual.image_std
        self.text_features = TextCache(self._read)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> ClipReward:
        """Move the model to a device, in a precision, and return self."""
        self.text_features.clear()
        return super().to(device, dtype)

    def image_features(self, images: Tensor) -> Tensor:
        """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
        inputs = normalise(resize_and_crop(images, self.image_size), self._mean, self._std)
        with without_autocast(images.device):
            return unit(self._model.encode_image(inputs.to(self.dtype)))

    def _read(self, texts: list[str]) -> Tensor:
        """Return features of unit length, shape (N, D)."""
        with without_autocast(self.device):
            return unit(self._model.encode_text(self._tokenizer(texts).to(self.device)))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its prompt, shape (B,). Differentiable in images."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


def load_open_clip(reward: str, model: str, pretrained: str | None) -> tuple[Any, Any]:
    """Return a frozen open_clip model in float32 and its tokenizer.

    Args:
        reward: Name of the reward, for messages.
        model: As in `ClipReward`.
        pretrained: As in `ClipReward`.

    Raises:
        ConfigError, AssetError: As `ClipReward`.
    """
    option = f"reward.{reward}.model"
    name = _model_name(model, option)
    if ":" not in name and pretrained is None:
        raise ConfigError(
            f"reward.{reward}.pretrained: the model {model} needs a tag or a file of weights; "
            f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(name))}"
        )
    with loading(option, model, alternative="to tiny, which works without any download"):
        built = open_clip.create_model(
            name,
            pretrained=pretrained,
            precision="fp32",
            # OpenAI's own weights were trained with it; open_clip only warns.
            force_quick_gelu=pretrained == "openai",
        )
        tokenizer = open_clip.get_tokenizer(name)
    return built.eval().requires_grad_(False), tokenizer


def _model_name(model: str, option: str) -> str:
    """Return the name in open_clip's own notation."""
    path = TINY if model == "tiny" else Path(model).expanduser()
    if path.is_dir():
        return f"local-dir:{path}"
    if model == "tiny" or model.startswith((".", "/", "~")):
        raise AssetError(f"{option}: no such folder: {path}")
    if ":" in model or model in open_clip.list_models():
        return model
    nearest = did_you_mean(model, open_clip.list_models())
    raise ConfigError(f"{option}: open_clip knows no model '{model}'.{nearest}")
