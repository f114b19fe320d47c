"""The language of the embedded model and its checker."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.checker import Check, check, look

PROMPTS = data.train_prompts() + data.heldout_prompts()


@pytest.fixture(scope="module")
def drawings():
    """Return 400 drawings of all kinds of prompts, and the prompts."""
    pictures, chosen = data.draw_many(PROMPTS, 400, seed=0)
    return pictures, [PROMPTS[i] for i in chosen]


def test_held_out_prompts_are_never_trained_on_and_together_they_are_the_language() -> None:
    train, heldout = set(data.train_prompts()), set(data.heldout_prompts())
    assert not train & heldout
    assert train | heldout == {scene.prompt for scene in data.scenes()}
    assert (len(train), len(heldout)) == (800, 160)


def test_every_pair_of_words_of_a_held_out_prompt_is_trained_on() -> None:
    def pairs(prompts):
        found = set()
        for prompt in prompts:
            values = list(vars(data.parse(prompt)).items())
            found |= {(a, b) for a in values for b in values if a[0] < b[0]}
        return found

    assert pairs(data.heldout_prompts()) <= pairs(data.train_prompts())


def test_parsing_undoes_writing_and_refuses_what_is_not_of_the_language() -> None:
    for scene in data.scenes():
        assert data.parse(scene.prompt) == scene
    with pytest.raises(ValueError, match="not a prompt"):
        data.parse("a photo of a cat")
    assert not data.is_language("five small red circles on a black background")


def test_a_drawing_is_a_function_of_its_generator() -> None:
    prompt = "four large green stars on a pink background"
    first, again, other = (data.draw(prompt, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (48, 48, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def noisy(pictures, spread):
    noise = np.random.default_rng(1).normal(0.0, spread, pictures.shape)
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def blurred(pictures, sigma):
    return ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0)).astype(np.uint8)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pictures: pictures,
        lambda pictures: noisy(pictures, 10),
        lambda pictures: blurred(pictures, 0.7),
        lambda pictures: noisy(blurred(pictures, 0.6), 8),
    ],
    ids=["clean", "noise", "blur", "blur and noise"],
)
def test_the_checker_reads_at_least_98_percent_of_drawings_right(drawings, spoil) -> None:
    pictures, prompts = drawings
    right = [c.all_right for c in check(spoil(pictures), prompts)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"background": "brown"}, "background"),
        ({"colour": "yellow"}, "colour"),
        ({"shape": "square"}, "shape"),
        ({"count": 3}, "count"),
    ],
)
def test_the_checker_sees_what_is_wrong_and_nothing_else(change, wrong) -> None:
    scene = data.Scene(2, "large", "blue", "star", "black")
    pictures = np.stack([data.draw(scene, np.random.default_rng(i)) for i in range(20)])
    other = data.Scene(**{**vars(scene), **change})
    for seen in check(pictures, [other.prompt] * 20):
        assert seen == Check(**{n: n != wrong for n in ("background", "colour", "shape", "count")})


def test_an_empty_picture_has_a_background_and_no_object() -> None:
    seen = look(np.full((48, 48, 3), 128, dtype=np.uint8))
    assert (seen.background, seen.count, seen.shape) == ("grey", 0, "")
