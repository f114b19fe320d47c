"""vlm against transformers' own processor and networks, on small random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.images import to_uint8
from alignprop_cli.rewards.qwen_vl import KINDS, ImageRules, patches
from alignprop_cli.rewards.vlm import VlmReward
from tests.rewards.small import noise, transformers_clip
from tests.rewards.small_qwen import PATCH, small_processor, small_qwen

PROMPTS = ["a cat", "two dogs {and} a very small boat"]
QUESTION = "Is it {prompt}?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: small_qwen(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def exact(kind: str) -> torch.Tensor:
    """Return images of a size that is not resized and of whole bytes, shape (2, 3, h, w)."""
    images = noise(6 * PATCH[kind], 8 * PATCH[kind], count=2)
    return to_uint8(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_librarys_own_answer_to_the_question(folders: dict[str, Path], kind: str) -> None:
    processor: Any = AutoProcessor.from_pretrained(folders[kind])
    model: Any = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    pictures = exact(kind)
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in (QUESTION.replace("{prompt}", prompt) for prompt in PROMPTS)
    ]
    texts = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    batch = processor(text=texts, images=list(pictures), padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths[0] != lengths[1]
    with torch.no_grad():
        logits = model(**batch).logits[torch.arange(2), lengths - 1]
    yes, no = (processor.tokenizer(word).input_ids[0] for word in ("Yes", "No"))
    expected = torch.sigmoid(logits[:, yes] - logits[:, no])
    assert float(expected.std()) > 0.01
    rewards = VlmReward(str(folders[kind]), QUESTION)(pictures / 255.0, PROMPTS)
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_images_become_the_patches_of_the_librarys_processor(
    folders: dict[str, Path], kind: str
) -> None:
    processor: Any = AutoProcessor.from_pretrained(folders[kind]).image_processor
    rules = ImageRules.of(processor)
    pictures = exact(kind)
    theirs = processor(list(pictures), return_tensors="pt")
    ours, grid = patches(pictures / 255.0, rules)
    assert theirs["image_grid_thw"].tolist() == [[1, *grid]] * 2
    torch.testing.assert_close(ours.flatten(0, 1), theirs["pixel_values"], rtol=0.0, atol=1e-6)
    # Resized, larger and smaller. Torchvision rounds to bytes after each of two passes, which is a
    # step and a half at most, over std 0.26.
    for size in ((30, 40), (300, 170)):
        smooth = torch.nn.functional.interpolate(0.2 + 0.6 * noise(25, 20), size, mode="bilinear")
        pictures = to_uint8(smooth).permute(0, 3, 1, 2)
        theirs = processor(list(pictures), return_tensors="pt")
        ours, grid = patches(pictures / 255.0, rules)
        assert theirs["image_grid_thw"].tolist() == [[1, *grid]] * 3
        torch.testing.assert_close(
            ours.flatten(0, 1), theirs["pixel_values"], rtol=0.0, atol=1.5 / 255.0 / 0.26
        )


def test_fewer_pixels_can_be_seen(folders: dict[str, Path]) -> None:
    reward = VlmReward(str(folders["qwen2_vl"]), pixels=4 * 28 * 28)
    assert patches(noise(200, 200), reward._rules)[1] == (4, 4)
    assert patches(noise(20, 20), reward._rules)[1] == (4, 4)


def test_a_model_saved_in_half_precision_is_loaded_as_it_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    source = folders["qwen2_vl"]
    small_processor("qwen2_vl", tmp_path)
    half: Any = AutoModelForImageTextToText.from_pretrained(source).bfloat16()
    half.save_pretrained(tmp_path)
    reward = VlmReward(str(tmp_path))
    assert reward.dtype == torch.bfloat16
    images = noise(84, 84)
    prompts = ["a cat", "a dog", "a boat"]
    rewards = reward(images, prompts)
    assert rewards.dtype == torch.float32
    exact = reward.to(torch.device("cpu"), torch.float32)(images, prompts)
    torch.testing.assert_close(rewards, exact, rtol=0.0, atol=0.05)


def test_what_cannot_be_asked_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = str(folders["qwen2_vl"])
    with pytest.raises(ConfigError, match=r"reward\.vlm\.question: \{promt\} stands for nothing"):
        VlmReward(model, "Is it {promt}?")
    with pytest.raises(ConfigError, match=r"reward\.vlm\.model: .* of the type clip, expected one"):
        VlmReward(str(transformers_clip(tmp_path / "clip")))
    for refuse in (VlmReward, partial(VlmReward.on_meta, torch.float32)):
        with pytest.raises(ConfigError, match=r"reward\.vlm\.pixels: expected at least 1, got 0"):
            refuse(model=model, pixels=0)
    # transformers refuses it too, with an error that would be taken for a bug of this program.
    with pytest.raises(ConfigError, match="2 x 401 pixels is too long"):
        VlmReward(model)(noise(401, 2), PROMPTS)
    with pytest.raises(AssetError, match=r"reward\.vlm\.model: cannot load .*nowhere"):
        VlmReward(str(tmp_path / "nowhere"))
    broken = small_qwen("qwen2_vl", tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ messages[0]['role'] }}", encoding="utf-8")
    with pytest.raises(AssetError, match=r"reward\.vlm\.model: cannot load"):
        VlmReward(str(broken))
