"""Builders of small rectified flows with random weights, of diffusers' real classes.

As in factories.py they are not trained: tests that use them compare numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.factories import small_tokenizer

SD3_WIDTH = 48
"""Width of the text embeddings of `small_sd3`; the two CLIPs together have 24 + 16."""


def t5_tokenizer(path: Path) -> T5TokenizerFast:
    """Write a T5 tokenizer that reads single letters, and return it."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in letters]
    T5TokenizerFast(vocab=vocab, extra_ids=0).save_pretrained(path)
    return T5TokenizerFast.from_pretrained(path)


def small_clip_text(path: Path, *, width: int, projection: int) -> tuple[Any, Any]:
    """Return (tokenizer, encoder) of a CLIP text tower with 16 positions."""
    tokenizer = small_tokenizer(path)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return tokenizer, CLIPTextModelWithProjection(config)


def small_vae(**options: Any) -> AutoencoderKL:
    """Return an autoencoder of 8 channels whose latents are half as wide as the image."""
    made = AutoencoderKL(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **options,
        }
    )
    return made


def small_qwen_vae(**options: Any) -> AutoencoderKLQwenImage:
    """Return Qwen-Image's autoencoder of 4 channels whose latents are half as wide as the image."""
    return AutoencoderKLQwenImage(
        **{
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [True],
            "latents_mean": [-0.8, 0.1, 1.5, -0.2],
            "latents_std": [2.8, 1.5, 1.2, 2.0],
            **options,
        }
    )


def small_sd3(path: Path, *, t5: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """Write a StableDiffusion3Pipeline with random weights: latents (8, 8, 8), images 16 x 16.

    Args:
        path: Folder to write.
        t5: Whether it has the third text encoder.
        seed: Of the weights.
        **overrides: Options of the transformer, with `scheduler_` or `vae_` before those of others.

    Returns:
        The folder.
    """
    network: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": SD3_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "out_channels": 8,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    scheduler: dict[str, Any] = {"shift": 3.0}
    vae: dict[str, Any] = {}
    parts = {"scheduler_": scheduler, "vae_": vae}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, network)[key.removeprefix(prefix)] = value

    def make() -> StableDiffusion3Pipeline:
        words, clip = small_clip_text(path / "tokenizer", width=24, projection=12)
        words_2, clip_2 = small_clip_text(path / "tokenizer_2", width=16, projection=8)
        words_3 = t5_tokenizer(path / "tokenizer_3") if t5 else None
        t5_config = T5Config(
            vocab_size=len(words_3) if words_3 else 8,
            d_model=SD3_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
        return StableDiffusion3Pipeline(
            transformer=lively(SD3Transformer2DModel(**network)),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=small_vae(**vae),
            text_encoder=clip,
            tokenizer=words,
            text_encoder_2=clip_2,
            tokenizer_2=words_2,
            text_encoder_3=T5EncoderModel(t5_config) if t5 else None,
            tokenizer_3=words_3,
        )

    _seeded(seed, make).save_pretrained(path)
    return path


def small_flux1(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a FluxPipeline with random weights: latents (8, 8, 8), images 16 x 16.

    As FLUX.1-dev it takes the guidance scale as an input. The pipeline's own default size is
    256 x 256.

    Args:
        path: Folder to write.
        seed: Of the weights.
        **overrides: Options of the transformer, with `scheduler_` or `vae_` before those of others.

    Returns:
        The folder.
    """
    network: dict[str, Any] = {
        "in_channels": 32,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    scheduler: dict[str, Any] = {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_image_seq_len": 4,
        "max_image_seq_len": 40,
    }
    vae: dict[str, Any] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    parts = {"scheduler_": scheduler, "vae_": vae}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, network)[key.removeprefix(prefix)] = value

    def make() -> FluxPipeline:
        words, clip = small_clip_text(path / "tokenizer", width=16, projection=16)
        words_2 = t5_tokenizer(path / "tokenizer_2")
        t5_config = T5Config(
            vocab_size=len(words_2),
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
        return FluxPipeline(
            transformer=lively(FluxTransformer2DModel(**network)),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=small_vae(**vae),
            text_encoder=CLIPTextModel(clip.config),
            tokenizer=words,
            text_encoder_2=T5EncoderModel(t5_config),
            tokenizer_2=words_2,
        )

    _seeded(seed, make).save_pretrained(path)
    return path


def small_schnell(path: Path, **overrides: Any) -> Path:
    """Write `small_flux1` as FLUX.1-schnell is: without guidance, and a schedule without shift."""
    static = {"scheduler_use_dynamic_shifting": False, "scheduler_shift": 1.0}
    return small_flux1(path, guidance_embeds=False, **{**static, **overrides})


def qwen_tokenizer(path: Path) -> Qwen2TokenizerFast:
    """Write a Qwen tokenizer that reads single bytes, with a chat template, and return it."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    made = Qwen2TokenizerFast(vocab=vocab, merges=[], additional_special_tokens=marks[1:])
    # The part of Qwen3's template that a single message reaches.
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}"
    )
    made.save_pretrained(path)
    return Qwen2TokenizerFast.from_pretrained(path)


