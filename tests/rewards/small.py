"""Every shipped reward on a small configuration, random weights in the published format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Owlv2Config,
    Owlv2ForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
)

from alignprop_cli.rewards import hps
from tests.factories import (
    aesthetic_head,
    generator,
    open_clip_config,
    randn,
    small_clip,
    small_tokenizer,
)
from tests.rewards.small_qwen import shrink_hpsv3, small_hpsv3, small_qwen

SIZE = 32
"""Height and width that the networks see."""

FEATURES = 16
"""Width of the features of `transformers_clip`."""

PROMPTS = ["two cats", "one cat", "three cats"]
"""Prompts that every reward can read: they name a number of cats."""


def noise(height: int, width: int, dtype: torch.dtype = torch.float32, *, count: int = 3) -> Tensor:
    """Return white noise in [0, 1], shape (count, 3, height, width)."""
    return torch.rand((count, 3, height, width), generator=generator(0), dtype=dtype)


def transformers_clip(folder: Path) -> Path:
    """Write a CLIP with random weights and its tokenizer in transformers' format."""
    end = small_tokenizer(folder).convert_tokens_to_ids("<|endoftext|>")
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": FEATURES,
    }
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            **tower,
            vocab_size=end + 1,
            max_position_embeddings=16,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        ).to_dict(),
        vision_config=CLIPVisionConfig(**tower, image_size=SIZE, patch_size=8).to_dict(),
        projection_dim=FEATURES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    for number, parameter in enumerate(model.parameters()):  # biases too
        parameter.data += 0.02 * randn(number, *parameter.shape, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def head_file(folder: Path) -> Path:
    """Write a small head of `aesthetic` for the features of `transformers_clip`."""
    file = folder / "aesthetic-model.pth"
    torch.save(aesthetic_head(FEATURES), file)
    return file


def hps_weights(folder: Path) -> Path:
    """Write both versions of a small HPS; `shrink_hps` gives `HpsReward` its architecture."""
    for seed, file in enumerate(hps.FILES.values()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = open_clip.CLIP(**open_clip_config(image_size=SIZE)).state_dict()
        torch.save({"state_dict": state}, folder / file)
    return folder


def shrink_hps(patch: pytest.MonkeyPatch) -> None:
    """Let `HpsReward` and `HpsV3Reward` build small networks until the patch is undone."""
    shrink_hpsv3(patch)
    config = open_clip_config(image_size=SIZE)
    patch.setitem(open_clip.factory._MODEL_CONFIGS, "small-hps", config)
    patch.setattr(hps, "ARCHITECTURE", "small-hps")


@register_model
def small_siglip_tower(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Return a small one of timm's towers, of the kind that SigLIP has."""
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return _create_vision_transformer(
        "vit_base_patch16_siglip_224",
        pretrained=pretrained,
        class_token=False,
        **{"global_pool": "map", **sizes, **options},
    )


def small_siglip(folder: Path, **changes: Any) -> Path:
    """Write a SigLIP with random weights and its tokenizer in open_clip's format."""
    folder.mkdir(parents=True, exist_ok=True)
    small_tokenizer(folder).save_pretrained(folder)
    config = {
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": SIZE,
            "timm_model_name": "small_siglip_tower",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 256,
            "hf_tokenizer_name": "in this folder",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 16,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }
    config.update(changes)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        known = {name: value for name, value in config.items() if name != "custom_text"}
        model = open_clip.CustomTextCLIP(**known)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim else None
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


LABELS = {0: "N/A", 1: "cat", 2: "dog", 3: "traffic light"}


def small_yolos(path: Path) -> Path:
    """Write a YOLOS with random weights in transformers' format."""
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[32, 48],
        patch_size=16,  # the library crops to multiples of 16, whatever the patch
        num_detection_tokens=7,
        initializer_range=0.2,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YolosForObjectDetection(config)
        for name, tensor in model.named_parameters():
            if "embeddings" in name or "tokens" in name:  # zeros until trained
                torch.nn.init.normal_(tensor, std=0.5)
        model.save_pretrained(path)
    return path


def small_owlv2(path: Path) -> Path:
    """Write an OWLv2 with random weights and its tokenizer in transformers' format."""
    tokenizer = small_tokenizer(path)
    tokenizer.save_pretrained(path)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = Owlv2Config(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**sizes, "image_size": SIZE, "patch_size": 8},
        projection_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Owlv2ForObjectDetection(config)
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1 and "logit_s" not in name:
                torch.nn.init.normal_(tensor, std=0.1)
        model.save_pretrained(path)
    return path


# --- ImageReward ---

WIDTH, TEXT_WIDTH, HEADS, LAYERS = 128, 32, 4, 2
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "two", "dogs", "boat", "on", "lake")
MED_CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 16,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def vision_tower() -> VisionTransformer:
    """Return timm's vision transformer, of which ImageReward was saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = VisionTransformer(
            img_size=SIZE,
            patch_size=8,
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            num_classes=0,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )
    return tower.eval()


def imagereward_state() -> dict[str, Tensor]:
    """Return random tensors under the names of ImageReward.pt."""
    source = generator(1)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=source) / shape[-1] ** 0.5

    def add_linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", TEXT_WIDTH)
        add(f"{name}.bias", TEXT_WIDTH)
        state[f"{name}.weight"] += 1.0

    for name, tensor in vision_tower().state_dict().items():
        noise = torch.randn(tensor.shape, generator=source)
        state[f"blip.visual_encoder.{name}"] = tensor + 0.02 * noise
    text = "blip.text_encoder"
    add(f"{text}.embeddings.word_embeddings.weight", MED_CONFIG["vocab_size"], TEXT_WIDTH)  # type: ignore[arg-type]
    add(f"{text}.embeddings.position_embeddings.weight", 48, TEXT_WIDTH)
    state[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    add_norm(f"{text}.embeddings.LayerNorm")
    for index in range(LAYERS):
        layer = f"{text}.encoder.layer.{index}"
        for block, width in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            add_linear(f"{layer}.{block}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            add_linear(f"{layer}.{block}.self.key", TEXT_WIDTH, width)
            add_linear(f"{layer}.{block}.self.value", TEXT_WIDTH, width)
            add_linear(f"{layer}.{block}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            add_norm(f"{layer}.{block}.output.LayerNorm")
        add_linear(f"{layer}.intermediate.dense", 64, TEXT_WIDTH)
        add_linear(f"{layer}.output.dense", TEXT_WIDTH, 64)
        add_norm(f"{layer}.output.LayerNorm")
    add_linear("blip.vision_proj", 8, WIDTH)
    add_linear("blip.text_proj", 8, TEXT_WIDTH)
    sizes = (TEXT_WIDTH, 24, 16, 12, 8, 1)
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        add_linear(f"mlp.layers.{place}", outputs, inputs)
    return state


def write_imagereward(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write ImageReward.pt with its configuration and vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


# --- The table ---


def _aesthetic(folder: Path) -> dict[str, Any]:
    return {"head": str(head_file(folder)), "model": str(transformers_clip(folder))}


def _pickscore(folder: Path) -> dict[str, Any]:
    return dict.fromkeys(("model", "tokenizer"), str(transformers_clip(folder)))


def _clip_choice(folder: Path) -> dict[str, Any]:
    (folder / "set.txt").write_text("two cats\na dog\na boat\n", encoding="utf-8")
    return {"model": str(small_clip(folder)), "prompts": str(folder / "set.txt")}


def _imagereward(folder: Path) -> dict[str, Any]:
    written = write_imagereward(folder, imagereward_state())
    return dict.fromkeys(("weights", "tokenizer"), str(written))


def _detector(write: Callable[[Path], Path]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"object": "cat", "model": str(write(folder))}


SMALL: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "aesthetic": _aesthetic,
    "clip": lambda folder: {"model": str(small_clip(folder))},
    "clip_choice": _clip_choice,
    "clip_count": lambda folder: {"model": str(small_clip(folder))},
    "hps v2.1": lambda folder: {"weights": str(hps_weights(folder))},
    "hps v2.0": lambda folder: {"weights": str(hps_weights(folder)), "version": "v2.0"},
    "pickscore": _pickscore,
    "siglip": lambda folder: {"model": str(small_siglip(folder / "siglip"))},
    # The other kinds are held to the library in test_vlm.py.
    "vlm": lambda folder: {"model": str(small_qwen("qwen3_vl", folder / "qwen"))},
    "hpsv3": small_hpsv3,
    "imagereward": _imagereward,
    "count yolos": _detector(small_yolos),
    "count owlv2": _detector(small_owlv2),
    "remove yolos": _detector(small_yolos),
    "remove owlv2": _detector(small_owlv2),
    "compressibility size": lambda folder: {"measure": "size"},
    "compressibility round_trip": lambda folder: {"measure": "round_trip"},
    "incompressibility size": lambda folder: {"measure": "size"},
    "incompressibility round_trip": lambda folder: {"measure": "round_trip"},
    **dict.fromkeys(
        ("brightness", "contrast", "redness", "colourfulness", "symmetry"), lambda folder: {}
    ),
}
"""Of every reward, its variants after the name: writes what it loads, and returns its options."""

NETWORKS = tuple(SMALL)[:15]
"""Those that hold a pretrained network."""
