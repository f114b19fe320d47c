"""Cosine between image and prompt in the space of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor

from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.images import resize_and_crop

TINY = Path(__file__).parent.parent / "tiny" / "aligner"
"""The embedded image-text model, in open_clip's format."""


class ClipReward:
    """rewards = <image, text>, both features of unit length, in [-1, 1].

    The features of a prompt are computed once and cached. Features are normalised and multiplied
    in float32 outside autocast: half precision is coarser than the differences that matter.

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
        name = _model_name(model)
        if ":" not in name and pretrained is None:
            raise ConfigError(
                f"reward.clip.pretrained: the model {model} needs a tag or a file of weights; "
                f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(name))}"
            )
        try:
            built = open_clip.create_model(name, pretrained=pretrained, precision="fp32")
            self._tokenizer: Any = open_clip.get_tokenizer(name)
        except _LOADING as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise AssetError(
                f"reward.clip.model: cannot load {model}: {text[0]}",
                hint="set reward.clip.model to a local folder in open_clip's format, "
                "or to tiny, which works without any download",
            ) from error
        self._model: Any = built.eval().requires_grad_(False)
        visual = self._model.visual
        size = visual.image_size
        self.image_size: int = size if isinstance(size, int) else int(size[0])
        self._mean = torch.tensor(visual.image_mean).view(1, 3, 1, 1)
        self._std = torch.tensor(visual.image_std).view(1, 3, 1, 1)
        self._texts: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> ClipReward:
        """Move the model to a device and return self."""
        self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self._texts.clear()
        return self

    def image_features(self, images: Tensor) -> Tensor:
        """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
        inputs = (resize_and_crop(images, self.image_size) - self._mean) / self._std
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self._model.encode_image(inputs)
        return torch.nn.functional.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return features of unit length, shape (B, D). Not differentiable; cached per text."""
        missing = sorted({p for p in prompts if p not in self._texts})
        if missing:
            tokens = self._tokenizer(missing).to(self._mean.device)
            features = torch.nn.functional.normalize(
                self._model.encode_text(tokens).float(), dim=-1
            )
            self._texts |= dict(zip(missing, features, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its prompt, shape (B,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


_LOADING = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    SafetensorError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)


def _model_name(model: str) -> str:
    """Return the name in open_clip's own notation."""
    path = TINY if model == "tiny" else Path(model).expanduser()
    if path.is_dir():
        return f"local-dir:{path}"
    if model == "tiny" or model.startswith((".", "/", "~")):
        raise AssetError(f"reward.clip.model: no such folder: {path}")
    if ":" in model or model in open_clip.list_models():
        return model
    raise ConfigError(
        f"reward.clip.model: open_clip knows no model '{model}'."
        f"{did_you_mean(model, open_clip.list_models())}"
    )