def small_klein(path: Path, *, is_distilled: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """Write a Flux2KleinPipeline with random weights: latents (16, 8, 8), images 32 x 32.

    The pipeline's own default size is 256 x 256.

    Args:
        path: Folder to write.
        is_distilled: Whether it was distilled without guidance.
        seed: Of the weights.
        **overrides: Options of the transformer, with `scheduler_`, `vae_` or `text_` before those
            of others.

    Returns:
        The folder.
    """
    network: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 32,
        "guidance_embeds": False,
    }
    scheduler: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
    vae: dict[str, Any] = {
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
        "latent_channels": 4,
    }
    text: dict[str, Any] = {"num_hidden_layers": 28}
    parts = {"scheduler_": scheduler, "vae_": vae, "text_": text}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, network)[key.removeprefix(prefix)] = value

    def make() -> Flux2KleinPipeline:
        words = qwen_tokenizer(path / "tokenizer")
        config = Qwen3Config(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            **text,
        )
        autoencoder = AutoencoderKLFlux2(**vae)
        # Statistics that are far from those of noise.
        autoencoder.bn.running_mean.normal_()
        autoencoder.bn.running_var.uniform_(0.5, 2.0)
        return Flux2KleinPipeline(
            transformer=lively(Flux2Transformer2DModel(**network)),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=autoencoder,
            text_encoder=Qwen3ForCausalLM(config),
            tokenizer=words,
            is_distilled=is_distilled,
        )

    _seeded(seed, make).save_pretrained(path)
    return path


def small_zimage(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a ZImagePipeline with random weights: latents (8, 8, 8), images 64 x 64.

    The pipeline's own default size is 1024 x 1024, which is the largest that it has positions for.

    Args:
        path: Folder to write.
        seed: Of the weights.
        **overrides: Options of the transformer, with `scheduler_` or `vae_` before those of others.

    Returns:
        The folder.
    """
    network: dict[str, Any] = {
        "in_channels": 8,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [600, 64, 64],
    }
    scheduler: dict[str, Any] = {"shift": 3.0}
    vae: dict[str, Any] = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "sample_size": 64,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    parts = {"scheduler_": scheduler, "vae_": vae}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, network)[key.removeprefix(prefix)] = value

    def make() -> ZImagePipeline:
        words = qwen_tokenizer(path / "tokenizer")
        config = Qwen3Config(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
        transformer = lively(ZImageTransformer2DModel(**network))
        # What fills texts and images up to whole multiples of 32 tokens; zeros when made.
        transformer.x_pad_token.data.normal_()
        transformer.cap_pad_token.data.normal_()
        return ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=small_vae(**vae),
            text_encoder=Qwen3Model(config),
            tokenizer=words,
        )

    _seeded(seed, make).save_pretrained(path)
    return path


def small_qwen_image(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a QwenImagePipeline with random weights: latents (4, 8, 8), images 16 x 16.

    The pipeline's own default size is 256 x 256.

    Args:
        path: Folder to write.
        seed: Of the weights.
        **overrides: Options of the transformer, with `scheduler_` or `vae_` before those of others.

    Returns:
        The folder.
    """
    network: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    scheduler: dict[str, Any] = {
        "use_dynamic_shifting": True,
        "base_image_seq_len": 4,
        "max_image_seq_len": 40,
        "max_shift": 0.9,
        "shift_terminal": 0.02,
    }
    vae: dict[str, Any] = {}
    parts = {"scheduler_": scheduler, "vae_": vae}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, network)[key.removeprefix(prefix)] = value

    def make() -> QwenImagePipeline:
        words = qwen_tokenizer(path / "tokenizer")
        text = {
            "vocab_size": len(words),
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        }
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": 24})
        return QwenImagePipeline(
            transformer=lively(QwenImageTransformer2DModel(**network)),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=small_qwen_vae(**vae),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=words,
        )

    _seeded(seed, make).save_pretrained(path)
    return path


