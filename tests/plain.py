"""The same images by our own chain and by a plain pipeline of diffusers, with a LoRA or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.guidance import guided
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.sampling import rollout


@torch.no_grad()
def both(
    folder: Path, kind: Any, file: Path | None, sample: Mapping[str, Any], prompts: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """Return (ours, theirs) of every prompt, (1, 3, H, W) in [0, 1], of the noise of `evaluate`.

    Args:
        folder: A model in diffusers format.
        kind: The class of its pipeline.
        file: A LoRA for `load_lora_weights`; None for the base model.
        sample: Values of the `sample` section; deterministic.
        prompts: Each is drawn by itself.
    """
    config = SampleConfig(**sample)
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    model = open_model(
        ModelConfig(id=str(folder), dtype="float32"), [*prompts, ""], torch.device("cpu")
    )
    chain = sampler(config, model.family, model.network)
    if file is not None:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        lora.load(model.network.module, files.read(file), "model")
    size = {"height": config.height, "width": config.width} if config.height else {}
    shape = model.network.latent_shape(config.height, config.width)
    found: list[tuple[Tensor, Tensor]] = []
    for number, prompt in enumerate(prompts):
        noise = rng.image_noise(0, "eval_noise", [(number, 0)], shape)
        theirs = pipeline(
            prompt=prompt,
            latents=noise.clone(),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            output_type="pt",
            **size,
        ).images
        text = model.conditioning([prompt], "" if chain.guidance.enabled else None)
        denoise = guided(model.network.predict, text, chain.guidance)
        schedule = chain.schedule(model.network, shape)
        ours = model.decoder.decode(rollout(denoise, noise, schedule, eta=0.0))
        found.append((ours, theirs))
    return found
