"""Small Qwen-VL models with random weights and their processors, in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from alignprop_cli.rewards import hpsv3
from tests.factories import generator

PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
"""Side of a patch, by the kind of model."""

_PROCESSORS = {
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
}
_SPECIAL = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
_VISION: Mapping[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    # Windows of 2 x 2 tokens in all blocks but one.
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
}


def small_processor(kind: str, folder: Path) -> Any:
    """Write a processor that reads bytes, and Yes and No as one token each; return it."""
    letters = [*sorted(ByteLevel.alphabet()), "es", "Yes", "No"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(letters)},
        merges=[("e", "s"), ("Y", "es"), ("N", "o")],  # type: ignore[arg-type]
    )
    names = [f"<|{name}|>" for name in _SPECIAL]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}
    images = Qwen2VLImageProcessor(patch_size=PATCH[kind], size=size)
    make, video = _PROCESSORS[kind]
    processor = make(images, tokenizer, video(), chat_template=_TEMPLATE)
    processor.save_pretrained(folder)
    return processor


def _rope(kind: str) -> dict[str, Any]:
    return {"type": "default" if kind == "qwen3_vl" else "mrope", "mrope_section": [2, 3, 3]}


def small_config(kind: str, processor: Any) -> Any:
    """Return the configuration of a small network for a processor."""
    ids = processor.tokenizer.convert_tokens_to_ids
    names = ("image", "video", "vision_start", "vision_end")
    tokens = [f"<|{name}_pad|>" if "_" not in name else f"<|{name}|>" for name in names]
    return AutoConfig.for_model(
        kind,
        text_config={
            **_TEXT,
            **({"head_dim": 16} if kind == "qwen3_vl" else {}),
            "vocab_size": len(processor.tokenizer),
            "rope_scaling": _rope(kind),
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 3,
            "num_heads": 2,
            "patch_size": PATCH[kind],
            **_VISION[kind],
        },
        **{f"{name}_token_id": ids(t) for name, t in zip(names, tokens, strict=True)},
    )


def small_qwen(kind: str, folder: Path) -> Path:
    """Write a model with random weights and its processor."""
    config = small_config(kind, small_processor(kind, folder))
    model: Any = AutoModelForImageTextToText.from_config(config)
    fill(model)
    model.save_pretrained(folder)
    return folder


def fill(module: torch.nn.Module) -> None:
    """Give all weights random values, of which none is lost in the layers' sums."""
    source = generator(3)
    for parameter in module.parameters():
        noise = 0.15 * torch.randn(parameter.shape, generator=source)
        # Scales of norms stay near 1.
        parameter.data = noise if parameter.ndim > 1 else parameter.data + noise


# --- HPSv3 ---

INSTRUCTION = "Rate it.\nThe prompt: {text_prompt}\n\nThe rating: <|Reward|>\n\nEND\n"


def shrink_hpsv3(patch: pytest.MonkeyPatch) -> None:
    """Let `HpsV3Reward` build a small network for images of 112 x 112 until it is undone."""
    patch.setattr(hpsv3, "_PIXELS", 16 * 28 * 28)
    patch.setattr(hpsv3, "_VOCABULARY", 267)
    text = {**_TEXT, "rope_scaling": _rope("qwen2_vl")}
    vision = {"depth": 3, "num_heads": 2, **_VISION["qwen2_vl"]}
    patch.setattr(hpsv3, "ARCHITECTURE", {"text_config": text, "vision_config": vision})


def hpsv3_state(kind: Any) -> dict[str, Tensor]:
    """Return random tensors under the names of HPSv3.safetensors, as transformers 4.45 had them.

    Args:
        kind: Configuration of a small Qwen2-VL, with the token of the score in its vocabulary.
    """
    model: Any = AutoModelForImageTextToText.from_config(kind)
    fill(model)
    state: dict[str, Tensor] = {"lm_head.weight": model.lm_head.weight.detach().clone()}
    for name, tensor in model.model.visual.state_dict().items():
        state[f"visual.{name}"] = tensor
    for name, tensor in model.model.language_model.state_dict().items():
        state[f"model.{name}"] = tensor
    source = generator(4)
    for place, (inputs, outputs) in {0: (32, 1024), 3: (1024, 16), 5: (16, 2)}.items():
        weight = torch.randn((outputs, inputs), generator=source) / inputs**0.5
        state[f"rm_head.{place}.weight"] = 1.5 * weight
        state[f"rm_head.{place}.bias"] = 0.2 * torch.randn(outputs, generator=source)
    return state


def small_hpsv3(folder: Path) -> dict[str, str]:
    """Write a small HPSv3 with its processor and text, and return the options that name them."""
    processor = small_processor("qwen2_vl", folder / "processor")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    state = hpsv3_state(small_config("qwen2_vl", processor))
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(INSTRUCTION, encoding="utf-8")
    return {
        "weights": str(folder),
        "processor": str(folder / "processor"),
        "instruction": str(folder / "instruction.txt"),
    }