def krea2_tokenizer(path: Path) -> Qwen2TokenizerFast:
    """Write a tokenizer of bytes that makes as many tokens of Krea 2's template as the real one."""
    empty: Any = Krea2Pipeline(**dict.fromkeys(_KREA2_PARTS))  # type: ignore[arg-type]
    prefix, most = empty.prompt_template_encode_prefix, empty.prompt_template_encode_start_idx
    words = qwen_tokenizer(path)
    # One token for what is too much of the first sentence.
    start, surplus = prefix.index("Describe"), len(words(prefix).input_ids) - most + 1
    words.add_tokens([prefix[start : start + surplus], "assistant"])
    return words


_KREA2_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")


def small_krea2(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a Krea2Pipeline with random weights: latents (4, 8, 8), images 64 x 64.

    As Krea 2 Raw it was not distilled. The pipeline's own default size is 1024 x 1024.

    Args:
        path: Folder to write.
        seed: Of the weights.
        **overrides: Options of the transformer, with `scheduler_`, `vae_`, `encoder_` or
            `pipeline_` before those of others.

    Returns:
        The folder.
    """
    network: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 24,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    scheduler: dict[str, Any] = {
        "use_dynamic_shifting": True,
        "base_image_seq_len": 4,
        "max_image_seq_len": 100,
    }
    vae: dict[str, Any] = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    text: dict[str, Any] = {"num_hidden_layers": 6}
    pipeline: dict[str, Any] = {"text_encoder_select_layers": (1, 3, 6)}
    parts = {"scheduler_": scheduler, "vae_": vae, "encoder_": text, "pipeline_": pipeline}
    for key, value in overrides.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), "")
        parts.get(prefix, network)[key.removeprefix(prefix)] = value

    def make() -> Krea2Pipeline:
        words = krea2_tokenizer(path / "tokenizer")
        size: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32}
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
        vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1}
        config = Qwen3VLConfig(
            text_config={"vocab_size": len(words), **size, **heads, **text},
            vision_config={**vision, "out_hidden_size": 24, "num_position_embeddings": 16},
        )
        transformer = lively(Krea2Transformer2DModel(**network))
        # Norms and modulations, which are zeros when made.
        for name, parameter in transformer.named_parameters():
            if name.endswith(("scale_shift_table", "norm.weight", "norm1.weight", "norm2.weight")):
                parameter.data.normal_(std=0.1)
            # The network multiplies the time by 1000, so its rounding in bfloat16 is not small.
            if name.startswith("time_") and parameter.ndim > 1:
                parameter.data.mul_(0.5)
        return Krea2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=small_qwen_vae(**vae),
            text_encoder=Qwen3VLModel(config),
            tokenizer=words,
            **pipeline,
        )

    _seeded(seed, make).save_pretrained(path)
    return path


def _seeded(seed: int, builder: Callable[[], Any]) -> Any:
    """Run a builder that takes its random weights from the global generator, and put that back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder()


def lively(network: Any) -> Any:
    """Return the network with larger weights, so that prompt and timestep change its output."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
    return network


def as_given(pipeline: Any, noise: torch.Tensor) -> torch.Tensor:
    """Return noise (B, C, h, w) in the form in which a pipeline takes it as `latents`."""
    if isinstance(pipeline, FluxPipeline | Krea2Pipeline | QwenImagePipeline):
        return pipeline._pack_latents(noise, *noise.shape)
    return noise


def scale_of(pipeline: Any, scale: float, images: int = 1) -> dict[str, Any]:
    """Return the arguments with which a pipeline is guided, its negative prompt empty."""
    if isinstance(pipeline, QwenImagePipeline):
        # Without a negative prompt it does not guide; it has another name for the scale.
        return {"true_cfg_scale": scale, "negative_prompt": [""] * images}
    return {"guidance_scale": scale}


def randn_like_latents(shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    """Return the noise that both sides of a comparison begin with."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
