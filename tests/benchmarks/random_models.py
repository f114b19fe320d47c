"""Models with random weights to time: what a step takes does not depend on their values.

Run in a process of its own, which gives all memory of the GPU back.

Run:  python tests/benchmarks/random_models.py sd-1.5 FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from sides import ROOT
from transformers import CLIPTextConfig, CLIPTextModel

from alignprop_cli.models.families import ARCHITECTURES

sys.path.insert(0, str(ROOT))
from tests.factories import mid_pipeline, small_pipeline, small_tokenizer


def small(folder: Path) -> Path:
    """Write a pipeline for images of 16 x 16 pixels."""
    return small_pipeline(folder, text_max_position_embeddings=77)


def sd_15(folder: Path) -> Path:
    """Write the architecture of Stable Diffusion 1.5 in bfloat16, with a tokenizer of letters."""
    shapes = ARCHITECTURES / "sd-1.5"
    text = json.loads((shapes / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    scheduler = DDIMScheduler.load_config(shapes, subfolder="scheduler")
    torch.manual_seed(0)
    # On a GPU drawing a billion numbers takes no time.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
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


if __name__ == "__main__":
    writers = {"small": small, "mid": mid_pipeline, "sd-1.5": sd_15}
    writers[sys.argv[1]](Path(sys.argv[2]))
