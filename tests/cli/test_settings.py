"""The configuration of `evaluate` and `score`: whose values count."""

from __future__ import annotations

import pytest

from alignprop_cli.commands.outputs import check_output
from alignprop_cli.commands.settings import build, reward_names, reward_weights
from alignprop_cli.errors import ConfigError


def test_names_are_split_and_come_once():
    assert reward_names(["clip, brightness", "clip", ""]) == ["clip", "brightness"]
    assert reward_names(None) == []


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


def test_without_any_reward_it_is_clip():
    assert list(build().reward) == ["clip"]
    assert list(build(header={"reward": {"contrast": {}}}).reward) == ["contrast"]


def test_named_rewards_replace_others_and_keep_their_own_options(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("reward:\n  clip:\n    model: ViT-B-32\n  contrast:\n")
    rewards = build(config=file, rewards=["clip", "dir/mine.py:best"]).reward
    assert list(rewards) == ["clip", "dir/mine.py:best"]
    assert rewards["clip"].options == {"model": "ViT-B-32"}
    again = build(config=file, rewards=["clip"], assignments=["reward.clip.model=tiny"])
    assert again.reward["clip"].options == {"model": "tiny"}


def test_an_option_of_a_reward_that_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match="clip is not among those of --reward"):
        build(rewards=["contrast"], assignments=["reward.clip.model=tiny"])


def test_flags_win_and_mistakes_name_them():
    flags = {"eval.images": ("--images", 3), "eval.seed": ("--seed", None)}
    config = build(header={"eval": {"images": 8, "seed": 4}}, flags=flags)
    assert (config.eval.images, config.eval.seed) == (3, 4)
    with pytest.raises(ConfigError, match=r"eval\.images.*--images"):
        build(flags={"eval.images": ("--images", -1)})


def test_a_reward_section_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="reward"):
        build(header={"reward": "clip"})


def test_an_empty_folder_may_be_used_and_a_file_never(tmp_path):
    check_output(tmp_path / "new", overwrite=False, ours=())
    check_output(tmp_path, overwrite=False, ours=())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True, ours=("file",))
