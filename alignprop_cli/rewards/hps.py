"""Human preference score v2: the cosine of a CLIP model trained on people's choices."""

from __future__ import annotations

from typing import Any

import open_clip
import torch

from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.hub import loading, locate
from alignprop_cli.images import letterbox
from alignprop_cli.rewards.clip import OpenClipReward, meta_open_clip, open_clip_on_meta
from alignprop_cli.rewards.frozen import MetaReward, refuse_other_shapes

ARCHITECTURE = "ViT-H-14"

FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
"""Checkpoint of each version in the repository."""


class HpsReward(OpenClipReward):
    """rewards = <image, text>, both of unit length; about 0.2 to 0.35.

    This is the plain cosine, without the model's scale, as the published code returns it; published
    tables show 100 times this value. Scores of v2.1 spread about four times as far as those of
    v2.0, and the two are not comparable. The image is letterboxed, so that the network sees all of
    it and not only the centre.

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
        # 1. The file, before a network of 4 GB is built for it: its tensors must be those of the
        #    network, which on the meta device costs nothing.
        with loading("reward.hps.weights", str(file)):
            state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            refuse_other_shapes(state, meta_open_clip(ARCHITECTURE).state_dict())
        # 2. The network. pretrained=None: LAION's weights, a download of 4 GB, would all be
        #    overwritten.
        model: Any = open_clip.create_model(ARCHITECTURE, pretrained=None, precision="fp32")
        with loading("reward.hps.weights", str(file)):
            model.load_state_dict(state, strict=True)
        tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
        super().__init__(model.eval().requires_grad_(False), tokenizer, letterbox)

    @classmethod
    def on_meta(cls, dtype: torch.dtype, **_options: Any) -> MetaReward | None:
        """Return the network on the meta device; see `FrozenReward`."""
        return open_clip_on_meta(dtype, ARCHITECTURE, letterbox)
