"""The commands and calls that a run tells its user, held against what they would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config
from alignprop_cli.shipped import next_command, python_call


def config_with(rewards: Sequence[str], **flags: Any) -> Config:
    given = {name.replace("_", "."): value for name, value in flags.items()}
    return presets.resolve(preset="tiny", rewards=dict.fromkeys(rewards), flags=given)


def test_without_a_python_object_a_run_tells_a_command() -> None:
    config = config_with(["clip"])
    assert python_call("evaluate", config, target="runs/x") is None
    assert next_command("alignprop evaluate runs/x", config) == "alignprop evaluate runs/x"


@pytest.mark.parametrize(
    ("rewards", "flags", "call"),
    [
        (["python:blue"], {}, "alignprop_cli.evaluate('runs/x', reward=blue)"),
        (
            ["python:Blue", "clip", "own.py:f"],
            {},
            "alignprop_cli.evaluate('runs/x', reward=[Blue, 'clip', 'own.py:f'])",
        ),
        # What else a caller has to name again.
        (
            ["python:blue"],
            {"model_id": "/a b/model", "eval_prompts": "mine.txt"},
            "alignprop_cli.evaluate('runs/x', model='/a b/model', reward=blue, "
            "overrides={'eval.prompts': 'mine.txt'})",
        ),
    ],
)
def test_with_one_it_tells_a_call_that_python_reads(
    rewards: list[str], flags: dict[str, str], call: str
) -> None:
    config = config_with(rewards, **flags)
    assert python_call("evaluate", config, target="runs/x") == call
    # Python itself reads it, and hands the arguments over.
    given: list[Any] = []

    class Api:
        @staticmethod
        def evaluate(*places: object, **named: object) -> None:
            given.extend([places, named])

    scope = {"alignprop_cli": Api, "blue": "the object", "Blue": "the class"}
    exec(call, scope)
    places, named = given
    assert places == ("runs/x",)
    objects = {"python:blue": "the object", "python:Blue": "the class"}
    wanted = [objects.get(name, name) for name in rewards]
    assert named["reward"] == (wanted if len(wanted) > 1 else wanted[0])


def test_arguments_that_are_not_given_are_left_out() -> None:
    config = config_with(["python:blue"])
    given: dict[str, Any] = {"resume": "r", "steps": None, "export": [], "push_to_hub": None}
    assert python_call("train", config, trust.TO_RESUME, **given) == (
        "alignprop_cli.train(resume='r', reward=blue)"
    )
    own = config_with(["python:blue"], eval_prompts="mine.txt")
    assert python_call("train", own, (), config="c.yaml", output="o") == (
        "alignprop_cli.train(config='c.yaml', output='o', reward=blue)"
    )
