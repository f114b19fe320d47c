"""The reward that tells a prompt from those of a set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignprop_cli.errors import ConfigError
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.clip_choice import ClipChoice
from alignprop_cli.tiny import language as data
from tests.factories import generator, small_clip

SET = ["a cat", "two dogs", "a boat", "a house"]


def choice(folder: Path) -> ClipChoice:
    file = folder / "set.txt"
    file.write_text("\n".join(SET), encoding="utf-8")
    return ClipChoice(str(small_clip(folder / "clip")), prompts=str(file))


def test_it_is_the_log_softmax_over_the_set_with_the_own_prompt_once(tmp_path: Path) -> None:
    reward = choice(tmp_path)
    clip = ClipReward(str(tmp_path / "clip"))
    images = torch.rand((3, 3, 20, 16), generator=generator(0)).requires_grad_()
    prompts = ["two dogs", "a fish", "a cat"]  # the second is not of the set
    rewards = reward(images, prompts)
    scale = clip._model.logit_scale.exp()
    for image, prompt, found in zip(images, prompts, rewards, strict=True):
        everything = [prompt, *(text for text in SET if text != prompt)]
        cosines = clip(image.expand(len(everything), -1, -1, -1), everything)
        torch.testing.assert_close(found, (scale * cosines).log_softmax(dim=0)[0])
    # A prompt that the file holds twice counts once.
    twice = tmp_path / "twice.txt"
    twice.write_text("\n".join([*SET, "a boat", "a cat"]), encoding="utf-8")
    same = ClipChoice(str(tmp_path / "clip"), prompts=str(twice))(images, prompts)
    torch.testing.assert_close(same, rewards, rtol=0.0, atol=1e-6)
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_words_alike_that_no_prompt_could_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="alike: expected single words, got 'dark blue'"):
        ClipChoice(alike=["blue", "dark blue"])


def test_prompts_that_differ_in_words_alike_share_their_probability(tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text("a small cat\na big cat\na dog\n", encoding="utf-8")
    folder = str(small_clip(tmp_path / "clip"))
    images = torch.rand((2, 3, 20, 16), generator=generator(0))
    # The second is not of the set, and is alike none of it.
    prompts = ["a small cat", "a big boat"]
    clip = ClipReward(folder)
    scale = clip._model.logit_scale.exp()
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        texts = list(dict.fromkeys([prompt, "a small cat", "a big cat", "a dog"]))
        cosines = clip(image.expand(len(texts), -1, -1, -1), texts)
        shares = (scale * cosines).softmax(dim=0)
        expected.append(shares[0] + shares[1] if prompt == "a small cat" else shares[0])
    options = {"prompts": str(file), "alike": ["big", "small"]}
    logs = ClipChoice(folder, **options)(images, prompts)
    torch.testing.assert_close(logs.exp(), torch.stack(expected))
    shares = ClipChoice(folder, log=False, **options)(images, prompts)
    torch.testing.assert_close(shares, torch.stack(expected))


def test_the_embedded_model_finds_the_prompt_of_most_drawings() -> None:
    prompts = data.heldout_prompts()
    pictures, chosen = data.draw_many(prompts, 32, seed=0)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
    asked = [prompts[index] for index in chosen]
    # Sizes are hard to tell and not checked, so their two prompts share the probability.
    rewards = ClipChoice()(images, asked)
    assert float((rewards > torch.tensor(0.2).log()).float().mean()) >= 0.8
    assert float(rewards.mean()) > float(ClipChoice()(images, asked[::-1]).mean()) + 3.0


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown prompt set 'shape'"):
        ClipChoice(prompts="shape")
