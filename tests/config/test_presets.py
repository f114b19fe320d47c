"""Presets: found, extended, overridden, and every value traced to its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignprop_cli.config import presets
from alignprop_cli.config.schema import RewardConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.prompts import BUILT_IN
from alignprop_cli.rewards import registry


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", presets.names())
def test_every_shipped_preset_is_complete_and_says_what_it_is(name: str) -> None:
    config = presets.resolve(preset=name)
    for reward, member in config.reward.items():
        registry.check(reward, member.options)
    for prompts in (config.train.prompts, config.eval.prompts):
        assert prompts in (*BUILT_IN, "hpd")
    header = presets.preset_path(name).read_text(encoding="utf-8").splitlines()
    assert len(presets.summary(name)) > 10
    assert f"alignprop train --preset {name}" in header[1]
    assert header[2].startswith("# Needs:")
    assert any(line.startswith("# Expected:") for line in header[3:8])


def test_the_aesthetic_preset_has_the_published_settings() -> None:
    """Of the reference's first generation; arXiv:2310.03739 and its configuration."""
    config = presets.resolve(preset="aesthetic")
    assert (config.sample.num_inference_steps, config.sample.guidance_scale) == (50, 7.5)
    assert (config.gradient.method, config.gradient.k_min, config.gradient.k_max) == (
        "random_k",
        1,
        50,
    )
    assert (config.loss.kind, config.loss.target, config.loss.scale) == ("target", 10.0, 0.01)
    train = config.train
    assert (train.batch_size, train.steps, train.learning_rate) == (128, 14, 1e-3)
    assert (train.adam_beta1, train.adam_beta2) == (0.9, 0.999)
    assert (train.weight_decay, train.max_grad_norm) == (0.1, 5.0)
    assert (config.lora.rank, config.lora.alpha) == (4, 4)


def test_rewards_of_the_command_line_replace_those_of_the_preset(tmp_path: Path) -> None:
    def of(**rewards: float | None) -> dict[str, RewardConfig]:
        return presets.resolve(preset="mix_aesthetic_hps", rewards=rewards).reward

    assert set(of(hps=None)) == {"hps"}
    assert (of(hps=None)["hps"].weight, of(hps=None)["hps"].standardise) == (0.5, True)
    assert (of(hps=3.0)["hps"].weight, of(hps=3.0)["hps"].standardise) == (3.0, True)
    both = of(brightness=-0.1, aesthetic=None)
    assert list(both) == ["brightness", "aesthetic"]
    assert both["brightness"].weight == -0.1
    with pytest.raises(ConfigError, match=r"--set: reward\.hps\.version: hps is not among"):
        presets.resolve(
            preset="hps", rewards={"aesthetic": None}, assignments=["reward.hps.version=v2.0"]
        )


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        presets.resolve(preset="tinny")


def test_problems_carry_file_and_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.yaml",
        "# mine\nreward:\n  clip:\n    weight: heavy\ntrain:\n  steps: -1\n  batch_sise: 4\n",
    )
    with pytest.raises(ConfigError) as caught:
        presets.resolve(config=file, assignments=["sample.eta=2"], flags={"train.seed": -1})
    origins = {problem.key: problem.origin for problem in caught.value.problems}
    assert origins == {
        "reward.clip.weight": "mine.yaml:4",
        "train.steps": "mine.yaml:6",
        "train.batch_sise": "mine.yaml:7",
        "sample.eta": "--set",
        "train.seed": "--seed",
    }
    assert "Did you mean 'batch_size'?" in str(caught.value)


def test_later_layers_win(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "reward: {clip: }\ntrain: {steps: 1, batch_size: 2, seed: 3}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\ntrain: {batch_size: 4}\n")
    config = presets.resolve(
        config=child,
        assignments=["train.seed=5", "train.steps=6"],
        flags={"train.steps": 7, "train.batch_size": None},
    )
    assert (config.train.steps, config.train.batch_size, config.train.seed) == (7, 4, 5)


