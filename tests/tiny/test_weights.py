"""The embedded weights: size, formats, and that they do what their card says."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from alignprop_cli.models.families import TINY
from alignprop_cli.rewards.clip import EMBEDDED, ClipReward
from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.checker import check
from alignprop_cli.tiny.make.aligner import neighbours


@pytest.fixture(scope="module")
def samples():
    """Return 48 pictures of held-out prompts by plain diffusers, and the prompts."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = data.heldout_prompts()[1::3][:48]
    generators = [torch.Generator().manual_seed(i) for i in range(48)]
    images = pipeline(
        prompts, num_inference_steps=10, guidance_scale=3.0, generator=generators, output_type="np"
    ).images
    return np.rint(images * 255.0).astype(np.uint8), prompts


def test_all_weights_are_half_precision_and_together_at_most_12_megabytes() -> None:
    files = [*TINY.rglob("*.safetensors"), *EMBEDDED["tiny"].rglob("*.safetensors")]
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 12e6
    for file in files:
        with safe_open(file, "pt") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}


def test_plain_diffusers_draws_recognisable_pictures_of_prompts_never_trained_on(samples) -> None:
    checks = check(*samples)
    # The card's figures are .99, .98, .78, .80 and .65; 48 pictures scatter by about .07.
    for name, least in (("background", 0.9), ("colour", 0.85), ("shape", 0.6), ("count", 0.55)):
        assert np.mean([getattr(c, name) for c in checks]) >= least, name
    assert 0.35 <= np.mean([c.all_right for c in checks]) <= 0.9


def test_the_aligner_ranks_the_true_prompt_before_those_that_differ_in_one_word() -> None:
    reward = ClipReward("tiny")
    heldout = data.heldout_prompts()
    pictures, chosen = data.draw_many(heldout, 150, seed=11)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
    features = reward.image_features(images)
    first: dict[str, list[bool]] = {"all": [], "shape": [], "count": []}
    for feature, number in zip(features, chosen, strict=True):
        groups = {
            k: [s.prompt for s in v] for k, v in neighbours(data.parse(heldout[number])).items()
        }
        own = reward.text_features([heldout[number]]) @ feature
        for name, wins in first.items():
            others = [p for group, ps in groups.items() if name in ("all", group) for p in ps]
            wins.append(bool((own > reward.text_features(others) @ feature).all()))
    assert np.mean(first["all"]) >= 0.85
    assert np.mean(first["shape"]) >= 0.7
    assert np.mean(first["count"]) >= 0.7


def test_the_reward_of_wrong_drawings_is_clearly_lower() -> None:
    reward = ClipReward("tiny")
    scene = data.Scene(3, "large", "red", "star", "black")
    rng = np.random.default_rng(0)
    for others in neighbours(scene).values():
        wrong = np.stack([data.draw(other, rng) for other in others])
        right = np.stack([data.draw(scene, rng) for _ in others])
        scores = [
            reward(torch.from_numpy(p).permute(0, 3, 1, 2).float() / 255.0, [scene.prompt] * len(p))
            for p in (right, wrong)
        ]
        assert scores[0].min() > scores[1].max() + 0.1


def test_both_tokenizers_agree_and_every_word_is_one_token() -> None:
    ours = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    theirs = open_clip.get_tokenizer(f"local-dir:{EMBEDDED['tiny']}")
    prompts = data.heldout_prompts()[:20]
    ids = ours(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs(prompts))
    for prompt in prompts:
        assert len(ours(prompt).input_ids) == len(prompt.split()) + 2


def test_the_card_says_what_was_required() -> None:
    card = json.loads((TINY.parent / "card.json").read_text())
    right = card["samples"]["right"]
    assert card["samples"]["images"] == 500
    assert right["background"] >= 0.9
    assert right["colour"] >= 0.8
    assert right["shape"] >= 0.7
    assert right["count"] >= 0.55
    assert right["all_right"] < 0.75
