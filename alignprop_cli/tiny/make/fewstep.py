"""Stage five of the embedded models: the flow model in four calls, its guidance distilled in.

The network of stage four, guided, draws training prompts in 12 calls. A copy of it learns to take
three of these steps at once: from each of four points of such a path, the straight line to the
next. This is progressive distillation (arXiv:2202.00512) in one stage, and guidance is distilled
with it (arXiv:2210.03142): the student gets no guidance scale, as its teacher had always the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor

from alignprop_cli.models.padding import CountedPadding
from alignprop_cli.models.sd3 import T5_LENGTH
from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.make import checkpoint
from alignprop_cli.tiny.make.flow import GUIDANCE_SCALE, averaged, embed, short, update
from alignprop_cli.tiny.make.transformer import MuonAndAdamW
from alignprop_cli.tiny.make.unet import measure

CALLS = 4
SIGMAS = [1.0 - call / CALLS for call in range(CALLS)]
"""Noise levels of the calls, before the scheduler's shift."""
BATCH = 64
PATHS = 6144
RATE = 0.3
"""Highest learning rate, as a share of those that the teacher was trained with."""
SAVED_EVERY = 500
"""Steps between two checkpoints."""
CHECKED = 96
"""Samples that the checker reads now and then while the network trains."""
# Calls of the teacher for each of the student's.
_TEACHER_CALLS = 3
# Paths that are sampled together.
_SAMPLED_AT_A_TIME = 128


def levels(pipeline: StableDiffusion3Pipeline, calls: int) -> list[float]:
    """Return the noise levels of equally spaced calls, after the scheduler's shift, and 0."""
    pipeline.scheduler.set_timesteps(sigmas=[1.0 - call / calls for call in range(calls)])
    return pipeline.scheduler.sigmas.tolist()


@torch.no_grad()
def sample_paths(
    pipeline: StableDiffusion3Pipeline, work: Path, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sample training prompts with the guided teacher; cached in a file.

    Args:
        pipeline: Of stage four, with `CountedPadding`.
        work: Where the file is.
        device: Where the teacher is.

    Returns:
        Latents at the student's levels, and at the end, (PATHS, CALLS + 1, 12, 12, 12) in float16;
        prompt numbers (PATHS,).
    """
    file = work / "paths.pt"
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        return kept["points"], kept["chosen"]
    hidden, pooled = embed(pipeline, [*data.train_prompts(), ""])
    chosen = torch.randint(len(hidden) - 1, (PATHS,), generator=torch.Generator().manual_seed(11))
    sigmas = levels(pipeline, CALLS * _TEACHER_CALLS)
    parts: list[Tensor] = []
    for start in range(0, PATHS, _SAMPLED_AT_A_TIME):
        prompts = chosen[start : start + _SAMPLED_AT_A_TIME]
        # Both branches of the guidance in one call: without the prompt, and with it.
        both = torch.cat([torch.full_like(prompts, len(hidden) - 1), prompts])
        generator = torch.Generator().manual_seed(start)
        latents = torch.randn(len(prompts), 12, 12, 12, generator=generator).to(device)
        points = [latents]
        for call, (now, after) in enumerate(itertools.pairwise(sigmas), start=1):
            timesteps = torch.full((len(both),), 1000.0 * now, device=device)
            without, with_prompt = pipeline.transformer(
                torch.cat([latents, latents]),
                hidden[both],
                pooled[both],
                timesteps,
                return_dict=False,
            )[0].chunk(2)
            latents = latents + (after - now) * torch.lerp(without, with_prompt, GUIDANCE_SCALE)
            if call % _TEACHER_CALLS == 0:
                points.append(latents)
        parts.append(torch.stack(points, dim=1).half().cpu())
        if start % (8 * _SAMPLED_AT_A_TIME) == 0:
            print(f"fewstep path {start} of {PATHS}", flush=True)
    torch.save({"points": torch.cat(parts), "chosen": chosen}, file)
    return torch.cat(parts), chosen


def train(
    teacher: StableDiffusion3Pipeline, work: Path, device: torch.device, steps: int
) -> SD3Transformer2DModel:
    """Train to `steps`, resuming from the last saved state, and return the averaged network."""
    # 1. The student starts as its teacher.
    network = copy.deepcopy(teacher.transformer).train().requires_grad_(True)
    for each in (network, teacher.transformer):
        each.set_attn_processor(CountedPadding(T5_LENGTH))
    optimizer = MuonAndAdamW(network)
    average = EMAModel(
        network.parameters(), decay=0.998, use_ema_warmup=True, power=0.75, foreach=True
    )
    state = {"model": network, "optimizer": optimizer, "average": average}
    step = checkpoint.restore(work / "fewstep.pt", device, **state)
    # 2. Paths of the teacher, and the embeddings of their prompts.
    points, chosen = sample_paths(teacher, work, device)
    hidden, pooled = embed(teacher, data.train_prompts())
    sigmas = torch.tensor(levels(teacher, CALLS))
    started, losses = time.perf_counter(), []
    while step < steps:
        optimizer.set_rate(_rate(step, steps))
        # 3. A batch, as a function of the step, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(points), (BATCH,), generator=generator)
        call = torch.randint(CALLS, (BATCH,), generator=generator)
        # 4. The flow that leads from one level to the next in a single step.
        now, after = points[pick, call].float(), points[pick, call + 1].float()
        wanted = (after - now) / (sigmas[call + 1] - sigmas[call]).view(-1, 1, 1, 1)
        prompts, timesteps = chosen[pick], (1000.0 * sigmas[call]).to(device)
        flow = network(
            now.to(device), hidden[prompts], pooled[prompts], timesteps, return_dict=False
        )
        loss = torch.nn.functional.mse_loss(flow[0], wanted.to(device))
        losses.append(update(network, optimizer, average, loss))
        step += 1
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(
                f"fewstep step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True
            )
        if step % SAVED_EVERY == 0 or step == steps:
            checkpoint.save(work / "fewstep.pt", step, **state)
        if step % 1000 == 0 or step == steps:
            student = with_network(teacher, averaged(network, average))
            found = measure(few_calls(short(student)), CHECKED, guidance_scale=0.0)
            print(f"fewstep step {step} checker {found}", flush=True)
    return averaged(network, average)


def few_calls(pipeline: object) -> functools.partial[object]:
    """Return the pipeline with the levels that it was distilled for."""
    return functools.partial(pipeline, sigmas=SIGMAS)


def with_network(
    pipeline: StableDiffusion3Pipeline, network: SD3Transformer2DModel
) -> StableDiffusion3Pipeline:
    """Return a pipeline with another network, sharing all other parts."""
    other = StableDiffusion3Pipeline(**(pipeline.components | {"transformer": network}))
    other.set_progress_bar_config(disable=True)
    return other


def _rate(step: int, steps: int) -> float:
    """Return the share of the full learning rate: it rises over 100 steps, then falls to zero."""
    return RATE * min((step + 1) / 100, 1.0 - step / steps)
