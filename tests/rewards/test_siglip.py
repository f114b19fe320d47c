"""siglip against open_clip's own network, preprocessing and logits, on small random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.images import squash, to_uint8
from alignprop_cli.rewards.siglip import SiglipReward
from tests.factories import small_clip, small_tokenizer
from tests.rewards.small import SIZE, noise, small_siglip

PROMPTS = ["A cat!", "two dogs", "a boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_siglip(tmp_path_factory.mktemp("siglip"))


def test_it_is_the_logit_of_open_clip_on_its_own_preprocessing(folder: Path) -> None:
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    # Of the network's size, so that nothing is resized, and of whole bytes, which Pillow keeps.
    pictures = [Image.fromarray(p) for p in to_uint8(noise(SIZE, SIZE)).numpy()]
    tokens = open_clip.get_tokenizer(name)(PROMPTS)
    with torch.no_grad():
        logits, _ = model.get_logits(torch.stack([preprocess(p) for p in pictures]), tokens)
    images = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2)
    rewards = SiglipReward(str(folder))(images / 255.0, PROMPTS)
    torch.testing.assert_close(rewards, logits.diag(), rtol=1e-5, atol=1e-5)
    assert float(rewards.detach().std()) > 0.01


def test_images_are_squashed_as_open_clip_does(folder: Path) -> None:
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    # Smooth and inside the range, where Pillow clips nothing between its two passes.
    smooth = 0.25 + 0.5 * noise(6, 9, count=1)
    smooth = torch.nn.functional.interpolate(smooth, (60, 90), mode="bilinear")
    (picture,) = to_uint8(smooth).numpy()
    images = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255.0
    ours = (squash(images, SIZE).clamp(0.0, 1.0) - 0.5) / 0.5
    # Pillow rounds to bytes after each of its two passes: 2 / 255 in [0, 1].
    torch.testing.assert_close(
        ours[0], preprocess(Image.fromarray(picture)), rtol=0.0, atol=4.0 / 255.0 + 1e-6
    )


def test_a_tokenizer_of_another_place_reads_as_the_models_own(folder: Path, tmp_path: Path) -> None:
    small_tokenizer(tmp_path).save_pretrained(tmp_path)
    images = noise(SIZE, SIZE)
    own = SiglipReward(str(folder))(images, PROMPTS)
    assert torch.equal(own, SiglipReward(str(folder), tokenizer=str(tmp_path))(images, PROMPTS))


def test_a_prompt_that_is_cut_is_noticed(folder: Path) -> None:
    reward = SiglipReward(str(folder))
    assert not reward.cuts("a cat")
    assert reward.cuts("a cat " * 20)


def test_what_is_no_siglip_or_is_missing_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"reward\.siglip\.model: .* it is no SigLIP"):
        SiglipReward(str(small_clip(tmp_path / "clip")))
    with pytest.raises(ConfigError, match=r"open_clip knows no model 'ViT-B-16-SigLP'"):
        SiglipReward("ViT-B-16-SigLP")
    with pytest.raises(AssetError, match=r"reward\.siglip\.tokenizer: cannot load .*nowhere"):
        SiglipReward(str(folder), tokenizer=str(tmp_path / "nowhere"))
    words = str(folder)
    with pytest.raises(AssetError, match=r"reward\.siglip\.pretrained: gone\.pt is neither"):
        SiglipReward("ViT-B-16-SigLIP", pretrained="gone.pt", tokenizer=words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match=r"reward\.siglip\.tokenizer: cannot load that of ViT-B"):
        SiglipReward("ViT-B-16-SigLIP")


def test_another_way_of_resizing_is_refused(tmp_path: Path) -> None:
    folder = small_siglip(tmp_path)
    file = folder / "open_clip_config.json"
    file.write_text(file.read_text().replace('"squash"', '"shortest"'), encoding="utf-8")
    with pytest.raises(ConfigError, match="has resize_mode 'shortest', and only 'squash'"):
        SiglipReward(str(folder))
