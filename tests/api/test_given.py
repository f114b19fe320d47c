"""Python values become what the commands take, and come back as the same values."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from alignprop_cli.api import given
from alignprop_cli.config import presets
from alignprop_cli.errors import ConfigError

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text("ab.:"), SCALARS)


@settings(max_examples=50)
@for_all(VALUES)
def test_an_override_sets_the_value_itself(value) -> None:
    layers = presets.Layers()
    presets.override(layers, given.assignments({"reward.mine.option": value}))
    found = layers.values["reward"]["mine"]["option"]
    assert found == value
    # 1, 1.0 and True are equal, and mean different things.
    assert type(found) is type(value)


def test_paths_tuples_and_numbers_of_numpy_become_plain_values() -> None:
    value = {"a": (np.int64(3), np.float32(0.5)), "b": Path("x/y")}
    assert given.plain(value, "here") == {"a": [3, 0.5], "b": "x/y"}
    with pytest.raises(
        ConfigError, match=r"here\.a: an object of object can be in no configuration"
    ):
        given.plain({"a": object()}, "here")


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, images, prompts):
        return images


def test_every_reward_gets_a_name() -> None:
    odd, plain = Unhashable(), partial(print)
    named = given.rewards(["clip", odd, plain, lambda images, prompts: images])
    assert named.texts == ["clip", "python:Unhashable", "python:partial", "python:lambda"]
    assert named.objects["python:Unhashable"] is odd
    weighted = given.rewards({"clip": 1, plain: -1e-7}, weighted=True)
    assert weighted.texts == ["clip:1.0", "python:partial:-1e-07"]
    assert given.rewards(None).texts is None
    with pytest.raises(ConfigError, match="two objects have the name python:Unhashable"):
        given.rewards([odd, Unhashable()])
    with pytest.raises(ConfigError, match="finite number as its weight, got nan"):
        given.rewards({"clip": float("nan")}, weighted=True)


def test_numbers_and_members_as_their_options_have_them() -> None:
    assert given.listed(0.1) == "0.1"
    assert given.listed((0, 1e-9)) == "0.0,1e-09"
    assert given.members({"a": 0.3, Path("b"): 0.7}, None) == (["a", "b"], "0.3,0.7")
    assert given.members(["a", "b"], 0.5) == (["a", "b"], "0.5")
    assert given.several("a") == given.several([Path("a")]) == ["a"]