def test_what_a_lora_file_records_comes_before_everything_else(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "eval: {images: 5}\n")
    recorded = {"eval": {"images": 8, "seed": 4}}
    flags = {"eval.seed": 6, "eval.batch_size": None}
    config = presets.resolve(config=file, recorded=recorded, default_reward="contrast", flags=flags)
    assert (config.eval.images, config.eval.seed, config.eval.batch_size) == (5, 6, 8)
    assert recorded == {"eval": {"images": 8, "seed": 4}}


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("model.id", "--model"),
        ("output.dir", "--output"),
        ("train.memory_limit", "--gpu-memory"),
        ("train.steps", "--steps"),
        ("eval.images_per_prompt", "--images-per-prompt"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(key: str, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        presets.resolve(preset="tiny", flags={key: [1]})
    assert {problem.key: problem.origin for problem in caught.value.problems} == {key: flag}


def test_a_file_comes_after_the_preset(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "train: {steps: 3}\n")
    config = presets.resolve(preset="tiny", config=file)
    shipped = presets.resolve(preset="tiny")
    assert config.train.steps == 3
    assert config.reward == shipped.reward
    assert config.sample == shipped.sample


def test_a_file_with_rewards_replaces_those_it_inherits(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "extends: tiny\nreward: {brightness: {weight: 2}}\n")
    config = presets.resolve(config=file, assignments=["reward.brightness.weight=3"])
    assert {name: r.weight for name, r in config.reward.items()} == {"brightness": 3.0}
    # So do those that are held out.
    assert set(config.eval.rewards) == {"clip_choice"}
    file = write(tmp_path / "other.yaml", "extends: tiny\neval: {rewards: {symmetry: null}}\n")
    assert set(presets.resolve(config=file).eval.rewards) == {"symmetry"}
    assert presets.resolve(config=file).eval.every == 20


def test_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    file = write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        presets.resolve(config=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", r"bad\.yaml:3: train\.steps is given twice.*line 2"),
        ("train: [1, 2\n", "not valid YAML"),
        ("- 1\n- 2\n", "expected `key: value` lines"),
        ("extends: [tiny]\n", "expected the name of a preset"),
        ("extends: nobody\n", "unknown preset 'nobody'"),
        ("", "no reward is given"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        presets.resolve(config=write(tmp_path / "bad.yaml", text))


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"nothing\.yaml"):
        presets.resolve(config=tmp_path / "nothing.yaml")


def test_assignments_are_read_as_yaml() -> None:
    config = presets.resolve(
        preset="tiny",
        assignments=[
            "lora.target_modules=[to_q, to_v]",
            "train.micro_batch=auto",
            "train.max_grad_norm=null",
            "sample.negative_prompt=a=b",
        ],
    )
    assert config.lora.target_modules == ("to_q", "to_v")
    assert config.train.micro_batch == "auto"
    assert config.train.max_grad_norm is None
    assert config.sample.negative_prompt == "a=b"


@pytest.mark.parametrize("name", ["file.py:attribute", "./my.rewards/a.py:b", "package.module:c"])
def test_an_assignment_reaches_a_reward_whose_name_has_dots(name: str) -> None:
    layers = presets.Layers({"reward": {name: None}})
    presets.override(layers, [f"reward.{name}.weight=2", f"reward.{name}.loss.kind=hinge"])
    assert layers.values == {"reward": {name: {"weight": 2, "loss": {"kind": "hinge"}}}}
    layers = presets.Layers({})
    presets.override(layers, [f"eval.rewards.{name}.key=2"])
    assert layers.values == {"eval": {"rewards": {name: {"key": 2}}}}


def test_an_assigned_section_changes_what_it_names_as_one_in_a_file_does() -> None:
    tiny = presets.resolve(preset="tiny")
    texts = ["train={steps: 7}", "eval={rewards: {brightness: {}}}", "loss={scale: 2}"]
    found = presets.resolve(preset="tiny", assignments=[*texts, "loss.scale=3"])
    assert found.train == tiny.train.model_copy(update={"steps": 7})
    assert (list(found.eval.rewards), found.eval.prompts) == (["brightness"], tiny.eval.prompts)
    assert found.loss.scale == 3.0
    # Rewards are replaced, as by a file.
    assert list(presets.resolve(preset="tiny", assignments=["reward={redness: {}}"]).reward) == [
        "redness"
    ]
    with pytest.raises(ConfigError, match="1 problem") as error:
        presets.resolve(preset="tiny", assignments=["train={steps: 0}"])
    assert (error.value.problems[0].key, error.value.problems[0].origin) == ("train.steps", "--set")


def test_all_unreadable_assignments_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        presets.resolve(preset="tiny", assignments=["train.steps", "=3", "lora.rank=[1"])
    assert len(caught.value.problems) == 3


def test_an_assignment_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'steps' is a value, not a section"):
        presets.resolve(preset="tiny", assignments=["train.steps.more=1"])


def test_a_whole_text_in_place_of_a_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="expected key=value") as caught:
        presets.resolve(preset="tiny", assignments=["word " * 6000])
    assert len(caught.value.message) < 400
