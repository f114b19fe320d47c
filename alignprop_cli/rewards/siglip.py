"""SigLIP: the log-odds that an image and a prompt belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor

from alignprop_cli.errors import ConfigError
from alignprop_cli.hub import folder_or_id, loading
from alignprop_cli.images import squash
from alignprop_cli.rewards.clip import (
    OpenClipReward,
    load_network,
    model_name,
    open_clip_on_meta,
)
from alignprop_cli.rewards.frozen import MetaReward

_MODEL = "ViT-SO400M-14-SigLIP-384"
_OPTION = "reward.siglip.model"
_TOKENIZER = "reward.siglip.tokenizer"
# Mean and standard deviation of every channel in the published models' training.
_HALF = (0.5, 0.5, 0.5)


class SiglipReward(OpenClipReward):
    """rewards = s <image, text> + b, the logit of the model's sigmoid; above 0 for most matches.

    s and b are learned. The logit is what training saw: unlike a cosine it says when an image
    fits (at 0 the odds are even), and its gradient is that of the cosine, times s. The probability,
    the sigmoid of it, is below 1e-4 for most pairs and has hardly a gradient there.

    The image is squashed into a square, as in the model's own training.

    Args:
        model: A name that open_clip knows, a folder with open_clip_config.json, or
            hf-hub:OWNER/NAME. Only models with a learned bias, which is SigLIP's.
        pretrained: For a name: open_clip's tag of the weights, or a file.
        tokenizer: A folder or a hub id in transformers' format; unset is the model's own.

    Raises:
        ConfigError: If open_clip knows no such model or tag, or it is no SigLIP.
        AssetError: If weights or tokenizer are missing or damaged, or the hub cannot be reached.

    Source: Zhai et al. 2023, arXiv:2303.15343, algorithm 1; SigLIP 2, arXiv:2502.14786.
    """

    def __init__(
        self,
        model: str = _MODEL,
        pretrained: str = "webli",
        tokenizer: str | None = None,
    ) -> None:
        name = model_name(model, _OPTION)
        # The small part first, as the network has gigabytes.
        words = _tokenizer(model, name, tokenizer)
        network = load_network("siglip", model, None if ":" in name else pretrained)
        if network.logit_bias is None:
            raise ConfigError(
                f"{_OPTION}: {model} has no learned bias, so it is no SigLIP",
                hint="the reward clip takes every model of open_clip",
            )
        visual = network.visual
        if ":" not in name:
            # A file of weights says nothing, and open_clip would take those of OpenAI's CLIP.
            visual.image_mean = visual.image_std = _HALF
        elif (mode := visual.preprocess_cfg["resize_mode"]) != "squash":
            raise ConfigError(
                f"{_OPTION}: the preprocess_cfg of {model} has resize_mode '{mode}', and only "
                "'squash' is supported"
            )
        super().__init__(network, words, squash)
        # As numbers: in half precision they would be off by up to a hundredth.
        self._scale, self._bias = float(network.logit_scale.exp()), float(network.logit_bias)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, model: str = _MODEL, **_options: Any) -> MetaReward | None:
        """Return the network on the meta device; see `FrozenReward`."""
        return open_clip_on_meta(dtype, model, squash, _OPTION)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the logit of each image and its prompt, shape (B,). Differentiable in images."""
        return self._scale * super().__call__(images, prompts) + self._bias


def _tokenizer(model: str, name: str, place: str | None) -> Any:
    """Return the model's tokenizer, or one from another place with its length and cleaning.

    Args:
        model: As the user named it.
        name: As open_clip names it.
        place: Where the words are; None is what the model's configuration names.
    """
    with loading(_TOKENIZER, place or f"that of {model}"):
        if place is None:
            return open_clip.get_tokenizer(name)
        # None only for a name that `model_name` refuses.
        text = (open_clip.get_model_config(name) or {})["text_cfg"]
        return open_clip.tokenizer.HFTokenizer(
            folder_or_id(place, _TOKENIZER),
            context_length=text["context_length"],
            **text.get("tokenizer_kwargs", {}),
        )
