"""Shipped rewards without their weights: the networks that see the picture, on the meta device."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
)

from alignprop_cli.hub import loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, letterbox, normalise, resize_and_crop
from alignprop_cli.rewards.clip import TINY
from alignprop_cli.rewards.frozen import FrozenReward

# Image towers of the published checkpoints, in open_clip's names. The text side of ImageReward, a
# BERT with 35 tokens, is a tenth of it and left out.
_TOWERS = {
    "aesthetic": "ViT-L-14-quickgelu",
    "hps": "ViT-H-14",
    "pickscore": "ViT-H-14",
    "imagereward": "ViT-L-16",
}


_CLIPS = ("clip", "clip_count", "clip_choice")


class Outline(FrozenReward):
    """A network that sees the picture, on the meta device; its answer has a shape and no meaning.

    Args:
        network: The network.
        see: From images (B, 3, H, W) to something of which (B,) can be made.
    """

    def __init__(self, network: torch.nn.Module, see: Callable[[Tensor], Tensor]) -> None:
        self.networks = (network.eval().requires_grad_(False),)
        self._see = see

    def __call__(self, images: Tensor) -> Tensor:
        """Return something of shape (B,) that depends on the images."""
        return self._see(images).flatten(1).sum(dim=1)


def outline(name: str, options: Mapping[str, Any], dtype: torch.dtype) -> Outline | None:
    """Return the outline of a shipped reward; None where it holds no network or it is not known.

    Args:
        name: Of the reward.
        options: As in the configuration.
        dtype: Precision of its network.

    Raises:
        AssetError: If a folder's configuration is missing or damaged.
    """
    if name in _TOWERS:
        return _tower(_TOWERS[name], dtype, boxed=name == "hps")
    if name in _CLIPS:
        model = str(options.get("model", "tiny"))
        return _tower(model, dtype) if _config(model) else None
    if name in ("count", "remove"):
        return _detector(str(options.get("model", "hustvl/yolos-tiny")), dtype)
    return None


def parameters(name: str, options: Mapping[str, Any]) -> int:
    """Return the number of weights of a reward, text side included; 0 where not known."""
    if name in ("hps", "pickscore"):
        return _all_parameters(_TOWERS[name])
    if name in _CLIPS:
        model = str(options.get("model", "tiny"))
        return _all_parameters(model) if _config(model) else 0
    found = outline(name, options, torch.float32)
    if found is None:
        return 0
    text = 137_000_000 if name == "imagereward" else 0  # BERT-base with cross-attention
    return text + sum(p.numel() for network in found.networks for p in network.parameters())


def _config(model: str) -> dict[str, Any] | None:
    """Return the configuration of an open_clip model: a name, `tiny` or a folder."""
    path = TINY if model == "tiny" else Path(model).expanduser()
    if path.is_dir():
        with loading("reward.clip.model", model):
            file = path / "open_clip_config.json"
            return json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
    config: Any = open_clip.get_model_config(model)
    return config


def _clip(model: str) -> Any:
    """Return an open_clip model on the meta device."""
    config = _config(model) or {}
    known = inspect.signature(open_clip.CLIP).parameters
    with torch.device("meta"):
        return open_clip.CLIP(**{key: value for key, value in config.items() if key in known})


def _all_parameters(model: str) -> int:
    return sum(p.numel() for p in _clip(model).parameters())


def _tower(model: str, dtype: torch.dtype, *, boxed: bool = False) -> Outline:
    tower = _clip(model).visual.to(dtype)
    size = tower.image_size
    size = size if isinstance(size, int) else size[0]
    fit = letterbox if boxed else resize_and_crop

    def see(images: Tensor) -> Tensor:
        return tower(normalise(fit(images, size), CLIP_MEAN, CLIP_STD).to(dtype)).float()

    return Outline(tower, see)


def _detector(model: str, dtype: torch.dtype) -> Outline | None:
    """Return a published detector, told by its name; of a folder the configuration is read."""
    folder = Path(model).expanduser()
    if "owl" not in model and "yolos" not in model:
        return None
    tiny: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    with loading("reward.count.model", model):
        if "owl" in model:
            base = {"image_size": 960, "patch_size": 16}
            config: Any = (
                Owlv2Config.from_pretrained(folder)
                if folder.is_dir()
                else Owlv2Config(vision_config=base)
            )
            size = config.vision_config.image_size
            kind: Any = Owlv2ForObjectDetection
        else:
            config = (
                YolosConfig.from_pretrained(folder)
                if folder.is_dir()
                else YolosConfig(**tiny, image_size=[800, 1333], use_mid_position_embeddings=False)
            )
            size, kind = min(config.image_size), YolosForObjectDetection
    with torch.device("meta"):
        network: Any = kind(config)
    torch.nn.Module.to(network, dtype)

    def look(images: Tensor) -> Tensor:
        sized = torch.nn.functional.interpolate(images, (size, size), mode="bilinear").to(dtype)
        if kind is YolosForObjectDetection:
            return network(pixel_values=sized).logits.float()
        return network.owlv2.vision_model(pixel_values=sized).last_hidden_state.float()

    return Outline(network, look)
