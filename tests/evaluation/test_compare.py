"""Comparing two models on the same samples: how sure a difference is, how diverse images are."""

from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from alignprop_cli.evaluation import results
from alignprop_cli.evaluation.compare import (
    Evaluation,
    Identity,
    checks,
    compare,
    diversity,
    vendi,
)
from alignprop_cli.evaluation.draw import Floats, Sample, Samples
from alignprop_cli.rng import key


def samples(prompts: int, each: int = 1) -> list[Sample]:
    return [Sample(str(p), p, i) for p in range(prompts) for i in range(each)]


def test_a_constant_difference_is_certain_and_its_wins_and_ties_are_counted() -> None:
    base = np.arange(8.0)
    same = compare(samples(8), base, base)
    assert (same.difference, same.low, same.high, same.wins, same.ties) == (0, 0, 0, 0, 1)
    up = compare(samples(8), base, base + 0.5)
    assert (up.base, up.tuned) == (3.5, 4.0)
    assert [up.difference, up.low, up.high] == pytest.approx([0.5, 0.5, 0.5])
    assert (up.wins, up.ties) == (1, 0)
    some = compare(samples(8), base, base + np.array([1, 1, 0, -1, 0, 0, 0, 1]))
    assert (some.wins, some.ties) == (3 / 8, 4 / 8)


def test_the_interval_is_that_of_a_mean_and_images_of_one_prompt_are_no_more_certain() -> None:
    rng = np.random.default_rng(0)
    base, change = rng.normal(size=200), rng.normal(0.3, 1.0, size=200)
    single = compare(samples(200), base, base + change)
    # The normal approximation of the mean's distribution.
    error = 1.96 * change.std() / np.sqrt(200)
    assert single.difference == pytest.approx(change.mean())
    assert single.low == pytest.approx(change.mean() - error, abs=0.1 * error)
    assert single.high == pytest.approx(change.mean() + error, abs=0.1 * error)
    repeated = compare(samples(200, 5), base.repeat(5), (base + change).repeat(5))
    assert repeated.high - repeated.low == pytest.approx(2 * error, rel=0.1)


def sampled(chosen: list[Sample], rewards: Floats, features: Floats | None = None) -> Samples:
    images = np.zeros((len(chosen), 4, 4, 3), dtype=np.uint8)
    return Samples(tuple(chosen), images, {"clip": rewards}, features)


def test_diversity_is_one_minus_the_mean_cosine_of_a_prompts_images() -> None:
    # Prompt 0: right angles and one pair that is the same; prompt 1: opposite; prompt 2: alone.
    chosen = [*(Sample("a", 0, i) for i in range(3)), *(Sample("b", 1, i) for i in range(2))]
    chosen.append(Sample("c", 2))
    x, y = [1.0, 0.0], [0.0, 1.0]
    features = np.array([x, y, x, y, [0.0, -1.0], x])
    prompts, values = diversity(sampled(chosen, np.zeros(6), features))
    assert [sample.prompt for sample in prompts] == ["a", "b"]
    # Cosines of prompt 0: 0, 1, 0; of prompt 1: -1.
    np.testing.assert_allclose(values, [1.0 - 1.0 / 3.0, 2.0])
    with pytest.raises(ValueError, match="needs features"):
        diversity(sampled(chosen, np.zeros(6)))


def test_the_interval_of_many_prompts_takes_little_memory_and_is_scipys() -> None:
    values = np.random.default_rng(1).normal(size=1500)
    tracemalloc.start()
    try:
        compare(samples(1500), np.zeros(1500), values)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All 9999 resamples of 1500 numbers together would be 120 MB for each of several copies.
    assert most < 40e6
    few, same = values[:40], np.random.default_rng(key(0, "bootstrap"))
    interval = stats.bootstrap((few,), np.mean, method="percentile", rng=same).confidence_interval
    found = compare(samples(40), np.zeros(40), few)
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-12)


def test_an_evaluation_compares_each_group_with_the_base_model_on_its_own_samples() -> None:
    chosen = samples(4)
    result = Evaluation(
        model={"id": "m"},
        variants={"tuned": Identity("f", "0", 1.0, ["clip"])},
        prompt_set="mine",
        seed=0,
        sample={},
        axis="",
        curve=[],
        sampled={
            "base": sampled(chosen, np.array([1.0, 2.0, 3.0, 4.0])),
            "tuned": sampled(chosen, np.array([2.0, 3.0, 3.0, 2.0])),
        },
        group_of={0: "up", 1: "up", 3: "down"},
        seconds=0.0,
    )
    means = {
        group: (of["clip"]["base"].mean, of["clip"]["tuned"].mean)
        for group, of in result.groups.items()
    }
    # In the order of the prompts, not of the alphabet.
    assert list(means.items()) == [("up", (1.5, 2.5)), ("down", (4.0, 2.0))]
    assert result.metrics["clip"]["base"].paired is None
    paired = result.metrics["clip"]["tuned"].paired
    assert paired is not None
    assert (paired.difference, paired.wins, paired.ties) == (0.0, 0.5, 0.25)
    assert result.trained_on == {"clip"}
    # No checker knows these prompts.
    assert checks(result.sampled) == result.checker == {}


def test_the_rows_of_prompts_with_a_carriage_return_are_read_back(tmp_path: Path) -> None:
    chosen = [Sample("a\rb", 0), Sample('c, "d"', 1)]
    result = Evaluation(
        model={"id": "m"},
        variants={},
        prompt_set="mine",
        seed=0,
        sample={},
        axis="",
        curve=[],
        sampled={"base": sampled(chosen, np.array([0.5, 2.0]))},
        group_of={1: "g"},
        seconds=0.0,
    )
    results._write_csv(result, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["prompt"], row["group"], row["clip"]) for row in csv.DictReader(file)]
    assert rows == [("a\rb", "", "0.5"), ('c, "d"', "g", "2")]


def test_diversity_and_vendi_are_what_a_loop_and_a_decomposition_of_the_features_say() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(15, 6))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    chosen = samples(3, 5)
    found = sampled(chosen, np.zeros(15), features)
    for prompt in range(3):
        own = [features[i] for i, sample in enumerate(chosen) if sample.prompt_index == prompt]
        pairs = [1.0 - float(own[i] @ own[j]) for i in range(5) for j in range(i)]
        assert diversity(found)[1][prompt] == pytest.approx(sum(pairs) / 10, abs=1e-12)
        # The kernel's eigenvalues are the squares of the features' singular values.
        shares = np.linalg.svd(np.array(own) / np.sqrt(5.0), compute_uv=False) ** 2
        entropy = -sum(share * np.log(share) for share in shares)
        assert vendi(found)[1][prompt] == pytest.approx(np.exp(entropy), rel=1e-10)


@pytest.mark.parametrize("cosine", [1.0, 0.6, 0.0])
def test_vendi_of_two_images_is_that_of_two_shares(cosine: float) -> None:
    features = np.array([[1.0, 0.0], [cosine, np.sqrt(1.0 - cosine**2)]])
    # The eigenvalues of [[1, c], [c, 1]] / 2.
    shares = [s for s in ((1 + cosine) / 2, (1 - cosine) / 2) if s > 0]
    expected = np.prod([share**-share for share in shares])
    prompts, values = vendi(sampled(samples(1, 2), np.zeros(2), features))
    assert len(prompts) == 1
    assert values == pytest.approx([expected], abs=1e-7)
