"""Names of the weights of small models in the layout of the original Latent Diffusion code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet(unet: Mapping[str, Tensor], blocks: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename the weights of a network.

    Args:
        unet: By diffusers' names.
        blocks: Beginnings of diffusers' names, and what the original code has instead.
    """
    state: dict[str, Tensor] = {}
    for name, value in unet.items():
        (old,) = [prefix for prefix in blocks if name.startswith(prefix)]
        rest = name.removeprefix(old)
        if ".resnets." in f".{old}":
            part, _, kind = rest.rpartition(".")
            rest = f"{RESNET[part]}.{kind}"
        state[f"model.diffusion_model.{blocks[old]}{rest}"] = value
    return state


def original_vae(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an autoencoder of two levels."""
    state: dict[str, Tensor] = {}
    for name, value in vae.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        # On the way up the original counts levels from the picture, diffusers from the latents.
        new = re.sub(
            r"up_blocks\.(\d)\.resnets\.(\d)",
            lambda m: f"up.{1 - int(m[1])}.block.{m[2]}",
            new,
        )
        new = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", new
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])\.", r"\1.", new)
            # The original writes attention as convolutions of one pixel.
            value = value if value.ndim == 1 else value[:, :, None, None]
        state[f"first_stage_model.{new}"] = value.contiguous()
    return state
