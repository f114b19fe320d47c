"""Counts of shortened networks against those of the whole ones, on the published architectures."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alignprop_cli.config.schema import Config
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.published import ARCHITECTURES, PUBLISHED
from alignprop_cli.planning import repeats, request

IDS = {folder: hub_id for hub_id, folder in PUBLISHED.items()}

# Equal blocks in a row of the transformers, as published; of SDXL's those of at least five.
ROWS = {
    "sd-3-medium": [23, 1],  # the last one has no use for the texts
    "sd-3.5-medium": [13, 10, 1],  # with a second attention, and without
    "flux.1-dev": [19, 38],
    "flux.2-klein-4b": [5, 20],
    "z-image-turbo": [2, 2, 30],
    "qwen-image": [60],
    "krea-2-turbo": [28],
}

CASES: list[Any] = ["flux.2-klein-4b"] + [
    pytest.param(name, marks=pytest.mark.long)
    for name in ("sdxl", "sd-3.5-medium", "flux.1-dev", "z-image-turbo", "krea-2-turbo")
]


# Fewer blocks than published, and enough for some to be left out: counted whole in a third of the
# time.
FEWER = {
    "flux.1-dev": {"num_layers": 8, "num_single_layers": 9},
    "qwen-image": {"num_layers": 12},
}


def with_fewer(name: str, folder: Path) -> str:
    """Copy a published architecture with fewer blocks, and return the id to give."""
    shutil.copytree(ARCHITECTURES / name, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | FEWER[name]))
    return str(folder)


def config(name: str, **changes: Any) -> Config:
    model = {"id": IDS.get(name, name), **changes.pop("model", {})}
    return Config.model_validate({"model": model, "reward": {"brightness": {}}, **changes})


def assert_same(chosen: Config, device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = request.measure(chosen, device_type)
    monkeypatch.setattr(repeats, "find_rows", lambda network: repeats.Rows({}, {}))
    full = request.measure(chosen, device_type)
    assert short == full
    assert short.call["block"].backward_flops > short.call["none"].backward_flops > 0


@pytest.mark.parametrize("name", CASES)
def test_a_few_blocks_count_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(config(name), "cuda", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux.1-dev", {"lora": {"dora": True}}),
        (
            "flux.1-dev",
            {"lora": {"target_modules": "all-linear"}, "gradient": {"detach_uncond": True}},
        ),
        (
            "flux.1-dev",
            {"model": {"quantize": "int8"}, "sample": {"true_guidance_scale": 4.0}},
        ),
        # It begins in the texts' stream, and is in the image's a block later.
        ("qwen-image", {"lora": {"target_modules": ["to_add_out"]}}),
    ],
)
def test_a_few_blocks_count_for_all_with(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(with_fewer(name, tmp_path / name), **changes)
    assert_same(chosen, "cpu", monkeypatch)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_counts_as_many_times_as_it_has_blocks(name: str) -> None:
    network = meta_model(config(name).model, torch.float32).parts.network.module
    before = [id(part) for part in network.modules()]
    rows = repeats.find_rows(network)
    with repeats.shortened(rows):
        left = set(network.modules())
        assert all(block in left for block in rows.times)
        counted: Counter[str] = Counter()
        for block, number in rows.times.items():
            counted[type(block).__name__] += number
        # Of which no more than five are run.
        assert len(rows.times) == sum(min(5, row) for row in ROWS[name])
    assert sum(counted.values()) == sum(ROWS[name])
    assert [id(part) for part in network.modules()] == before


def test_of_a_unet_only_the_blocks_of_its_transformers_are_left_out() -> None:
    network = meta_model(config("sdxl").model, torch.float32).parts.network.module
    resnets = [part for part in network.modules() if type(part).__name__ == "ResnetBlock2D"]
    rows = repeats.find_rows(network)
    with repeats.shortened(rows):
        left = set(network.modules())
    assert all(resnet in left for resnet in resnets)
    assert {type(block).__name__ for block in rows.times} == {"BasicTransformerBlock"}
    # Two levels: of two blocks in five transformers, of ten in two, one and three.
    assert sum(rows.times.values()) == 5 * 2 + 6 * 10
    assert len(rows.times) == 5 * 2 + 6 * 5


class _Block(nn.Module):
    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 8 * width), nn.Linear(8 * width, width)
        self.places = places


class _Net(nn.Module):
    _repeated_blocks = ("_Block",)

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(8, each) for each in places)


def test_blocks_that_differ_in_a_setting_are_not_taken_for_equal() -> None:
    def times(network: _Net) -> list[int]:
        return list(repeats.find_rows(network).times.values())

    assert times(_Net([1] * 7 + [2] * 8)) == [1, 1, 1, 3, 1, 1, 1, 1, 4, 1]
    assert times(_Net(list(range(6)))) == [1] * 6
    # As the layers of a LoRA hold their scales, by adapter.
    network = _Net([1] * 14)
    for block in network.blocks[7:]:
        block.first.scaling = {"default": 2.0}
    assert times(network) == [1, 1, 1, 3, 1] * 2


def test_a_network_is_whole_again_after_an_error() -> None:
    network = _Net([1] * 9)
    with suppress(ValueError), repeats.shortened(repeats.find_rows(network)):
        assert len(network.blocks) == 5
        raise ValueError
    assert len(network.blocks) == 9
