"""What the commands share: rewards by name, whose values count, and where results may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignprop_cli.commands import measuring
from alignprop_cli.commands.options import reward_weights, split_names
from alignprop_cli.commands.settings import for_evaluation, for_training
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import ConfigError


def evaluating(file: Path | None = None, **values: object) -> Config:
    """Return the configuration with which the base model is evaluated."""
    config = None if file is None else str(file)
    return for_evaluation("base", None, None, config, **{"flags": {"model.id": "tiny"}, **values})


def test_names_are_split_and_come_once():
    assert split_names(["clip, brightness", "clip", ""], "--reward") == ["clip", "brightness"]
    assert split_names(None, "--reward") == []
    # Half of a surrogate pair, as what is not UTF-8 reaches Python, is blamed on its own option.
    with pytest.raises(ConfigError, match=r"^--log-with: .* is not UTF-8"):
        split_names(["\udcff"], "--log-with")


def test_weights_follow_names_which_may_hold_colons_themselves():
    given = ["clip", "hps:2,dir/mine.py:best", "mine.py:nan", "a.b:c:-0.5", "brightness:1e-3"]
    assert reward_weights(given) == {
        "clip": None,
        "hps": 2.0,
        "dir/mine.py:best": None,
        "mine.py:nan": None,
        "a.b:c": -0.5,
        "brightness": 0.001,
    }
    with pytest.raises(ConfigError, match="--reward: clip is given twice"):
        reward_weights(["clip", "clip:2"])


def test_without_any_reward_it_is_clip_but_never_in_training(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("reward:\n  contrast:\n")
    assert list(evaluating().reward) == ["clip"]
    assert list(evaluating(file).reward) == ["contrast"]
    file.write_text("train:\n  steps: 1\n")
    with pytest.raises(ConfigError, match="no reward is given"):
        for_training(None, None, str(file), sets=None, reward=None, flags={"model.id": "tiny"})


def test_named_rewards_replace_others_and_keep_their_own_options(tmp_path):
    file, other = tmp_path / "mine.yaml", f"{tmp_path}/mine.py:best"
    (tmp_path / "mine.py").write_text("def best(images, prompts):\n    return images.mean()\n")
    file.write_text("reward:\n  clip:\n    model: ViT-B-32\n  contrast:\n")
    rewards = evaluating(file, reward=["clip", other]).reward
    assert list(rewards) == ["clip", other]
    assert rewards["clip"].options == {"model": "ViT-B-32"}
    again = evaluating(file, reward=["clip"], sets=["reward.clip.model=tiny"])
    assert again.reward["clip"].options == {"model": "tiny"}


def test_an_option_of_a_reward_that_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match="clip is not among those of --reward"):
        measuring.rewards(["reward.clip.model=tiny"], ["contrast"], [])


def test_what_scoring_would_ignore_is_refused():
    with pytest.raises(ConfigError, match=r"only reward\.NAME\.OPTION"):
        measuring.rewards(["train.steps=3"], None, [])


def test_flags_win_and_mistakes_name_them(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("eval:\n  images: 8\n  seed: 4\n")
    config = evaluating(file, flags={"eval.images": 3, "eval.seed": None})
    assert (config.eval.images, config.eval.seed) == (3, 4)
    with pytest.raises(ConfigError, match=r"eval\.images.*--images"):
        evaluating(flags={"model.id": "tiny", "eval.images": -1})


def test_a_reward_section_that_is_no_mapping_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("reward: clip\n")
    with pytest.raises(ConfigError, match="reward"):
        evaluating(file)
