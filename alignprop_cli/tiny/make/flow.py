"""Stage four of the embedded models: a transformer of a rectified flow, in the format of SD 3.

It shares the autoencoder and the text encoder of stages one and two, which stay as they are. The
pipeline of Stable Diffusion 3 wants two text encoders: the second is the first layer of the first.
T5 is left out, and in its place the pipeline conditions on 256 tokens of zeros.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alignprop_cli.models.padding import CountedPadding
from alignprop_cli.models.sd3 import T5_LENGTH
from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.make import checkpoint
from alignprop_cli.tiny.make.transformer import MuonAndAdamW, new_transformer
from alignprop_cli.tiny.make.unet import encode_drawings, measure

BATCH = 64
CAPTION_DROP = 0.1
"""Share of the prompts that are replaced by an empty one, for classifier-free guidance."""
GUIDANCE_SCALE = 3.0
SHIFT = 1.0
"""Of the noise levels: sigma becomes s sigma / (1 + (s - 1) sigma)."""
SAVED_EVERY = 500
"""Steps between two checkpoints."""
CHECKED = 96
"""Samples that the checker reads now and then while the network trains."""
# Share of the steps, at the end, over which the learning rate falls to zero.
_FALL = 0.4
# Steps over which it rises.
_RISE = 100


def text_encoders(trained: CLIPTextModel) -> list[CLIPTextModelWithProjection]:
    """Return the text encoder of stage two, and its first layer; projections are the identity."""
    encoders: list[CLIPTextModelWithProjection] = []
    weights = trained.state_dict()
    for layers in (trained.config.num_hidden_layers, 1):
        config = trained.config.to_dict() | {"num_hidden_layers": layers}
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        kept = {name: weights[name] for name in encoder.text_model.state_dict()}
        encoder.text_model.load_state_dict(kept)
        torch.nn.init.eye_(encoder.text_projection.weight)
        encoders.append(encoder.eval().requires_grad_(False))
    return encoders


def assemble(
    tiny: StableDiffusionPipeline, network: SD3Transformer2DModel
) -> StableDiffusion3Pipeline:
    """Return a pipeline of a network and the other parts of the embedded model."""
    # The pipeline adds a shift after decoding, here none, and cannot do without the number.
    vae = copy.deepcopy(tiny.vae)
    vae.register_to_config(shift_factor=0.0)
    first, second = text_encoders(tiny.text_encoder)
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=first.to(vae.device),
        tokenizer=tiny.tokenizer,
        text_encoder_2=second.to(vae.device),
        tokenizer_2=copy.deepcopy(tiny.tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def short(pipeline: StableDiffusion3Pipeline) -> Callable[..., Any]:
    """Return the pipeline with `CountedPadding`: the same images, faster; changes it."""
    pipeline.transformer.set_attn_processor(CountedPadding(T5_LENGTH))
    return functools.partial(pipeline, max_sequence_length=1)


@torch.no_grad()
def embed(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return embeddings of prompts for `CountedPadding`: (N, 17, 192), and pooled ones (N, 192)."""
    # diffusers annotates all four as optional.
    embeds: Any = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return embeds[0], embeds[2]


@torch.no_grad()
def start_normalised(layer: torch.nn.Linear, inputs: Tensor) -> None:
    """Let a layer start as if all its inputs (..., D) had mean 0 and standard deviation 1."""
    # Those of the two text encoders differ by a factor of 60, and the smaller ones tell the words.
    inputs = inputs.flatten(0, -2)
    layer.weight /= inputs.std(dim=0)
    layer.bias -= layer.weight @ inputs.mean(dim=0)


def train(
    tiny: StableDiffusionPipeline, work: Path, device: torch.device, steps: int
) -> SD3Transformer2DModel:
    """Train to `steps`, resuming from the last saved state, and return the averaged network."""
    # 1. The network, its optimizer, and the moving average of its weights, which is what is kept.
    torch.manual_seed(10)
    network = new_transformer().to(device)
    network.set_attn_processor(CountedPadding(T5_LENGTH))
    # The last embeddings are those of the empty prompt.
    hidden, pooled = embed(assemble(tiny, network), [*data.train_prompts(), ""])
    start_normalised(network.context_embedder, hidden[:, :-1])
    optimizer = MuonAndAdamW(network)
    average = EMAModel(
        network.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True
    )
    state = {"model": network, "optimizer": optimizer, "average": average}
    step = checkpoint.restore(work / "flow.pt", device, **state)
    # 2. All drawings, encoded in advance.
    latents, chosen = encode_drawings(tiny.vae, work, device)
    started, losses = time.perf_counter(), []
    while step < steps:
        optimizer.set_rate(_rate(step, steps))
        # 3. A batch, as a function of the step, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        prompts = chosen[pick].clone()
        prompts[torch.rand(BATCH, generator=generator) < CAPTION_DROP] = len(hidden) - 1
        # 4. The loss of a rectified flow: noise - x0 from (1 - sigma) x0 + sigma noise. Sigma is a
        # logistic normal, most often 0.5 to 0.85: number, places and shapes are decided there.
        x0 = latents[pick].float().to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        sigma = (0.7 + torch.randn(BATCH, generator=generator)).sigmoid().to(device)
        mixed = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
        flow = network(mixed, hidden[prompts], pooled[prompts], 1000.0 * sigma, return_dict=False)
        loss = torch.nn.functional.mse_loss(flow[0], noise - x0)
        losses.append(update(network, optimizer, average, loss))
        step += 1
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"flow step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True)
        if step % SAVED_EVERY == 0 or step == steps:
            checkpoint.save(work / "flow.pt", step, **state)
        if step % 2000 == 0 or step == steps:
            pipeline = assemble(tiny, averaged(network, average))
            print(f"flow step {step} checker {measure(short(pipeline), CHECKED)}", flush=True)
    return averaged(network, average)


def update(
    network: torch.nn.Module, optimizer: MuonAndAdamW, average: EMAModel, loss: Tensor
) -> float:
    """Make one step of the optimizer and of the average, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    average.step(network.parameters())
    return loss.item()


def averaged(network: SD3Transformer2DModel, average: EMAModel) -> SD3Transformer2DModel:
    """Return a copy with the averaged weights; those in training stay as they are."""
    copied = copy.deepcopy(network)
    average.copy_to(copied.parameters())
    return copied.eval().requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    """Return the share of the full learning rate: it rises, stays, and falls to zero."""
    return min((step + 1) / _RISE, (steps - step) / (_FALL * steps), 1.0)
