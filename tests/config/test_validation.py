"""The schema: all problems at once, with their origin, and a lossless round trip."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from alignprop_cli.config.schema import Config, LossConfig, RewardConfig, dump
from alignprop_cli.config.section import differences
from alignprop_cli.config.validation import origin_of, parse
from alignprop_cli.errors import ConfigError

MINIMAL: dict[str, Any] = {"reward": {"clip": None}}


def problems(values: dict[str, Any], **origins: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(values, {key.replace("__", "."): value for key, value in origins.items()})
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_a_reward_alone_is_a_complete_configuration() -> None:
    config = parse(MINIMAL)
    assert config.reward["clip"].weight == 1.0
    assert config.sample.num_inference_steps == 50


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        {
            "train": {"steps": 0, "learning_rte": 1.0, "batch_size": 6},
            "gradient": {"method": "last_k", "k": 60, "window_group": 4},
            "smaple": {},
            "loss": {"kind": "hinge"},
            "reward": {"clip": {}},
        },
        train__steps="a.yaml:7",
        gradient="a.yaml:2",
    )
    assert found.keys() == {
        "train.steps",
        "train.learning_rte",
        "gradient.window_group",
        "gradient.k",
        "smaple",
        "loss.target",
    }
    assert found["train.steps"].endswith("got 0 (from a.yaml:7)")
    assert "Did you mean 'learning_rate'?" in found["train.learning_rte"]
    assert "Did you mean 'sample'?" in found["smaple"]
    assert found["gradient.k"].endswith("(from a.yaml:2)")
    assert "(from" not in found["loss.target"]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"sample": {"num_inference_steps": 4}, "gradient": {"k_max": 5}}, "gradient.k_max"),
        ({"gradient": {"k_min": 3, "k_max": 2}}, "gradient.k_min"),
        ({"sample": {"guidance_interval": [0.8, 0.2]}}, "sample.guidance_interval"),
        (
            {"sample": {"num_inference_steps": 1}, "gradient": {"method": "gaussian_k"}},
            "gradient.method",
        ),
        ({"train": {"batch_size": 8}, "gradient": {"window_group": 3}}, "gradient.window_group"),
        (
            {"sample": {"num_inference_steps": 1}, "gradient": {"method": "leap"}},
            "gradient.method",
        ),
        (
            {"sample": {"num_inference_steps": 2}, "gradient": {"method": "drtune"}},
            "gradient.calls",
        ),
        (
            {"sample": {"num_inference_steps": 4}, "gradient": {"method": "sparse", "calls": 5}},
            "gradient.calls",
        ),
        ({"gradient": {"method": "refl", "span": [0.8, 0.8]}}, "gradient.span"),
        (
            {
                "sample": {"num_inference_steps": 10},
                "gradient": {"method": "leap", "span": [0.9, 1.0]},
            },
            "gradient.span",
        ),
        (
            {
                "sample": {"num_inference_steps": 10},
                "gradient": {"method": "sparse", "span": [0.8, 1.0]},
            },
            "gradient.span",
        ),
        ({"sample": {"guidance_interval": [0.2, 1.5]}}, "sample.guidance_interval"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["to_q", 3]}}, "lora.target_modules"),
        ({"lora": {"target_modules": "to_(q"}}, "lora.target_modules"),
        ({"train": {"rollout_batch": 0}}, "train.rollout_batch"),
        ({"train": {"decode_batch": "some"}}, "train.decode_batch"),
        ({"gradient": {"method": "last_k", "k": 0}}, "gradient.k"),
        ({"gradient": {"method": "drtune", "calls": 0}}, "gradient.calls"),
        ({"gradient": {"method": "draft_lv", "copies": 0}}, "gradient.copies"),
        ({"gradient": {"method": "leap", "tau": 0.0}}, "gradient.tau"),
        ({"gradient": {"method": "refl", "span": [0.5, 1.5]}}, "gradient.span"),
        ({"gradient": {"endpoint": True}}, "gradient.endpoint"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"sample": {"eta": 1.5}}, "sample.eta"),
        ({"model": {"dtype": "float8"}}, "model.dtype"),
        ({"reward": {}}, "reward"),
        ({"reward": {"clip": {"loss": {"kind": "target"}}}}, "reward.clip.loss.target"),
        ({"reward": {"clip": {"loss": {"knid": "target"}}}}, "reward.clip.loss.knid"),
        # It would be maximised, and the target ignored.
        ({"loss": {"target": 0.3}}, "loss.kind"),
        (
            {
                "loss": {"kind": "hinge", "target": 1},
                "reward": {"a": {}, "b": {"loss": {"target": 2}}},
            },
            "reward.b.loss.kind",
        ),
        ({"train": {"micro_batch": "all"}}, "train.micro_batch"),
        ({"train": 3}, "train"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(section: dict[str, Any], key: str) -> None:
    assert list(problems(MINIMAL | section)) == [key]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (["to_q", "to_v"], ("to_q", "to_v")), (r"mid\..*\.to_q", r"mid\..*\.to_q")],
)
def test_target_modules_are_the_familys_a_list_or_a_regular_expression(
    given: Any, expected: Any
) -> None:
    config = parse(MINIMAL | {"lora": {"target_modules": given}})
    assert config.lora.target_modules == expected


@pytest.mark.parametrize("group", [None, 2, 3, 6])
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 8])
def test_a_micro_batch_need_not_divide_anything(group: int | None, micro_batch: int) -> None:
    train = {"batch_size": 6, "micro_batch": micro_batch}
    config = parse(MINIMAL | {"train": train, "gradient": {"window_group": group}})
    assert (config.train.rollout_batch, config.train.decode_batch) == ("auto", "auto")


def test_a_key_refused_by_every_branch_of_a_union_is_one_problem_even_in_odd_sections() -> None:
    # Names that pydantic uses for the branches of a union may be those of a reward.
    found = problems({"reward": {"int": {"weight": "x"}, "str": {"loss": {"kind": "none"}}}})
    assert list(found) == ["reward.int.weight", "reward.str.loss.kind"]


def test_the_origin_of_a_key_is_that_of_its_nearest_part() -> None:
    origins = {"train": "a.yaml:1", "train.steps": "--set"}
    assert origin_of("train.steps", origins) == "--set"
    assert origin_of("train.seed", origins) == "a.yaml:1"
    assert origin_of("loss.kind", origins) is None


def test_options_of_a_reward_are_kept_apart_from_its_weight() -> None:
    config = parse({"reward": {"clip": {"model": "tiny", "weight": 0.5}}})
    assert config.reward["clip"].options == {"model": "tiny"}
    assert config.reward["clip"].weight == 0.5


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"train": {"steps": True}}, "train.steps"),
        ({"train": {"learning_rate": True}}, "train.learning_rate"),
        ({"train": {"micro_batch": False}}, "train.micro_batch"),
        ({"sample": {"height": True}}, "sample.height"),
    ],
)
def test_true_and_false_are_no_numbers(section: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*no true or false"):
        parse({"reward": {"clip": {}}, **section})


def test_differences_are_found_by_key_with_both_values() -> None:
    old = {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "gone": 0}
    new = {"a": {"b": 1, "c": {"d": 3}}, "e": [1], "new": {"x": 1}}
    assert differences(old, new) == {"a.c.d": (2, 3), "gone": (0, None), "new": (None, {"x": 1})}
    assert differences(old, old) == {}


def test_a_configuration_cannot_be_changed() -> None:
    config = parse(MINIMAL)
    with pytest.raises(ValidationError):
        config.train.steps = 3  # type: ignore[misc]


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += sections(kind)
    return found


def test_every_field_says_what_it_is() -> None:
    silent = [
        f"{model.__name__}.{name}"
        for model in (*sections(Config), RewardConfig, LossConfig)
        for name, field in model.model_fields.items()
        if not field.description and model is not Config
    ]
    assert silent == []
    for model in (*sections(Config), RewardConfig):
        assert model.__doc__


texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)
positive = st.floats(1e-12, 1e12)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
    values=st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries({"id": texts, "revision": st.none() | texts}),
            "lora": st.fixed_dictionaries(
                {
                    "alpha": st.none() | positive,
                    "target_modules": st.none() | st.just(".*to_q") | st.lists(texts, min_size=1),
                }
            ),
            "sample": st.fixed_dictionaries(
                {"guidance_scale": st.floats(0.0, 30.0), "negative_prompt": texts}
            ),
            "train": st.fixed_dictionaries(
                {
                    "batch_size": st.sampled_from([4, 8]),
                    "rollout_batch": st.sampled_from(["auto", 16]),
                    "micro_batch": st.sampled_from(["auto", 2, 3]),
                    "decode_batch": st.sampled_from(["auto", 1]),
                    "learning_rate": positive,
                    "max_grad_norm": st.none() | positive,
                }
            ),
            "reward": st.dictionaries(
                texts,
                st.none() | st.fixed_dictionaries({"weight": st.floats(-5.0, 5.0), "model": texts}),
                min_size=1,
                max_size=3,
            ),
        }
    )
)
def test_dumping_and_parsing_give_the_same_configuration(values: dict[str, Any]) -> None:
    config = parse(values)
    text = dump(config)
    assert parse(yaml.safe_load(text)) == config
    assert dump(parse(yaml.safe_load(text))) == text


def test_held_out_rewards_are_named_like_rewards_and_have_no_weight_of_their_own() -> None:
    config = parse({**MINIMAL, "eval": {"rewards": {"pickscore": None, "hps": {"version": "2.0"}}}})
    assert config.eval.rewards["pickscore"].options == {}
    assert config.eval.rewards["hps"].options == {"version": "2.0"}
    assert parse(yaml.safe_load(dump(config))) == config
    found = problems({**MINIMAL, "eval": {"rewards": {"pickscore": {"dtype": "float8"}}}})
    assert found.keys() == {"eval.rewards.pickscore.dtype"}


def test_what_the_guard_watches_must_be_measured() -> None:
    guard = {"watch": ["held_out", "all right", "diversty", "clip"], "best": "pickscore"}
    found = problems({**MINIMAL, "guard": guard})
    assert found.keys() == {"guard.watch", "guard.best"}
    assert "'diversty'. Did you mean 'diversity'?" in found["guard.watch"]
    # It is once something is measured by that name.
    known = {"eval": {"rewards": {"pickscore": {}}}, "guard": {"best": "pickscore"}}
    assert parse({**MINIMAL, **known}).guard.best == "pickscore"
