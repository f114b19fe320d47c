"""Comparing two models on the same pictures: what is drawn, and how sure a difference is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignprop_cli.config.schema import LossConfig, ModelConfig, RewardConfig, SampleConfig
from alignprop_cli.errors import RunError
from alignprop_cli.evaluation import draw as evaluator
from alignprop_cli.evaluation.draw import Picture
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import TINY, load_model
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.mixture import Member, Mixture, build_mixture
from tests.factories import fill_lora_b

CPU = torch.device("cpu")


def test_the_batch_size_changes_neither_pictures_nor_figures() -> None:
    model = load_model(ModelConfig(id=str(TINY)), CPU)
    lora.inject(model.network, rank=4, alpha=4, target_modules=("to_q", "to_v"), seed=0)
    fill_lora_b(model.network, seed=1)
    pictures = evaluator.choose(load_prompts("shapes-heldout"), 16)
    clip = ClipReward("tiny")
    found = {}
    for batch_size in (1, 4, 16):
        seen: list[torch.Tensor] = []

        def reward(images: torch.Tensor, prompts: object, seen=seen) -> torch.Tensor:
            seen.append(images.clone())
            return clip(images, prompts)

        drawn = evaluator.draw(
            model,
            pictures,
            Mixture([Member("clip", reward, 1.0, LossConfig())]),
            SampleConfig(num_inference_steps=5, guidance_scale=3.0, eta=0.5),
            seed=3,
            batch_size=batch_size,
        )
        found[batch_size] = torch.cat(seen), drawn
    images, drawn = found[1]
    assert float(images.std()) > 0.1
    for batch_size in (4, 16):
        others, other = found[batch_size]
        assert float((images - others).abs().max()) < 1e-4
        bytes_apart = np.abs(drawn.images.astype(int) - other.images.astype(int))
        assert bytes_apart.max() <= 1
        assert (bytes_apart > 0).mean() <= 1e-3
        np.testing.assert_allclose(other.rewards["clip"], drawn.rewards["clip"], atol=1e-4)


def test_pictures_that_are_not_finite_are_told_by_reward_and_prompt() -> None:
    model = load_model(ModelConfig(id=str(TINY)), CPU)
    lora.inject(model.network, rank=4, alpha=4, target_modules=("to_q",), seed=0)
    fill_lora_b(model.network, seed=1, scale=float("nan"))
    mixture = build_mixture({"brightness": RewardConfig()}, LossConfig(), CPU)
    config = SampleConfig(num_inference_steps=1)
    with pytest.raises(RunError, match=r"'brightness': image 0 .* NaN or infinity, prompt 'a cat'"):
        evaluator.draw(model, [Picture("a cat", 0)], mixture, config, seed=0, batch_size=1)


def pictures(prompts: int, each: int = 1) -> list[Picture]:
    return [Picture(str(p), p, i) for p in range(prompts) for i in range(each)]


def test_a_constant_difference_is_certain_and_its_wins_and_ties_are_counted() -> None:
    base = np.arange(8.0)
    same = evaluator.compare(pictures(8), base, base)
    assert (same.difference, same.low, same.high, same.wins, same.ties) == (0, 0, 0, 0, 1)
    up = evaluator.compare(pictures(8), base, base + 0.5)
    assert (up.base, up.tuned) == (3.5, 4.0)
    assert [up.difference, up.low, up.high] == pytest.approx([0.5, 0.5, 0.5])
    assert (up.wins, up.ties) == (1, 0)
    some = evaluator.compare(pictures(8), base, base + np.array([1, 1, 0, -1, 0, 0, 0, 1]))
    assert (some.wins, some.ties) == (3 / 8, 4 / 8)


def test_the_interval_is_that_of_a_mean_and_pictures_of_one_prompt_are_no_more_certain() -> None:
    rng = np.random.default_rng(0)
    base, change = rng.normal(size=200), rng.normal(0.3, 1.0, size=200)
    single = evaluator.compare(pictures(200), base, base + change)
    # The normal approximation of the mean's distribution.
    error = 1.96 * change.std() / np.sqrt(200)
    assert single.difference == pytest.approx(change.mean())
    assert single.low == pytest.approx(change.mean() - error, abs=0.1 * error)
    assert single.high == pytest.approx(change.mean() + error, abs=0.1 * error)
    repeated = evaluator.compare(pictures(200, 5), base.repeat(5), (base + change).repeat(5))
    assert repeated.high - repeated.low == pytest.approx(2 * error, rel=0.1)


@pytest.mark.parametrize(("count", "each", "drawn"), [(4, 1, 4), (5, 2, 6), (10, 1, 10)])
def test_pictures_are_chosen_alike_every_time_and_none_is_drawn_twice(count, each, drawn) -> None:
    prompts = [f"prompt {number}" for number in range(7)]
    chosen = evaluator.choose(prompts, count, each)
    assert chosen == evaluator.choose(prompts, count, each)
    assert len(chosen) == drawn
    assert all(picture.prompt == prompts[picture.prompt_index] for picture in chosen)
    assert len({(p.prompt_index, p.image_index) for p in chosen}) == drawn
    numbers = [p.prompt_index for p in chosen]
    assert all(numbers.count(number) in (each, 2 * each) for number in set(numbers))
