"""The human preference score by its authors' own package, to compare ours with; not for training.

The wheel of hpsv2 1.2.0 lacks the vocabulary of its tokenizer, and pins old versions of other
packages. So the package is an extra, and training never uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.hub import loading, locate
from alignprop_cli.images import to_uint8
from alignprop_cli.rewards.hps import ARCHITECTURE, FILES


class OfficialHps:
    """rewards = the score of `hpsv2.score`, which would read its checkpoint again for each image.

    Images are rounded to bytes, so there is no gradient. On a GPU the package runs in float16.

    Args:
        version: `v2.1` or `v2.0`.
        weights: As for the reward `hps`.

    Raises:
        ConfigError: If the version is unknown.
        AssetError: If the package, its vocabulary or the checkpoint is missing.

    Source: the package hpsv2, `img_score.score`.
    """

    def __init__(self, version: str = "v2.1", weights: str = "xswu/HPSv2") -> None:
        if version not in FILES:
            raise ConfigError(
                f"reward.hps-official.version: unknown version '{version}'",
                hint=f"known: {', '.join(FILES)}",
            )
        # 1. The package, with its own changed copy of open_clip. Its import fails in two ways, each
        # with its own fix.
        try:
            from hpsv2.src import open_clip  # type: ignore[import-not-found]
        except (ImportError, FileNotFoundError) as error:
            hint = (
                "pip install --no-deps hpsv2 clint args, and copy "
                "bpe_simple_vocab_16e6.txt.gz from the folder of open_clip to hpsv2/src/open_clip"
            )
            if getattr(error, "name", None) in ("tkinter", "_tkinter"):
                hint = "it imports turtle without using it: install Python's tkinter (python3-tk)"
            raise AssetError(
                f"reward.hps-official: the package hpsv2 does not load: {error}", hint=hint
            ) from error
        # 2. The network, which `hpsv2.score` would build again in every call.
        file = locate(weights, FILES[version], option="reward.hps-official.weights")
        with loading("reward.hps-official.weights", str(file)):
            state = torch.load(file, map_location="cpu", weights_only=True)
        self._model: Any
        self._model, _, self._prepare = open_clip.create_model_and_transforms(
            ARCHITECTURE, precision="fp32", light_augmentation=True, output_dict=True
        )
        with loading("reward.hps-official.weights", str(file)):
            self._model.load_state_dict(state["state_dict"])
        self._model.eval()
        self._tokenizer: Any = open_clip.get_tokenizer(ARCHITECTURE)
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> OfficialHps:
        """Move the model to a device and return self."""
        self._model.to(device)
        self._device = device
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image for its prompt, shape (B,). Not differentiable."""
        # Image by image, as the package does.
        scores: list[Tensor] = []
        for pixels, prompt in zip(to_uint8(images).numpy(), prompts, strict=True):
            image = self._prepare(Image.fromarray(pixels))[None].to(self._device)
            tokens = self._tokenizer([prompt]).to(self._device)
            with torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
                found = self._model(image, tokens)
                scores.append((found["image_features"] * found["text_features"]).sum().float())
        return torch.stack(scores)
