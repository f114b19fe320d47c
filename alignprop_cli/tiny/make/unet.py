"""Stage two of the embedded model: the UNet and the text encoder, trained together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.checker import check
from alignprop_cli.tiny.make import checkpoint
from alignprop_cli.tiny.make.tokenizer import MAX_LENGTH

DRAWINGS = 32_000
"""Drawings that are encoded once, each also mirrored."""
BATCH = 64
LEARNING_RATE = 1.5e-3
CAPTION_DROP = 0.1
"""Share of the prompts that are replaced by an empty one, for classifier-free guidance."""
# Share of the steps, at the end, over which the learning rate falls to zero.
_FALL = 0.27
# Drawings or samples at a time, which bounds the memory.
_ENCODED_AT_A_TIME = 200
_SAMPLED_AT_A_TIME = 50


def scheduler() -> DDIMScheduler:
    """Return the noise schedule: that of Stable Diffusion, rescaled to zero terminal SNR.

    At zero SNR the noisy latents do not depend on the image, so noise prediction would learn
    nothing there; hence v prediction.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet of 4.0 M parameters."""
    return UNet2DConditionModel(
        sample_size=12,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=96,  # hidden_size of the text encoder
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder of 0.2 M parameters."""
    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, work: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return latents (2 N, 12, 12, 12) in float16 and prompt numbers (2 N,); cached in a file."""
    file = work / "latents.pt"
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        return kept["latents"], kept["chosen"]
    drawings, chosen = data.draw_many(data.train_prompts(), DRAWINGS, seed=3)
    # No prompt of the language names a side, so a mirrored drawing has the same prompt.
    parts: list[Tensor] = []
    for flip in (False, True):
        for start in range(0, DRAWINGS, _ENCODED_AT_A_TIME):
            batch = torch.from_numpy(drawings[start : start + _ENCODED_AT_A_TIME])
            batch = batch.permute(0, 3, 1, 2)  # (B, 3, 48, 48)
            images = (batch.flip(-1) if flip else batch).to(device).float() / 127.5 - 1.0
            parts.append(vae.encode(images).latent_dist.mode().half().cpu())
    numbers = torch.from_numpy(np.concatenate([chosen, chosen]))
    torch.save({"latents": torch.cat(parts), "chosen": numbers}, file)
    return torch.cat(parts), numbers


def train(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, device: torch.device, steps: int
) -> StableDiffusionPipeline:
    """Train to `steps`, resuming from the last saved state, and return the averaged model."""
    # 1. The model, its optimizer, and the moving average of its weights, which is what is kept.
    torch.manual_seed(4)
    unet, text = new_unet().to(device), new_text_encoder(tokenizer).to(device)
    both = torch.nn.ModuleDict({"unet": unet, "text": text})
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3
    )
    average = EMAModel(both.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    state = {"model": both, "optimizer": optimizer, "average": average}
    step = checkpoint.restore(work / "unet.pt", device, **state)
    # 2. All data, encoded in advance. The last tokens are those of the empty prompt.
    latents, chosen = encode_drawings(vae, work, device)
    tokens = _tokens(tokenizer, [*data.train_prompts(), ""])
    noise_levels = scheduler().alphas_cumprod.to(device)
    started, losses = time.perf_counter(), []
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        # 3. A batch, as a function of the step, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        prompts = chosen[pick].clone()
        prompts[torch.rand(BATCH, generator=generator) < CAPTION_DROP] = len(tokens) - 1
        # 4. The loss of v prediction: v = alpha noise - sigma x0 from x_t = alpha x0 + sigma noise.
        x0 = latents[pick].float().to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        timesteps = torch.randint(1000, (BATCH,), generator=generator).to(device)
        signal = noise_levels[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = signal.sqrt(), (1.0 - signal).sqrt()
        embeds = text(tokens[prompts].to(device))[0]  # (B, 16, 96)
        velocity = unet(alpha * x0 + sigma * noise, timesteps, embeds, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity, alpha * noise - sigma * x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.step(both.parameters())
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"unet step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == steps:
            checkpoint.save(work / "unet.pt", step, **state)
        # Sampling takes much longer than a step.
        if step % 1500 == 0 or step == steps:
            pipeline = assemble(vae, both, average, tokenizer)
            print(f"unet step {step} checker {measure(pipeline, 64)}", flush=True)
    return assemble(vae, both, average, tokenizer)


def _learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: it rises over 200 steps, stays, and falls to zero at the end."""
    # Shapes are learned late and only at the full rate; the fall at the end refines them.
    rise, fall = (step + 1) / 200, (steps - step) / (_FALL * steps)
    return LEARNING_RATE * min(rise, fall, 1.0)


def assemble(
    vae: AutoencoderKL, both: torch.nn.ModuleDict, average: EMAModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Return a pipeline with the averaged weights; those in training stay as they are."""
    copied = copy.deepcopy(both)
    average.copy_to(copied.parameters())
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=copied["text"].eval(),
        tokenizer=tokenizer,
        unet=copied["unet"].eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(
    pipeline: Callable[..., Any],
    count: int,
    *,
    steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> tuple[data.Pixels, list[str]]:
    """Return images (count, 48, 48, 3) of held-out prompts, spread evenly, and the prompts."""
    # Every k-th prompt if there are more prompts than samples, else all prompts in turn.
    heldout = data.heldout_prompts()
    prompts = [heldout[i * len(heldout) // count % len(heldout)] for i in range(count)]
    if count > len(heldout):
        prompts = [heldout[i % len(heldout)] for i in range(count)]
    parts: list[data.Pixels] = []
    for start in range(0, count, _SAMPLED_AT_A_TIME):
        batch = prompts[start : start + _SAMPLED_AT_A_TIME]
        # One generator for each image, so that an image does not depend on the size of its batch.
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images = pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        parts.append(np.rint(images * 255.0).astype(np.uint8))
    return np.concatenate(parts), prompts


def measure(
    pipeline: Callable[..., Any], count: int, *, guidance_scale: float = 3.0
) -> dict[str, float]:
    """Return which shares of samples of held-out prompts the checker finds right, by part."""
    checks = check(*samples(pipeline, count, guidance_scale=guidance_scale))
    names = ("background", "colour", "shape", "count", "all_right")
    return {name: round(float(np.mean([getattr(c, name) for c in checks])), 3) for name in names}


def _tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Return token numbers, shape (prompts, MAX_LENGTH)."""
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
