"""Inputs that have broken a law once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.assets import Assets


@dataclass(frozen=True)
class Example:
    """An input.

    Args:
        name: Of the test.
        make: Writes the input into an empty folder, and returns the command.
        codes: Exit codes that are right.
        says: A part of the message.
    """

    name: str
    make: Callable[[Path, Assets], list[str]]
    codes: tuple[int, ...] = (2, 3)
    says: str = ""


F8 = torch.float8_e4m3fn


def written(args: list[str], **files: bytes | str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that writes files, `__` for a dot in their names, and returns a command."""

    def make(place: Path, assets: Assets) -> list[str]:
        for name, data in files.items():
            file = place / name.replace("__", ".")
            file.write_bytes(data if isinstance(data, bytes) else data.encode())
        return args

    return make


def config(text: str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that writes a configuration and shows it."""
    return written(["train", "--config=c.yaml", "--show-preset"], c__yaml=text)


def setting(text: str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that sets something on the command line."""
    return written(["train", "--preset=tiny", "--show-preset", f"--set={text}"])


def prompts(name: str, data: str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that writes prompts and plans to train on them."""
    args = ["train", "--preset=tiny", "--dry-run", f"--set=train.prompts={name}"]
    return written(args, **{name.replace(".", "__"): data})


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Assets], list[str]]:
    """Return a function that changes tensors of a LoRA and mixes it with the base model."""

    def make(place: Path, assets: Assets) -> list[str]:
        state = load_file(assets.loras["plain"])
        change(state)
        save_file(state, place / "m.safetensors")
        return ["soup", "m.safetensors", "base", "--coef=0.5", "--output=s"]

    return make


def texts(**header: str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that gives a LoRA a header and evaluates it."""

    def make(place: Path, assets: Assets) -> list[str]:
        header_of = {name.replace("__", "."): text for name, text in header.items()}
        save_file(load_file(assets.loras["plain"]), place / "m.safetensors", metadata=header_of)
        return ["evaluate", "m.safetensors", "--output=e", "--images=1"]

    return make


def rows(*lines: str) -> Callable[[Path, Assets], list[str]]:
    """Return a function that resumes a file of rows."""

    def make(place: Path, assets: Assets) -> list[str]:
        (place / "o.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        pictures = str(assets.pictures)
        return ["score", pictures, "--reward=brightness", "--output=o.jsonl", "--resume", "--json"]

    return make


def first(state: dict[str, Any]) -> str:
    """Return the name of the first tensor."""
    return sorted(state)[0]


BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 12)
)
LISTS = "[" + ", ".join(["&a [1, 1]", *["*a"] * 9]) + "]"
ROW = '{"file": "x.png", "brightness": %s, "prompt": null, "prompt_source": "none", "content": "0"}'
CORPUS: list[Example] = [
    # Configurations.
    Example("yaml_alias_in_itself", config("&a {train: *a}\n"), (2,), "alias"),
    Example("yaml_alias_bomb", config(BOMB), (2,)),
    Example("yaml_nested", config("[" * 5000), (2,), "nested"),
    Example("yaml_set_at_the_top", config("!!set {a, b}\n"), (2,)),
    Example("yaml_bool_that_is_none", config("extends: tiny\ntrain: {steps: !!bool x}\n"), (2,)),
    Example("yaml_timestamp", config("extends: tiny\ntrain: {steps: !!timestamp x}\n"), (2,)),
    Example("yaml_nul_in_a_path", config('extends: tiny\ntrain: {prompts: "\\0"}\n'), (0, 2)),
    Example("yaml_extends_itself", config("extends: ./c.yaml\n"), (2,)),
    Example("yaml_extends_a_device", config("extends: /dev/zero\n"), (2, 3)),
    Example("set_of_lists", setting(f"train.steps={LISTS}"), (2,)),
    Example("set_in_itself", setting("reward=&a {clip: *a}"), (2,)),
    Example("set_nested", setting("model.id=" + "[" * 3000), (2,)),
    Example("set_not_utf8", setting("\udced\udca0=1e5"), (2,), "UTF-8"),
    Example(
        "reward_not_utf8",
        written(["train", "--preset=tiny", "--dry-run", "--reward=\udcff.py:f"]),
        (2,),
        "UTF-8",
    ),
    # Prompts.
    Example("prompts_nested", prompts("p.json", "[" * 5000), (2,), "nested"),
    Example("prompts_nested_lines", prompts("p.jsonl", '{"a":' * 5000), (2,), "nested"),
    Example("prompts_half_a_pair", prompts("p.jsonl", '{"prompt": "\\ud800"}'), (2,), "surrogate"),
    Example("prompts_many_digits", prompts("p.json", f"[{'9' * 5000}]"), (2,)),
    # LoRA files.
    Example("lora_no_shape", tensors(lambda s: s.update({first(s): torch.tensor(1.0)}))),
    Example("lora_rank_0", tensors(lambda s: s.update({first(s): s[first(s)][:0]}))),
    Example(
        "lora_alpha_of_three",
        tensors(lambda s: s.update({f"{first(s).rpartition('.lora')[0]}.alpha": torch.ones(3)})),
    ),
    Example("lora_float8", tensors(lambda s: s.update({first(s): s[first(s)].to(F8)})), (0, 2, 3)),
    Example("lora_nan", tensors(lambda s: s[first(s)].fill_(math.nan)), (4,)),
    Example("lora_settings_number", texts(lora_adapter_metadata="5")),
    Example("lora_settings_nested", texts(lora_adapter_metadata="[" * 5000)),
    Example("lora_settings_nosuch", texts(lora_adapter_metadata='{"unet.nosuch": 1}')),
    Example("lora_config_nested", texts(alignprop__config='{"a":' * 5000)),
    Example("lora_config_list", texts(alignprop__config="[1, 2]")),
    Example("lora_base_escape", texts(alignprop__base_model="\x1b[31m")),
    # Rows.
    Example("rows_null", rows(ROW % "null"), (3,)),
    Example("rows_text", rows(ROW % '"x"'), (3,)),
    Example("rows_nan", rows(ROW % "NaN"), (3,)),
    Example("rows_without_file", rows((ROW % "0.5").replace('"file"', '"nofile"'))),
    Example("rows_nested", rows('{"a":' * 5000), (3,)),
    Example(
        "rows_half_a_pair",
        rows((ROW % "0.5").replace('"prompt": null', '"prompt": "\\ud800"')),
        (3,),
    ),
    # Flags.
    Example("output_of_rows_here", written(["score", ".", "--output=."]), (2,), "is a folder"),
]
