"""The reward that compares numbers: its prompts, its formula, and that it sees what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from alignprop_cli.errors import ConfigError
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.clip_count import ClipCount, other_numbers
from alignprop_cli.tiny import language as data
from tests.factories import generator, small_clip

PROMPTS = ["two cats", "one small dog in a park", "four boats"]


@pytest.mark.parametrize(
    ("prompt", "number", "others"),
    [
        (
            "two small red circles on a blue background",
            2,
            [
                "one small red circle on a blue background",
                "two small red circles on a blue background",
                "three small red circles on a blue background",
            ],
        ),
        ("One dog", 1, ["one dog", "two dogs", "three dogs"]),
        (
            "A photo of three black-eyed cats, at night",
            3,
            [
                "A photo of one black-eyed cat, at night",
                "A photo of two black-eyed cats, at night",
                "A photo of three black-eyed cats, at night",
            ],
        ),
    ],
)
def test_the_number_is_exchanged_and_the_noun_follows(
    prompt: str, number: int, others: list[str]
) -> None:
    assert other_numbers(prompt, 3) == (number, others)


@pytest.mark.parametrize("prompt", ["a cat", "five cats", "someone", "", "two"])
def test_a_prompt_without_a_number_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"clip_count: the prompt .* from one to four"):
        other_numbers(prompt, 4)


def test_every_prompt_of_the_embedded_language_becomes_others_of_it() -> None:
    for prompt in (*data.train_prompts(), *data.heldout_prompts()):
        scene = data.parse(prompt)
        number, others = other_numbers(prompt, 4)
        assert number == scene.count
        assert others[scene.count - 1] == prompt
        assert [data.parse(other).count for other in others] == [1, 2, 3, 4]


def test_it_is_the_log_softmax_of_the_cosines_at_the_number(tmp_path: Path) -> None:
    folder = str(small_clip(tmp_path))
    images = torch.rand((3, 3, 20, 16), generator=generator(0)).requires_grad_()
    rewards = ClipCount(folder)(images, PROMPTS)
    clip = ClipReward(folder)
    scale = clip._model.logit_scale.exp()
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        number, others = other_numbers(prompt, 4)
        cosines = clip(image.expand(4, -1, -1, -1), others)
        expected.append((scale * cosines).softmax(dim=0)[number - 1].log())
    torch.testing.assert_close(rewards, torch.stack(expected))
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_the_embedded_model_counts_most_drawings_right() -> None:
    """Better than half is what exp(reward) > 1/2 says; the card of the model says 98 %."""
    prompts = data.heldout_prompts()
    pictures, chosen = data.draw_many(prompts, 64, seed=0)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
    rewards = ClipCount()(images, [prompts[index] for index in chosen])
    assert float((rewards > np.log(0.5)).float().mean()) >= 0.9


@pytest.mark.parametrize("most", [1, 11])
def test_impossible_numbers_are_refused(most: int) -> None:
    with pytest.raises(ConfigError, match=r"reward\.clip_count\.most: expected 2 to 10"):
        ClipCount(most=most)
