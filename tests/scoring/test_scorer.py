"""Image files are measured in chunks: in order, once each, however the work is divided."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.errors import RunError
from alignprop_cli.rewards.mixture import Member, Mixture, build_mixture
from alignprop_cli.scoring import scorer
from alignprop_cli.scoring.captions import PromptFinder
from alignprop_cli.scoring.files import find_images
from alignprop_cli.scoring.scorer import CHUNK, Scored, Skipped, chunks, needs_prompt, score
from tests.factories import picture

CPU = torch.device("cpu")


def mixture(*names):
    return build_mixture({name: RewardConfig() for name in names}, LossConfig(), CPU)


def test_only_rewards_of_pixels_do_without_a_prompt():
    assert not needs_prompt("brightness", {})
    assert needs_prompt("clip", {})
    assert needs_prompt("mine.py:reward", {})
    assert needs_prompt("count", {"object": "dog"})
    assert not needs_prompt("count", {"object": "dog", "number": 0})


def results(folder, reward, *, workers=0, known=None, done=()):
    divided = chunks(find_images([str(folder)]), done)
    return list(
        score(
            divided,
            reward,
            PromptFinder(),
            needing=[],
            device=CPU,
            workers=workers,
            known=known,
        )
    )


class Counting:
    """Measures the mean brightness, and notes the size of every batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, images, prompts):
        self.batches.append(len(images))
        return images.mean(dim=(1, 2, 3))

    def mixture(self):
        return Mixture([Member("mean", self, 1.0, LossConfig())])


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_whatever_their_sizes_and_the_workers(tmp_path, workers):
    values = np.linspace(1, 250, CHUNK + 5).astype(int)
    for index, value in enumerate(values):
        picture(tmp_path / f"{index:02d}.png", value, (5, 9) if index % 3 == 2 else (8, 8))
    (tmp_path / "01b.png").write_text("broken")
    found = results(tmp_path, mixture("brightness"), workers=workers)
    assert [r.path.name for r in found] == sorted(p.name for p in tmp_path.iterdir())
    assert isinstance(found[2], Skipped)
    measured = [r.rewards["brightness"] for r in found if isinstance(r, Scored)]
    np.testing.assert_allclose(measured, values / 255.0, atol=1e-6)


def test_the_same_content_is_measured_once(tmp_path):
    for index, value in enumerate([10, 20, 10, 20, 30, *range(100, 120), 10]):
        picture(tmp_path / f"{index:02d}.png", value)
    counting = Counting()
    found = results(tmp_path, counting.mixture())
    assert sum(counting.batches) == 23
    assert [r.path.name for r in found if r.again] == ["02.png", "03.png", "25.png"]
    assert found[25].rewards == found[0].rewards
    assert found[25].content == found[0].content


def test_the_same_content_with_another_prompt_is_another_image(tmp_path):
    for name, prompt in (("a", "cat"), ("b", "dog"), ("c", "cat")):
        picture(tmp_path / f"{name}.png", 100, prompt=prompt)
    counting = Counting()
    assert [r.again for r in results(tmp_path, counting.mixture())] == [False, False, True]
    assert counting.batches == [2]


def test_what_is_done_changes_no_company(tmp_path):
    for index in range(2 * CHUNK + 3):
        picture(tmp_path / f"{index:02d}.png", index)
    counting = Counting()
    whole = results(tmp_path, counting.mixture())
    assert counting.batches == [CHUNK, CHUNK, 3]
    counting.batches.clear()
    done = {str(r.path) for r in whole[:CHUNK]}
    known = {(r.content, r.prompt): r.rewards for r in whole[:CHUNK]}
    assert results(tmp_path, counting.mixture(), done=done, known=known) == whole[CHUNK:]
    assert counting.batches == [CHUNK, 3]


def test_large_images_are_measured_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "_MOST_PIXELS", 3 * 64)
    for index in range(8):
        picture(tmp_path / f"{index}.png", index)
    picture(tmp_path / "9.png", 9, (20, 20))
    counting = Counting()
    assert len(results(tmp_path, counting.mixture())) == 9
    assert counting.batches == [3, 3, 2, 1]


def test_a_worker_that_dies_is_told_as_what_it_is(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(scorer, "_decode", lambda path: os._exit(9))
    with pytest.raises(RunError, match="decodes images ended") as told:
        results(tmp_path, mixture("brightness"), workers=1)
    assert "--workers 0" in told.value.hint


def test_a_image_without_a_prompt_is_skipped_where_a_reward_needs_one(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", prompt="four")
    lengths = Member(
        "length",
        lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]),
        1.0,
        LossConfig(),
    )
    found = find_images([str(tmp_path)])
    first, second = score(
        chunks(found), Mixture([lengths]), PromptFinder(), needing=["length"], device=CPU
    )
    assert first == Skipped(tmp_path / "a.png", "no prompt found, which length needs")
    assert isinstance(second, Scored)
    assert (second.prompt, second.prompt_source) == ("four", "image")
    assert second.rewards == {"length": 4.0}
