"""The autoencoder of Qwen-Image and of the families that share it: one of videos.

An image is a video of one frame. Its own `decode` clamps the images, which would leave saturated
pixels without a gradient, and hands frames on in lists, which one frame does not need: so the
decoder's network is called directly. Its convolutions do not see the frames of zeros before it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor

from alignprop_cli import images
from alignprop_cli.errors import ConfigError
from alignprop_cli.models.base import Source
from alignprop_cli.models.components import PartRules, freeze, read_object, shown
from alignprop_cli.models.recompute import decoder_blocks
from alignprop_cli.models.rules import SIZE, list_of, number, one_of
from alignprop_cli.models.unet import check_tiles

VAE = PartRules(
    ("AutoencoderKLQwenImage",),
    {
        "_class_name": one_of("AutoencoderKLQwenImage"),
        "base_dim": SIZE,
        "z_dim": SIZE,
        "dim_mult": list_of(SIZE),
        "num_res_blocks": SIZE,
        "temperal_downsample": list_of(one_of(True, False)),
        "latents_mean": list_of(number(-float("inf"), float("inf"))),
        "latents_std": list_of(number(0.0, float("inf"))),
        # The autoencoder of the layered pipeline has four: red, green, blue and opacity.
        "input_channels": one_of(3),
    },
)
"""What is demanded of its configuration; `check_vae` has what keys must be together."""


def check_vae(source: Source) -> None:
    """Refuse a configuration whose lists do not fit each other; files that are not there are not.

    Raises:
        AssetError: If the file cannot be read.
        ConfigError: With the key, and the number of values that it must have.
    """
    file = source.path / "vae" / "config.json"
    values = read_object(file) or {}
    channels = values.get("z_dim", 16)
    for key, wanted in (
        ("latents_mean", channels),
        ("latents_std", channels),
        ("temperal_downsample", len(values.get("dim_mult", (1, 2, 4, 4))) - 1),
    ):
        if key in values and len(values[key]) != wanted:
            raise ConfigError(
                f"model.id: {file}: {key}: expected {wanted} values, got {shown(values[key])}"
            )


class _OneFrame(QwenImageCausalConv3d):
    """The convolution of the first frame: before it are zeros, so one slice of the kernel is left.

    Of 3 slices it takes a third of the operations, and of what autograd keeps.
    """

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """Return (B, C, 1, h, w) of x (B, C', 1, h', w'); differentiable."""
        left, _, top, *_ = self._padding
        found = torch.nn.functional.conv2d(
            x.squeeze(2), self.weight[:, :, -1], self.bias, padding=(top, left)
        )
        return found.unsqueeze(2)


class QwenDecoder:
    """The decoder; see `Decoder`.

    Args:
        module: The whole autoencoder, diffusers' AutoencoderKLQwenImage; it is frozen here.
        tile_size: Decode in overlapping tiles of this many pixels; None decodes the whole image.
        model_id: The model's id as the user gave it, for messages.

    Raises:
        ConfigError: If tiles cannot have this size.
    """

    def __init__(self, module: Any, tile_size: int | None, model_id: str) -> None:
        self.module: Any = freeze(module)
        for part in (module.post_quant_conv, module.decoder):
            for layer in part.modules():
                # Another class, not another layer: names and weights stay.
                if isinstance(layer, QwenImageCausalConv3d):
                    layer.__class__ = _OneFrame
        self.factor: int = module.spatial_compression_ratio
        """Width of an image in pixels divided by the width of its latents."""
        self.module.use_tiling = tile_size is not None
        if tile_size is None:
            return
        # Tiles overlap by a quarter, as the autoencoder's own do.
        check_tiles(tile_size, self.factor, model_id)
        self.module.tile_sample_min_height = self.module.tile_sample_min_width = tile_size
        stride = tile_size - tile_size // 4
        self.module.tile_sample_stride_height = self.module.tile_sample_stride_width = stride

    def parameters(self) -> list[Tensor]:
        """Return the weights that `decode` uses."""
        used = (self.module.post_quant_conv, self.module.decoder)
        named = (pair for module in used for pair in module.named_parameters())
        # Of these convolutions along the time the first frame has none.
        return [p for name, p in named if ".time_conv." not in name]

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        """Return latents x latents_std + latents_mean by channel; differentiable."""
        config = self.module.config
        # (1, C, 1, 1) each
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode to images in [0, 1]; see `Decoder`."""
        vae = self.module
        frames = self.to_autoencoder(latents).to(vae.dtype).unsqueeze(2)  # (B, C, 1, h, w)
        # An image of a single tile is decoded as it is.
        in_tiles = vae.use_tiling and self.factor * max(latents.shape[2:]) > (
            vae.tile_sample_min_height
        )
        with decoder_blocks(vae, recompute):
            if in_tiles:
                decoded = vae.tiled_decode(frames, return_dict=False)[0]
            else:
                decoded = vae.decoder(vae.post_quant_conv(frames))
        return images.from_decoder(decoded.squeeze(2))  # about -1 to 1, (B, 3, H, W)


def qwen_decoder(vae: Any, source: Source) -> QwenDecoder:
    """Return the decoder of an autoencoder.

    Raises:
        ConfigError: If tiles cannot have the size that is asked for.
    """
    return QwenDecoder(vae, source.config.vae_tile_size, source.config.id)
