"""Models with random weights to time: what a step takes does not depend on their values.

Run in a process of its own, which gives all memory of the GPU back.

Run:  python tests/benchmarks/random_models.py sd-1.5 FOLDER
      python tests/benchmarks/random_models.py klein-4b FOLDER
      python tests/benchmarks/random_models.py hps FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from sides import ROOT
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from alignprop_cli.models.families import ARCHITECTURES
from alignprop_cli.rewards.hps import ARCHITECTURE as HPS

sys.path.insert(0, str(ROOT))
from tests.factories import mid_pipeline, small_pipeline, small_tokenizer
from tests.flow_models import qwen_tokenizer

# On a GPU drawing a billion numbers takes no time.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small(folder: Path) -> Path:
    """Write a pipeline for images of 16 x 16 pixels."""
    return small_pipeline(folder, text_max_position_embeddings=77)


def sd_15(folder: Path) -> Path:
    """Write the architecture of Stable Diffusion 1.5 in bfloat16, with a tokenizer of letters."""
    shapes = ARCHITECTURES / "sd-1.5"
    text = json.loads((shapes / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    scheduler = DDIMScheduler.load_config(shapes, subfolder="scheduler")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(shapes, subfolder="unet")
        )
        decoder = AutoencoderKL.from_config(AutoencoderKL.load_config(shapes, subfolder="vae"))
        encoder = CLIPTextModel(CLIPTextConfig(**text))
    with torch.no_grad():
        # Keep images inside [-1, 1], where clamping does nothing.
        decoder.decoder.conv_out.weight.mul_(0.5)
    StableDiffusionPipeline(
        vae=decoder.to(torch.bfloat16),
        text_encoder=encoder.to(torch.bfloat16),
        tokenizer=small_tokenizer(folder / "tokenizer", length=77),
        unet=network.to(torch.bfloat16),
        scheduler=DDIMScheduler.from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def klein_4b(folder: Path) -> Path:
    """Write the architecture of FLUX.2-klein 4B in bfloat16, with a tokenizer of bytes."""
    shapes = ARCHITECTURES / "flux.2-klein-4b"
    classes = (Flux2Transformer2DModel, AutoencoderKLFlux2, Qwen3ForCausalLM)
    parts = _flow(shapes, folder, *classes)
    Flux2KleinPipeline(**parts, is_distilled=True).save_pretrained(folder)
    return folder


def zimage_turbo(folder: Path) -> Path:
    """Write the architecture of Z-Image-Turbo in bfloat16, with a tokenizer of bytes."""
    shapes = ARCHITECTURES / "z-image-turbo"
    parts = _flow(shapes, folder, ZImageTransformer2DModel, AutoencoderKL, Qwen3Model)
    ZImagePipeline(**parts).save_pretrained(folder)
    return folder


def _flow(shapes: Path, folder: Path, network: Any, decoder: Any, encoder: Any) -> dict[str, Any]:
    """Return the parts of a flow that is conditioned by Qwen3."""
    text = json.loads((shapes / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        made = network.from_config(network.load_config(shapes, subfolder="transformer"))
        # Those that are made without values: Z-Image's tokens that fill up.
        for name, parameter in made.named_parameters():
            if name.endswith("pad_token"):
                parameter.data.normal_(std=0.02)
        vae = decoder.from_config(decoder.load_config(shapes, subfolder="vae"))
        qwen = encoder(Qwen3Config(**text))
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(shapes, subfolder="scheduler")
    return {
        "transformer": made,
        "vae": vae.to(torch.bfloat16),
        "text_encoder": qwen,
        "tokenizer": qwen_tokenizer(folder / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(scheduler),
    }


def hps(file: Path) -> Path:
    """Write a checkpoint of HPSv2.1's architecture."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(HPS, pretrained=None, precision="fp32", device=DEVICE)
    torch.save({"state_dict": model.state_dict()}, file)
    return file


if __name__ == "__main__":
    writers = {
        "small": small,
        "mid": mid_pipeline,
        "sd-1.5": sd_15,
        "klein-4b": klein_4b,
        "z-image-turbo": zimage_turbo,
        "hps": hps,
    }
    writers[sys.argv[1]](Path(sys.argv[2]))
