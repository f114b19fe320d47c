"""ImageReward on a small checkpoint in the published format, against timm and plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from alignprop_cli.errors import AssetError
from alignprop_cli.rewards import imagereward
from alignprop_cli.rewards.imagereward import ImageReward
from tests.rewards.small import (
    HEADS,
    LAYERS,
    SIZE,
    TEXT_WIDTH,
    WORDS,
    imagereward_state,
    noise,
    vision_tower,
    write_imagereward,
)

PROMPTS = ["a cat", "two dogs", "a boat on a lake"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_imagereward(tmp_path_factory.mktemp("imagereward"), imagereward_state())


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(str(folder), str(folder)).to(torch.device("cpu"))


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
    state = imagereward_state()
    tower = vision_tower()
    tower.load_state_dict(
        {
            name.removeprefix("blip.visual_encoder."): tensor
            for name, tensor in state.items()
            if name.startswith("blip.visual_encoder.")
        }
    )
    images = noise(SIZE, SIZE)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        seen = tower.forward_features((images - mean) / std)
        torch.testing.assert_close(
            imagereward._see(reward._vision, images, torch.float32), seen, rtol=0.0, atol=1e-5
        )
        tokens = torch.tensor([encoded(prompt) for prompt in PROMPTS])
        rating = plain_text_tower(state, tokens, seen)[:, 0]
        for place in (0, 2, 4, 6, 7):
            rating = linear(
                rating, state[f"mlp.layers.{place}.weight"], state[f"mlp.layers.{place}.bias"]
            )
        expected = (rating[:, 0] - 0.16717362830052426) / 1.0333394966054072
        torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0.0, atol=1e-5)


def test_the_epsilon_of_the_vision_norms_matters(reward: ImageReward) -> None:
    images = noise(SIZE, SIZE)
    norms = [m for m in reward._vision.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    seen = imagereward._see(reward._vision, images, torch.float32)
    try:
        for norm in norms:
            norm.eps = 1e-5  # the default of BlipVisionConfig
        assert (
            float((imagereward._see(reward._vision, images, torch.float32) - seen).abs().max())
            > 1e-5
        )
    finally:
        for norm in norms:
            norm.eps = 1e-6


def test_the_prompt_matters_up_to_its_35th_token(reward: ImageReward) -> None:
    images = noise(SIZE, SIZE)
    assert not torch.allclose(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))
    long = "a " * 33
    torch.testing.assert_close(
        reward(images, [long + "cat"] * 3), reward(images, [long + "boat on a lake"] * 3)
    )


def test_the_file_itself_may_be_named(folder: Path, reward: ImageReward) -> None:
    named = ImageReward(str(folder / "ImageReward.pt"), str(folder))
    images = noise(SIZE, SIZE)
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
    state = imagereward_state()
    change(state)  # type: ignore[operator]
    write_imagereward(tmp_path, state)
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
