"""Options of other tools: named in the message and in docs/coming-from.md as they are here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from alignprop_cli.config.foreign import ALIGNPROP, FLOWBP, TOOLS, TRL
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"


def keys(section: type[BaseModel] = Config, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_named_exists_here(tool: str) -> None:
    for name, here in TOOLS[tool].items():
        for key in re.findall(r"`((?:train|sample|gradient|model|loss|eval|output)\.\w+)`", here):
            assert key in keys(), f"{name} is said to be {key}"


@pytest.mark.parametrize(
    ("title", "table"),
    [("TRL's", TRL), ("the AlignProp repository", ALIGNPROP), ("FlowBP", FLOWBP)],
)
def test_the_page_says_what_the_messages_say(title: str, table: dict[str, str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^## From [^\n]*{title}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", section[0], re.MULTILINE))
    assert rows == dict(table)


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({"reward": {"aesthetic": None}, **values})
    problems = " ".join(str(problem) for problem in caught.value.problems)
    return f"{problems} {caught.value.hint}"


def test_a_file_of_trl_is_told_what_its_keys_are_here() -> None:
    said = message({"sample_num_steps": 50, "train_learning_rate": 1e-3, "num_epochs": 20})
    assert "In TRL's AlignPropConfig; here it is `sample.num_inference_steps`." in said
    assert "here it is `train.learning_rate`." in said
    assert "`train.steps` counts optimiser steps" in said
    assert "docs/coming-from.md" in said


def test_a_section_of_another_tool_is_told_key_by_key() -> None:
    said = message({"optimizer": {"learning_rate": 1e-5, "lr_warmup_steps": 0, "of_mine": 1}})
    assert "A section of FlowBP; here learning_rate is `train.learning_rate`" in said
    assert "lr_warmup_steps is `train.warmup_steps`" in said
    assert "of_mine" not in said


def test_a_key_within_a_section_of_both() -> None:
    said = message({"train": {"total_batch_size": 128}})
    assert "In the AlignProp repository; here it is `train.batch_size`." in said


def test_a_mistyped_key_is_still_a_mistyped_key() -> None:
    said = message({"train": {"learning_rte": 1.0}})
    assert "Did you mean 'learning_rate'?" in said
    assert "coming-from" not in said
