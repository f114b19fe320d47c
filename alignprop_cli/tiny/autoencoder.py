"""Stage one of the embedded model: the autoencoder, factor 4, 12 latent channels."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from alignprop_cli.tiny import data

LATENTS = 12


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder of 0.8 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENTS,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=data.SIZE_PX,
        scaling_factor=1.0,
    )


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Make every latent channel of mean 0 and spread 1 by changing the two 1x1 convolutions.

    Args:
        vae: Changed in place; its pictures stay the same.
        images: Shape (B, 3, H, W), in [-1, 1].
    """
    latents = vae.encode(images).latent_dist.mode()
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    inwards, outwards = vae.quant_conv, vae.post_quant_conv
    inwards.weight[:LATENTS] /= std.view(-1, 1, 1, 1)
    inwards.bias[:LATENTS] = (inwards.bias[:LATENTS] - mean) / std
    inwards.bias[LATENTS:] -= 2.0 * std.log()
    outwards.bias += outwards.weight[:, :, 0, 0] @ mean
    outwards.weight *= std.view(1, -1, 1, 1)
