"""Each reader of what others wrote returns what it promises or raises what it documents."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignprop_cli.config import presets
from alignprop_cli.errors import AlignPropError
from alignprop_cli.lora import files as lora
from alignprop_cli.parsing import ParseError, read_json, read_yaml, write_yaml
from alignprop_cli.paths import user_path
from alignprop_cli.prompts import load_entries, load_prompts
from alignprop_cli.scoring import files as images
from alignprop_cli.scoring.captions import SOURCES, read_table
from alignprop_cli.scoring.embedded import Unclear, embedded_prompt
from tests.fuzz import strange
from tests.fuzz.assets import GRAPH, INFOTEXT
from tests.fuzz.assets import _images as all_images

TEXT = st.text(max_size=60) | st.sampled_from(strange.TEXTS)
# Of YAML and JSON: what stands between texts.
MARKS = st.sampled_from((*"{}[]:,\"'&*!|>%@`#-?~\n\t \\0", "!!", "<<", "---", ": ", "\\u", "- "))
CODE = st.lists(MARKS | TEXT, max_size=20).map("".join)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
SEEDS = st.integers(0, 2**32)
many = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one_line(text: str) -> None:
    """Assert that a message is one, and one line."""
    assert text
    assert "\n" not in text


def can_be_written(value: Any) -> bool:
    """Return whether every text in a value is one."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@many
@given(CODE)
def test_any_text_is_json_or_a_parse_error(text: str) -> None:
    try:
        value = read_json(text)
    except ParseError as error:
        one_line(str(error))
    else:
        # NaN and infinity are none of JSON's, and repeated keys are refused.
        assert value == json.loads(text)
        assert can_be_written(value)


@many
@given(CODE)
def test_any_text_is_yaml_or_a_parse_error(text: str) -> None:
    try:
        value = read_yaml(text)
    except ParseError as error:
        one_line(str(error))
    else:
        assert can_be_written(value)
        assert isinstance(value, dict | list | str | int | float | bool | None)


@many
@given(PLAIN.filter(can_be_written))
def test_yaml_that_is_written_is_read_back_by_us_and_by_others(value: Any) -> None:
    for flow in (False, True):
        text = write_yaml(value, flow=flow)
        assert read_yaml(text) == value, text
        assert yaml.safe_load(text) == value, text


@many
@given(TEXT)
def test_any_text_is_a_path_or_is_refused(text: str) -> None:
    with contextlib.suppress(AlignPropError):
        assert user_path(text, "--output").exists() in (True, False)


@many
@given(
    TEXT | CODE, st.sampled_from(("train.steps", "lora", "reward.clip.model", "sample.height", ""))
)
def test_any_assignment_gives_a_configuration_or_is_refused(text: str, key: str) -> None:
    with contextlib.suppress(AlignPropError):
        found = presets.resolve(preset="tiny", assignments=[f"{key}={text}"])
        numbers = [found.train.learning_rate, found.sample.guidance_scale, found.lora.alpha or 1.0]
        assert all(map(math.isfinite, numbers))


@many
@given(SEEDS, st.sampled_from((".txt", ".json", ".jsonl", ".csv")))
def test_any_file_holds_prompts_or_is_refused(tmp_path: Path, seed: int, suffix: str) -> None:
    rng = Random(seed)
    rows = [{"prompt": rng.choice(strange.TEXTS), "group": strange.value(rng)} for _ in range(3)]
    data = b"prompt,group\na cat,x\n"
    with contextlib.suppress(RecursionError):
        lines = [json.dumps(strange.mutate(row, rng)) for row in rows]
        data = {".json": f"[{','.join(lines)}]", ".csv": data.decode()}.get(
            suffix, "\n".join(lines)
        ).encode()
    file = tmp_path / f"p{suffix}"
    file.write_bytes(strange.damage(data, rng) if rng.random() < 0.6 else data)
    with contextlib.suppress(AlignPropError):
        found = load_prompts(str(file))
        assert found
        assert all(prompt.strip() == prompt != "" for prompt in found)
        assert can_be_written(found)
        entries = load_entries(str(file))
        assert [entry.prompt for entry in entries] == found
        assert can_be_written([entry.group for entry in entries])


@many
@given(SEEDS)
def test_any_text_in_an_image_is_a_prompt_or_none(seed: int) -> None:
    rng = Random(seed)
    with contextlib.suppress(RecursionError):
        graph = json.dumps(strange.mutate(GRAPH, rng, rng.choice((1, 3))))
        texts = {"prompt": rng.choice((graph, "a cat", "")), "workflow": graph}
        texts["parameters"] = strange.damage(INFOTEXT.encode(), rng).decode("utf-8", "replace")
        with contextlib.suppress(Unclear):
            prompt, source = embedded_prompt(texts)
            assert source in SOURCES
            assert prompt is None or prompt.strip()
            assert (prompt is None) == (source == "none")


@many
@given(SEEDS)
def test_any_bytes_are_an_image_or_a_value_error(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    name, data = rng.choice(list(IMAGES.items()))
    file = tmp_path / name
    file.write_bytes(strange.damage(data, rng, rng.choice((0, 1, 3))))
    try:
        found = images.read_image(file)
    except ValueError as error:
        one_line(str(error))
    else:
        assert found.pixels.shape[2] == 3
        assert found.pixels.dtype == "uint8"


IMAGES = all_images()


@many
@given(SEEDS)
def test_any_table_has_prompts_or_is_refused(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    rows = [{"file_name": "0.png", "prompt": "a cat"}, {"file_name": "1.png", "text": "a dog"}]
    lines = ["file_name,prompt", "0.png,a cat"]
    suffix = rng.choice((".jsonl", ".csv"))
    with contextlib.suppress(RecursionError):
        if suffix == ".jsonl":
            lines = [json.dumps(strange.mutate(row, rng)) for row in rows]
    file = tmp_path / f"t{suffix}"
    file.write_bytes(strange.damage("\n".join(lines).encode(), rng, rng.choice((0, 1, 2))))
    for lenient in (True, False):
        with contextlib.suppress(AlignPropError):
            for name, prompt in read_table(file, lenient=lenient).items():
                assert isinstance(name, str)
                assert lenient if prompt is None else prompt.strip()


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a LoRA of one layer, as bytes."""
    import torch

    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {
        f"{layer}.lora.down.weight": torch.ones(2, 8),
        f"{layer}.lora.up.weight": torch.ones(8, 2),
    }
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    folder = tmp_path_factory.mktemp("lora")
    header = {"alignprop.config": '{"model": {"id": "tiny"}}'}
    file = lora.save(folder, weights, header, prefix="unet.", adapter_metadata=settings)
    return file.read_bytes()


@many
@given(SEEDS)
def test_any_bytes_are_a_lora_or_are_refused(tmp_path: Path, lora_file: bytes, seed: int) -> None:
    from tests.fuzz.domains.adapters import damage_header

    rng = Random(seed)
    how: Callable[[], bytes] = rng.choice(
        (lambda: strange.damage(lora_file, rng), lambda: damage_header(lora_file, rng))
    )
    file = tmp_path / "m.safetensors"
    file.write_bytes(how())
    with contextlib.suppress(AlignPropError):
        found = lora.read(file)
        for factors in found.layers.values():
            assert math.isfinite(factors.scaling)
            assert factors.down.isfinite().all()
            assert factors.up.isfinite().all()
        lora.recorded_config(found.header, file)
