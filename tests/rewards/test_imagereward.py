"""ImageReward on a small checkpoint in the published format, against timm and plain torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from alignprop_cli.errors import AssetError
from alignprop_cli.rewards import imagereward
from alignprop_cli.rewards.imagereward import ImageReward
from tests.factories import generator

PROMPTS = ["a cat", "two dogs", "a boat on a lake"]
WIDTH, TEXT_WIDTH, HEADS, LAYERS, SIZE = 128, 32, 4, 2, 32
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "two", "dogs", "boat", "on", "lake")
CONFIG = {
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


def published_state() -> dict[str, Tensor]:
    """Random tensors under the names of ImageReward.pt."""
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
    add(f"{text}.embeddings.word_embeddings.weight", CONFIG["vocab_size"], TEXT_WIDTH)  # type: ignore[arg-type]
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


def write(folder: Path, state: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("imagereward"), published_state())


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(str(folder), str(folder)).to(torch.device("cpu"))


def pictures(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((3, 3, height, width), generator=generator(0), dtype=dtype)


def plain_text_tower(state: Mapping[str, Tensor], tokens: Tensor, seen: Tensor) -> Tensor:
    """BERT with cross-attention, post-norm, in plain torch: tokens (B, L), seen (B, N, width)."""
    text = "blip.text_encoder"

    def project(name: str, inputs: Tensor) -> Tensor:
        return linear(inputs, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, inputs: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return layer_norm(inputs, (TEXT_WIDTH,), weight, bias, eps=1e-12)

    def attend(name: str, hidden: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            project(f"{name}.self.{part}", inputs).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part, inputs in (("query", hidden), ("key", source), ("value", source))
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = project(f"{name}.output.dense", mixed.transpose(1, 2).flatten(-2))
        return norm(f"{name}.output.LayerNorm", mixed + hidden)

    hidden = state[f"{text}.embeddings.word_embeddings.weight"][tokens]
    hidden = (
        hidden + state[f"{text}.embeddings.position_embeddings.weight"][None, : tokens.shape[1]]
    )
    hidden = norm(f"{text}.embeddings.LayerNorm", hidden)
    is_word = (tokens != 0)[:, None, None, :]
    for index in range(LAYERS):
        layer = f"{text}.encoder.layer.{index}"
        hidden = attend(f"{layer}.attention", hidden, hidden, is_word)
        hidden = attend(f"{layer}.crossattention", hidden, seen, None)
        wide = project(
            f"{layer}.output.dense", gelu(project(f"{layer}.intermediate.dense", hidden))
        )
        hidden = norm(f"{layer}.output.LayerNorm", wide + hidden)
    return hidden


def encoded(prompt: str) -> list[int]:
    words = [WORDS.index(word) for word in ("[CLS]", *prompt.split(), "[SEP]")]
    return words + [0] * (35 - len(words))


def test_the_rating_is_that_of_timms_vision_transformer_and_a_plain_bert(
    reward: ImageReward,
) -> None:
    state = published_state()
    tower = vision_tower()
    tower.load_state_dict(
        {
            name.removeprefix("blip.visual_encoder."): tensor
            for name, tensor in state.items()
            if name.startswith("blip.visual_encoder.")
        }
    )
    images = pictures(SIZE, SIZE)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        seen = tower.forward_features((images - mean) / std)
        torch.testing.assert_close(reward._see(images), seen, rtol=0.0, atol=1e-5)
        tokens = torch.tensor([encoded(prompt) for prompt in PROMPTS])
        rating = plain_text_tower(state, tokens, seen)[:, 0]
        for place in (0, 2, 4, 6, 7):
            rating = linear(
                rating, state[f"mlp.layers.{place}.weight"], state[f"mlp.layers.{place}.bias"]
            )
        expected = (rating[:, 0] - 0.16717362830052426) / 1.0333394966054072
        torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0.0, atol=1e-5)


def test_the_epsilon_of_the_vision_norms_matters(reward: ImageReward) -> None:
    images = pictures(SIZE, SIZE)
    norms = [m for m in reward._vision.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    seen = reward._see(images)
    try:
        for norm in norms:
            norm.eps = 1e-5  # the default of BlipVisionConfig
        assert float((reward._see(images) - seen).abs().max()) > 1e-5
    finally:
        for norm in norms:
            norm.eps = 1e-6


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 100), (20, 33), (1024, 768)])
def test_one_finite_number_per_image_with_a_gradient_for_each(
    reward: ImageReward, height: int, width: int
) -> None:
    images = pictures(height, width).requires_grad_()
    rewards = reward(images, PROMPTS)
    assert rewards.shape == (3,)
    assert rewards.dtype == torch.float32
    assert torch.isfinite(rewards).all()
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_the_same_alone_and_in_a_batch(reward: ImageReward) -> None:
    images = pictures(40, 48)
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=0.0, atol=1e-5)


def test_the_prompt_matters_up_to_its_35th_token(reward: ImageReward) -> None:
    images = pictures(SIZE, SIZE)
    assert not torch.allclose(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))
    long = "a " * 33
    torch.testing.assert_close(
        reward(images, [long + "cat"] * 3), reward(images, [long + "boat on a lake"] * 3)
    )


def test_gradcheck(folder: Path) -> None:
    reward = ImageReward(str(folder), str(folder)).to(torch.device("cpu"), torch.float64)
    images = pictures(8, 9, torch.float64)[:1].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reward(x, PROMPTS[:1]), [images], fast_mode=True, atol=1e-6
    )


def test_it_is_frozen_in_evaluation_and_runs_in_float32_under_autocast(
    reward: ImageReward,
) -> None:
    for module in (reward._vision, reward._text, reward._head):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    images = pictures(SIZE, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(images, PROMPTS)
    torch.testing.assert_close(under, reward(images, PROMPTS))


def test_the_file_itself_may_be_named(folder: Path, reward: ImageReward) -> None:
    named = ImageReward(str(folder / "ImageReward.pt"), str(folder))
    images = pictures(SIZE, SIZE)
    torch.testing.assert_close(named(images, PROMPTS), reward(images, PROMPTS))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("blip.visual_encoder.norm.weight"), "lacks post_layernorm.weight"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "pos_embed"),
        (lambda s: s.pop("mlp.layers.4.bias"), r"lacks 4\.bias"),
        (lambda s: s.update({"blip.text_encoder.more": torch.ones(1)}), "unknown more"),
        (lambda s: s.update({"mlp.layers.7.weight": torch.ones(1, 9)}), "from 32 to 1"),
        (lambda s: s.clear(), r"no tensor blip\.visual_encoder"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: object, match: str) -> None:
    state = published_state()
    change(state)  # type: ignore[operator]
    write(tmp_path, state)
    with pytest.raises(AssetError, match=rf"reward\.imagereward\.weights: cannot load .*{match}"):
        ImageReward(str(tmp_path), str(tmp_path))


def test_missing_and_damaged_files_are_reported(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(AssetError, match="no such file or folder"):
        ImageReward(str(tmp_path / "nothing"), str(folder))
    with pytest.raises(AssetError, match=r"holds no ImageReward\.pt"):
        ImageReward(str(tmp_path), str(folder))
    (tmp_path / "ImageReward.pt").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(AssetError, match=r"holds no med_config\.json"):
        ImageReward(str(tmp_path), str(folder))
    (tmp_path / "med_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(AssetError, match=r"cannot load .*ImageReward\.pt"):
        ImageReward(str(tmp_path), str(folder))
    (tmp_path / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes())
    with pytest.raises(AssetError, match=r"cannot load .*med_config\.json"):
        ImageReward(str(tmp_path), str(folder))
    with pytest.raises(AssetError, match=r"reward\.imagereward\.tokenizer: cannot load"):
        ImageReward(str(folder), str(tmp_path / "nothing"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, folder: Path
) -> None:
    words = [*WORDS, *(f"word{number}" for number in range(10))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    with pytest.raises(AssetError, match=r"has \d+ tokens, the model reads 16"):
        ImageReward(str(folder), str(tmp_path))


def test_a_hub_id_without_the_network_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="cannot load nobody/nothing") as caught:
        ImageReward("nobody/nothing")
    assert "reward.imagereward.weights" in str(caught.value.hint)


def test_timms_names_become_transformers_names() -> None:
    assert imagereward._renamed("blocks.3.attn.qkv.weight") == (
        "encoder.layers.3.self_attn.qkv.weight"
    )
    assert imagereward._renamed("blocks.0.norm2.bias") == "encoder.layers.0.layer_norm2.bias"
    assert imagereward._renamed("norm.bias") == "post_layernorm.bias"
