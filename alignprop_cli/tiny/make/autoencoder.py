"""Stage one of the embedded model: the autoencoder, factor 4, 12 latent channels.

Its weights start as a linear map: the encoder takes 4 x 4 patches apart and projects them on their
12 principal components, and the decoder returns the mean colour of each patch. From this start it
reaches 25 dB in 200 steps; from the default one of diffusers, 18 dB in 1,600.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor

from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.checker import check
from alignprop_cli.tiny.make import checkpoint

LATENTS = 12
"""Channels of the latents: a patch of 4 x 4 x 3 = 48 numbers becomes 12."""
DRAWINGS = 12_000
BATCH = 12
LEARNING_RATE = 1.5e-3
# Constant in two extra channels, with both signs. The network normalises over all channels (one
# group); large constants keep its scale nearly the same, whatever the signal is.
_ANCHOR = 8.0


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
def start_linear(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the weights so that the encoder projects patches on their principal components.

    Args:
        vae: Changed in place.
        images: Shape (B, 3, 48, 48), in [-1, 1]; the components are those of their patches.
    """
    # 1. Make every residual block the identity.
    for block in vae.modules():
        if type(block).__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(block.conv2.weight)
            torch.nn.init.zeros_(block.conv2.bias)
            if block.conv_shortcut is not None:
                _identity(block.conv_shortcut, 0.02)
    # 2. The principal components. Pixels become channels twice by 2, not once by 4, so that the 48
    # numbers of a patch are in the order of the encoder's two downsamplers.
    patches = torch.nn.functional.pixel_unshuffle(images, 2)  # (B, 12, 24, 24)
    patches = torch.nn.functional.pixel_unshuffle(patches, 2)  # (B, 48, 12, 12)
    patches = patches.permute(0, 2, 3, 1).reshape(-1, 48)
    mean = patches.mean(dim=0)
    # Every 7th patch is enough, and takes a 7th of the time.
    components = torch.linalg.svd((patches - mean)[::7], full_matrices=False)[2][:LATENTS]
    # 3. Latents have unit variance; the decoder undoes that.
    spread = ((patches - mean) @ components.T).std(dim=0)
    _start_encoder(vae, components / spread[:, None], mean)
    _start_decoder(vae, components * spread[:, None], mean)


def _start_encoder(vae: AutoencoderKL, project: Tensor, mean: Tensor) -> None:
    """Let the encoder project patches, with `project` (12, 48), after subtracting `mean` (48,)."""
    # 1. Each downsampler moves 2 x 2 pixels of the first channels to four channels each.
    encoder = vae.encoder
    _identity(encoder.conv_in, 0.1, channels=3)
    for block, channels in ((encoder.down_blocks[0], 3), (encoder.down_blocks[1], 12)):
        conv = block.downsamplers[0].conv
        conv.weight *= 0.1
        conv.bias.zero_()
        conv.weight[: 4 * channels] = 0.0
        for channel in range(channels):
            for row in range(2):
                for column in range(2):
                    conv.weight[4 * channel + 2 * row + column, channel, row, column] = 1.0
    # 2. A 1 x 1 convolution projects the 48 channels. Each latent is there with both signs, since
    # silu(u) - silu(-u) = u: the difference passes the nonlinearity unchanged.
    shortcut = encoder.down_blocks[2].resnets[0].conv_shortcut
    shortcut.weight.zero_()
    shortcut.bias.zero_()
    offset = project @ mean
    for sign, at in ((1.0, 0), (-1.0, LATENTS)):
        shortcut.weight[at : at + LATENTS, :, 0, 0] = sign * project
        shortcut.bias[at : at + LATENTS] = -sign * offset
    shortcut.bias[-2], shortcut.bias[-1] = _ANCHOR, -_ANCHOR
    # 3. The difference of both signs is the latent. 1.6 about undoes the normalisation before it:
    # 64 channels with 2 anchors and 24 signals have a scale of sqrt((2 x 8^2 + 24) / 64) = 1.54.
    out = encoder.conv_out
    out.weight.zero_()
    out.bias.zero_()
    out.bias[LATENTS:] = -6.0  # log variance: a standard deviation of 0.05
    for channel in range(LATENTS):
        out.weight[channel, channel, 1, 1] = 1.6
        out.weight[channel, LATENTS + channel, 1, 1] = -1.6
    _identity(vae.quant_conv, 0.0)
    _identity(vae.post_quant_conv, 0.0)


