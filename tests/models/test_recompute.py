"""Blocks of decoders that are recomputed: the same gradient from fewer stored bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from torch import Tensor

from alignprop_cli.models.recompute import decoder_blocks
from alignprop_cli.planning import meter
from tests.factories import randn


def kl() -> Any:
    """Residual blocks in levels, for which diffusers has a switch."""
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        mid_block_add_attention=False,  # a list that holds None
    )


def qwen() -> Any:
    """Causal convolutions in three dimensions, which hand frames on in a list."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def dc() -> Any:
    """Residual blocks in plain sequences, and linear attention."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(2, 2),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )


def tiny() -> Any:
    """One row of layers, which diffusers' switch recomputes as a whole."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 3),
        num_decoder_blocks=(3, 3),
    )


KINDS = {
    "kl": (kl, (8, 8)),
    "qwen": (qwen, (1, 8, 8)),
    "qwen, 3": (qwen, (3, 4, 4)),
    "dc": (dc, (8, 8)),
    "tiny": (tiny, (8, 8)),
}
"""Builder, and frames and size of the latents."""


def build(kind: str) -> tuple[Any, Tensor]:
    builder, shape = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = builder().eval().requires_grad_(False).double()
    return autoencoder, randn(1, 2, 4, *shape)


def gradient(autoencoder: Any, latents: Tensor, *, recompute: bool) -> tuple[Tensor, Tensor, int]:
    """Return the images, the gradient in the latents, and the bytes that were stored."""
    leaf = latents.clone().requires_grad_()
    with (
        meter.SavedBytes(autoencoder.parameters()) as saved,
        decoder_blocks(autoencoder, recompute),
    ):
        images = autoencoder.decode(leaf, return_dict=False)[0]
    total = saved.total
    saved.release()
    # Behind the block, as in training.
    (images * randn(2, *images.shape)).sum().backward()
    assert leaf.grad is not None
    return images.detach(), leaf.grad, total


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_stay_and_fewer_bytes_are_stored(kind: str) -> None:
    autoencoder, latents = build(kind)
    images, expected, stored = gradient(autoencoder, latents, recompute=False)
    again, found, fewer = gradient(autoencoder, latents, recompute=True)
    assert float(expected.norm()) > 1e-3
    assert torch.equal(again, images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert fewer < 0.5 * stored
    # Nothing is left of it.
    assert all("forward" not in vars(module) for module in autoencoder.modules())
    assert gradient(autoencoder, latents, recompute=False)[2] == stored


@pytest.mark.parametrize("kind", ["kl", "qwen", "dc", "tiny"])
def test_less_is_alive_at_the_same_time(kind: str) -> None:
    """What is counted are real storages: nothing is kept behind the back of autograd."""
    autoencoder, latents = build(kind)

    def peak(recompute: bool) -> int:
        with meter.Meter() as live:
            leaf = latents.clone().requires_grad_()
            with decoder_blocks(autoencoder, recompute):
                images = autoencoder.decode(leaf, return_dict=False)[0]
            after = live.now
            images.sum().backward()
        return after

    assert peak(True) < 0.5 * peak(False)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient_nothing_changes(kind: str) -> None:
    autoencoder, latents = build(kind)
    with decoder_blocks(autoencoder, True):
        one = autoencoder.decode(latents, return_dict=False)[0]
    with decoder_blocks(autoencoder, False):
        assert torch.equal(one, autoencoder.decode(latents, return_dict=False)[0])
