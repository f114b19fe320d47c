"""Foreign JSON and YAML: plain data within bounds, or one line that says what is wrong."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alignprop_cli.parsing import (
    ParseError,
    read_json,
    read_yaml,
    read_yaml_lines,
    write_yaml,
)

# By hand, from YAML 1.2.2, section 10.3.2. PyYAML's own reading of the first six is 8, False, 90,
# the text "1e-4", a date and 10.
CORE = {
    "010": 10,
    "no": "no",
    "1:30": "1:30",
    "1e-4": 1e-4,
    "2001-01-01": "2001-01-01",
    "1_0": "1_0",
    "0o17": 15,
    "0x1f": 31,
    "-7": -7,
    ".5": 0.5,
    "-.inf": -math.inf,
    "~": None,
    "": None,
    "TRUE": True,
    "yes": "yes",
    "!!str 5": "5",
    "a: &x [1]\nb: *x": {"a": [1], "b": [1]},
    "<<: {a: 1}": {"<<": {"a": 1}},
}


@pytest.mark.parametrize("text", CORE)
def test_scalars_are_those_of_yaml_1_2(text: str) -> None:
    value = read_yaml(text)
    assert value == CORE[text]
    assert type(value) is type(CORE[text])


def _bomb(kind: str) -> str:
    """Nine levels of nine aliases: a few hundred characters that stand for 9^9 values."""
    lines = ["a: &a [1, 1]"]
    for level in range(1, 10):
        above, name = chr(96 + level), chr(97 + level)
        parts = [f"*{above}"] * 9
        keyed = ", ".join(f"k{i}: {part}" for i, part in enumerate(parts))
        inner = keyed if kind == "{}" else ",".join(parts)
        lines.append(f"{name}: &{name} {kind[0]}{inner}{kind[1]}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("&a {train: *a}", "inside of what it repeats", None),
        ("[" * 60 + "]" * 60, "nested too deeply", None),
        ("[" * 5000, "nested too deeply", None),
        (_bomb("[]"), "more than 10000 values", None),
        (_bomb("{}"), "more than 10000 values", None),
        ("a: 1\nb: !!bool x", "'x' is no bool", 2),
        ("!!int ''", "'' is no int", 1),
        ("!!float ''", "'' is no float", 1),
        ("!!timestamp x", "no plain data", 1),
        ("!!set {a, b}", "no plain data", 1),
        ("!!python/object/apply:os.system [ls]", "no plain data", 1),
        ("? [a]\n: b", "unhashable key", 1),
        ("a: 1\nb: {c: 1, c: 2}", "b.c is given twice, first on line 2", 2),
        ('a: "\\ud800"', "surrogate", None),
        ("a: [1", "expected ',' or '\\]'", 1),
        ("a: *b", "undefined alias", 1),
    ],
)
def test_what_is_no_plain_data_is_refused_at_once(
    text: str, message: str, line: int | None
) -> None:
    started = time.perf_counter()
    with pytest.raises(ParseError, match=message) as refused:
        read_yaml(text)
    assert refused.value.line == line
    assert "\n" not in str(refused.value)
    assert time.perf_counter() - started < 10.0


def test_every_key_knows_its_line() -> None:
    value, lines = read_yaml_lines("a: 1\nb:\n  c: 2\n  d:\n    e: 3\n")
    assert value == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.d": 4, "b.d.e": 5}


def test_what_another_reader_takes_for_a_number_is_quoted() -> None:
    for text in ("no", "010", "0o17", "1e3", "1:30", "yes", "true", "~", "", "<<", "2001-01-01"):
        written = write_yaml([text], flow=True)
        # PyYAML's own reader, by YAML 1.1, and ours, by YAML 1.2.
        assert yaml.safe_load(written) == [text] == read_yaml(written)


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc:-# 1"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(_PLAIN)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value
    assert read_yaml(write_yaml(value, flow=True)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[NaN]", "NaN is no finite number"),
        ("-Infinity", "no finite number"),
        ("1e999", "no finite number"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 200 + "1" + "}" * 200, "nested too deeply"),
        ('"\\ud800"', "surrogate"),
        ('{"\\ude00": 1}', "surrogate"),
        ("1" * 5000, "not JSON"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
    ],
)
def test_json_is_refused_with_one_line(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message) as refused:
        read_json(text)
    assert "\n" not in str(refused.value)


@given(_PLAIN.filter(lambda v: math.inf not in (v, -v if isinstance(v, float) else v)))
def test_other_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    text = json.dumps(value)
    if "Infinity" not in text:
        assert read_json(text) == json.loads(text)


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert read_json('"\\ud83d\\ude00"') == "\U0001f600" == read_yaml('"\\U0001f600"')


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\ufeff", "\xa0", "\n", "\r", "\t"])
def test_a_text_with_a_line_break_of_unicode_is_read_back_unchanged(mark: str, flow: bool) -> None:
    for text in (mark, f"{mark}a", f"a{mark}", f"a{mark}b"):
        for value in (text, {text: None}, [text], {"k": text}):
            written = write_yaml(value, flow=flow)
            assert read_yaml(written) == value
            assert yaml.safe_load(written) == value