def _start_decoder(vae: AutoencoderKL, expand: Tensor, mean: Tensor) -> None:
    """Let the decoder return the mean colour of each patch, smoothly enlarged.

    Args:
        vae: Changed in place.
        expand: From latents to patches, shape (12, 48).
        mean: The mean patch, shape (48,).
    """
    # 1. Latents become mean colours, again with both signs: channels 0 to 2 and 3 to 5. Channels 6
    # and 7 are the anchors.
    decoder = vae.decoder
    colours, mean_colour = expand.view(LATENTS, 3, 16).mean(2), mean.view(3, 16).mean(1)
    conv = decoder.conv_in
    conv.weight *= 0.2
    conv.bias.zero_()
    conv.weight[:8] = 0.0
    for channel in range(3):
        for sign, at in ((1.0, channel), (-1.0, 3 + channel)):
            conv.weight[at, :, 1, 1] = sign * colours[:, channel]
            conv.bias[at] = sign * mean_colour[channel]
    conv.bias[6], conv.bias[7] = _ANCHOR / 2.0, -_ANCHOR / 2.0
    # 2. After each nearest-neighbour upsampling, smooth these channels; this is about bilinear.
    smooth = torch.tensor([0.25, 0.5, 0.25], device=mean.device)
    for block in decoder.up_blocks[:2]:
        conv = block.upsamplers[0].conv
        conv.weight *= 0.3
        conv.bias.zero_()
        conv.weight[:8] = 0.0
        for channel in range(8):
            conv.weight[channel, channel] = smooth[:, None] * smooth
    # 3. The difference of both signs is the colour.
    conv = decoder.conv_out
    conv.weight *= 0.1
    conv.bias.zero_()
    conv.weight[:, :8] = 0.0
    for channel in range(3):
        conv.weight[channel, channel, 1, 1] = 1.0
        conv.weight[channel, 3 + channel, 1, 1] = -1.0


def _identity(conv: torch.nn.Conv2d, rest: float, channels: int | None = None) -> None:
    """Let a convolution pass its first channels through, and scale its other weights by `rest`."""
    count = min(channels or conv.in_channels, conv.in_channels, conv.out_channels)
    conv.weight *= rest
    conv.bias.zero_()
    conv.weight[:count] = 0.0
    middle = conv.kernel_size[0] // 2
    for channel in range(count):
        conv.weight[channel, channel, middle, middle] = 1.0


def train(work: Path, device: torch.device, steps: int) -> AutoencoderKL:
    """Train to `steps`, resuming from the last saved state, and return the averaged weights."""
    # 1. Drawings, and the model with its linear start, its optimizer and its averaged weights.
    torch.manual_seed(0)
    drawings, _ = data.draw_many(data.train_prompts(), DRAWINGS, seed=1)
    images = to_range(drawings).to(device)
    vae = new_autoencoder().to(device)
    start_linear(vae, images[:2000])
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3
    )
    average = EMAModel(vae.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)
    state = {"model": vae, "optimizer": optimizer, "average": average}
    step = checkpoint.restore(work / "autoencoder_state.pt", device, **state)
    started = time.perf_counter()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        # 2. A batch, as a function of the step, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step)
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        batch = batch.flip(-1) if step % 2 else batch
        latents = vae.encode(batch).latent_dist.mode()
        # 3. The loss. A little noise makes the decoder smooth; the penalty keeps latents small.
        noise = 0.02 * torch.randn(latents.shape, generator=generator).to(device)
        decoded = vae.decode(latents + noise, return_dict=False)[0]
        difference = decoded - batch
        loss = difference.abs().mean() + difference.square().mean()
        loss = loss + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.step(vae.parameters())
        step += 1
        if step % 200 == 0 or step == steps:
            checkpoint.save(work / "autoencoder_state.pt", step, **state)
            seconds = time.perf_counter() - started
            print(f"autoencoder step {step} {measure(vae, 64)} {seconds:.0f} s", flush=True)
    # 4. The result: averaged weights, with latents of unit variance for the UNet.
    average.copy_to(vae.parameters())
    fold_statistics(vae, images[:512])
    return vae.eval().requires_grad_(False)


def _learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: it rises over 50 steps, then falls to 1 % as a half cosine."""
    warm = min(1.0, (step + 1) / 50)
    return LEARNING_RATE * warm * (0.51 + 0.5 * math.cos(math.pi * step / steps))


def to_range(drawings: data.Pixels) -> Tensor:
    """Return drawings (N, H, W, 3) in bytes as (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def measure(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """Return how well held-out drawings are reconstructed: PSNR in dB, and the share all right."""
    heldout = data.heldout_prompts()
    drawings, chosen = data.draw_many(heldout, count, seed=9)
    images = to_range(drawings).to(vae.device)
    decoded = vae.decode(vae.encode(images).latent_dist.mode(), return_dict=False)[0].clamp(-1, 1)
    # PSNR compares with the range of the values, here 2, whose square is 4.
    error = float((decoded - images).square().mean())
    back = ((decoded + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    checks = check(back, [heldout[i] for i in chosen])
    return {
        "psnr_db": round(10.0 * math.log10(4.0 / error), 2),
        "all_right": round(float(np.mean([c.all_right for c in checks])), 3),
    }


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1 on some images.

    The UNet then needs no scaling factor. Only the two 1 x 1 convolutions around the latents
    change, and reconstructions stay the same.

    Args:
        vae: Changed in place.
        images: Shape (B, 3, H, W), in [-1, 1].
    """
    latents = vae.encode(images).latent_dist.mode()  # (B, 12, h, w)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    inwards, outwards = vae.quant_conv, vae.post_quant_conv
    inwards.weight[:LATENTS] /= std.view(-1, 1, 1, 1)
    inwards.bias[:LATENTS] = (inwards.bias[:LATENTS] - mean) / std
    # The second half of the channels is the log variance, which scales with 1 / std^2.
    inwards.bias[LATENTS:] -= 2.0 * std.log()
    # Bias first: it needs the weights before they are scaled.
    outwards.bias += outwards.weight[:, :, 0, 0] @ mean
    outwards.weight *= std.view(1, -1, 1, 1)
