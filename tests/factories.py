"""Builders of small models with random weights, in the formats of diffusers and open_clip.

They are not trained: tests that use them compare numbers, never look at pictures. And of files of
one colour.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from alignprop_cli.evaluation.sheet import save_image

TEXT_WIDTH = 32
"""Width of the text embeddings of `small_pipeline`."""

PICTURE_PX = 16
"""Height and width of a picture of `small_pipeline`; its latents are (4, 8, 8)."""

SD1_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""The noise of Stable Diffusion 1.x, as arguments of a scheduler of diffusers."""


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return standard normal numbers that are a function of the seed and the shape."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def picture(path: Path, value: int = 100, size: tuple[int, int] = (8, 8), **texts: str) -> Path:
    """Write a grey PNG of (height, width) with texts inside, whatever its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(np.full((*size, 3), value, dtype=np.uint8), path, texts)
    return path


def _build(seed: int, builder: Callable[[], Any]) -> Any:
    """Run a builder that takes its random weights from the global generator, and put that back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder()


def small_tokenizer(path: Path, length: int = 16) -> CLIPTokenizer:
    """Write a CLIP tokenizer that reads single letters, and return it."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    merges = ["a t</w>", "o g</w>", "c at</w>", "d og</w>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges] + [start, end]
    path.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate(tokens)}
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        str(path / "vocab.json"),
        str(path / "merges.txt"),
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_max_length=length,
    )


def small_unet(seed: int = 0) -> UNet2DConditionModel:
    """Return a UNet with random weights and every kind of block: latents (4, 8, 8), text 32."""
    return _build(
        seed,
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
    )


def small_pipeline(
    path: Path, *, prediction_type: str = "epsilon", seed: int = 0, **overrides: Any
) -> Path:
    """Write a StableDiffusionPipeline with random weights: latents (4, 8, 8), pictures 16 x 16.

    Args:
        path: Folder to write.
        prediction_type: Of the scheduler's configuration.
        seed: Of the weights.
        **overrides: Options of the network (`in_channels`, `block_out_channels`, ...), and with a
            prefix `scheduler_`, `vae_` or `text_` those of the other parts.

    Returns:
        The folder.
    """
    unet_options: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    scheduler_options: dict[str, Any] = {
        **SD1_BETAS,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    vae_options: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": PICTURE_PX,
        "scaling_factor": 0.18215,
    }
    text_options: dict[str, Any] = {
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
    }
    parts = {"scheduler_": scheduler_options, "vae_": vae_options, "text_": text_options}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, unet_options)[key.removeprefix(prefix)] = value

    def build() -> StableDiffusionPipeline:
        tokenizer = small_tokenizer(path / "tokenizer", text_options["max_position_embeddings"])
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=end + 1,
                intermediate_size=2 * text_options["hidden_size"],
                projection_dim=text_options["hidden_size"],
                **text_options,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        vae = AutoencoderKL(**vae_options)
        # Keep pictures inside [-1, 1], where clamping does nothing.
        torch.nn.init.zeros_(vae.decoder.conv_out.bias)
        vae.decoder.conv_out.weight.data.mul_(0.5)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**unet_options),
            scheduler=DDIMScheduler(**scheduler_options),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    _build(seed, build).save_pretrained(path)
    return path


XL_WIDTHS, XL_POOLED = (32, 48), 24
"""Widths of the two text encoders of `small_xl_pipeline`, and of the pooled embedding."""


def small_xl_pipeline(
    path: Path, *, seed: int = 0, scheduler: Any = None, **overrides: Any
) -> Path:
    """Write a StableDiffusionXLPipeline with random weights: latents (4, 8, 8), pictures 16 x 16.

    Args:
        path: Folder to write.
        seed: Of the weights.
        scheduler: The model's; None is that of Stable Diffusion XL.
        **overrides: Options of the network, and with a prefix `vae_` of the autoencoder or
            `pipeline_` of the pipeline.

    Returns:
        The folder.
    """
    unet_options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        # As in Stable Diffusion XL: attention in the deep levels alone, deeper there.
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": sum(XL_WIDTHS),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + XL_POOLED,
        "norm_num_groups": 8,
    }
    vae_options: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": PICTURE_PX,
        "scaling_factor": 0.13025,
    }
    pipeline_options: dict[str, Any] = {"add_watermarker": False}
    parts = {"vae_": vae_options, "pipeline_": pipeline_options}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, unet_options)[key.removeprefix(prefix)] = value

    def text(width: int, vocab_size: int, kind: Any) -> Any:
        return kind(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=XL_POOLED,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                pad_token_id=vocab_size - 1,
            )
        )

    def build() -> StableDiffusionXLPipeline:
        tokenizers = [small_tokenizer(path / name) for name in ("tokenizer", "tokenizer_2")]
        vae = AutoencoderKL(**vae_options)
        torch.nn.init.zeros_(vae.decoder.conv_out.bias)
        vae.decoder.conv_out.weight.data.mul_(0.5)
        own = EulerDiscreteScheduler(**SD1_BETAS, steps_offset=1, timestep_spacing="leading")
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text(XL_WIDTHS[0], len(tokenizers[0]), CLIPTextModel),
            text_encoder_2=text(XL_WIDTHS[1], len(tokenizers[1]), CLIPTextModelWithProjection),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=UNet2DConditionModel(**unet_options),
            scheduler=scheduler or own,
            **pipeline_options,
        )

    _build(seed, build).save_pretrained(path)
    return path


def mid_pipeline(path: Path) -> Path:
    """Write a pipeline with a network of 34 million random weights: latents (4, 32, 32)."""
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return small_pipeline(
        path,
        seed=1,
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=(cross, cross, cross, plain),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=128,
        # The numbers of heads, whatever the name says: each is 64 wide, as in Stable Diffusion 2.x.
        attention_head_dim=(1, 2, 4, 4),
        norm_num_groups=32,
        vae_block_out_channels=(16, 32, 64, 64),
        vae_down_block_types=("DownEncoderBlock2D",) * 4,
        vae_up_block_types=("UpDecoderBlock2D",) * 4,
        vae_layers_per_block=2,
        vae_norm_num_groups=16,
        vae_sample_size=256,
        text_hidden_size=128,
        text_num_hidden_layers=4,
        text_max_position_embeddings=77,
    )


def open_clip_config(*, image_size: int = 16, width: int = 32) -> dict[str, Any]:
    """Return the configuration of a small image-text model of open_clip, with 16 features."""
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": image_size // 4,
            "width": width,
            "head_width": 8,
            "layers": 2,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }


def small_clip(path: Path, *, seed: int = 0) -> Path:
    """Write an image-text model with random weights in open_clip's format, pictures 16 x 16.

    Its tokenizer is the one that open_clip ships.

    Returns:
        The folder, to be named `local-dir:<folder>` to open_clip.
    """
    config = open_clip_config()
    model = _build(seed, lambda: open_clip.CLIP(**config))
    path.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}), encoding="utf-8"
    )
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


def aesthetic_head(features: int) -> dict[str, torch.Tensor]:
    """Return random layers under the names of LAION's published head, smaller ones."""
    sizes = (features, 24, 16, 12, 8, 1)
    state: dict[str, torch.Tensor] = {}
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        weight = randn(place, outputs, inputs, dtype=torch.float32)
        state[f"layers.{place}.weight"] = weight / inputs**0.5
        state[f"layers.{place}.bias"] = randn(100 + place, outputs, dtype=torch.float32)
    return state


def fill_lora_b(network: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Give the B matrices of an injected LoRA random values: a fresh LoRA changes nothing."""
    named = sorted((name, p) for name, p in network.named_parameters() if ".lora_B." in name)
    for index, (_, parameter) in enumerate(named):
        draw = randn(seed + index, *parameter.shape, dtype=torch.float32)
        parameter.data.copy_(scale * draw)


class KeepsFloat64(TorchFunctionMode):
    """Keeps float64 where diffusers goes down to float32: rotary embeddings and RMS norms."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        down = func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args[1:])
        if down and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
