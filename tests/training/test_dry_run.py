"""Plans for several cards at once are those for each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.errors import RunError
from alignprop_cli.planning import request as planning
from alignprop_cli.training import dry_run
from tests.planning.test_smaller import least

GIVEN = (
    *("train.batch_size=2", "train.micro_batch=auto", "sample.num_inference_steps=2"),
    "gradient.method=full",
    *(f"gradient.checkpoint_{part}=auto" for part in ("network", "decoder", "reward")),
)
# 604 MB of weights in float32, of which an option saves half.
LARGE, OPTION = "reward.clip.model=ViT-B-32", "reward.clip.dtype=bfloat16"


def config(*more: str, reward: str = "brightness") -> Config:
    return presets.resolve(preset="tiny", rewards={reward: None}, assignments=[*GIVEN, *more])


Described = Callable[..., dict[str, Any]]


@pytest.fixture
def described(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Described:
    monkeypatch.chdir(tmp_path)

    def call(config: Config, *sizes: int) -> dict[str, Any]:
        console, given = Console(as_json=True), [f"{size}B" for size in sizes]
        dry_run.describe(config, console, name="r", resume=None, gpu_memory=given)
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.long
def test_the_plan_of_each_card_is_the_one_for_it_alone(
    described: Described, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, smaller = config(LARGE, reward="clip"), config(LARGE, OPTION, reward="clip")
    request = planning.plan_request(base, 1)
    needs = [least(request, planning.measure(each, "cuda")) for each in (smaller, base)]
    sizes = needs[0], (needs[0] + needs[1]) // 2, needs[1], 2 * needs[1]
    alone = [described(smaller, sizes[0]), described(smaller, sizes[1])]
    alone += [described(base, sizes[2]), described(base, sizes[3])]

    counted: list[str | None] = []
    measure = planning.measure

    def counting(*args: Any, part: str | None = None, **more: Any) -> Any:
        counted.append(part)
        return measure(*args, part=part, **more)

    monkeypatch.setattr(planning, "measure", counting)
    found = described(base, *sizes, 1)
    *plans, none = found.pop("plans")
    options = [f"--set {OPTION}"] * 2 + [None] * 2
    for plan, own, option in zip(plans, alone, options, strict=True):
        assert plan == {key: own[key] for key in ("plan", "budget", "times")} | {"options": option}
    assert none == {"plan": None, "budget": none["budget"], "times": None, "options": None}
    assert found == {k: v for k, v in alone[3].items() if k in found} | {"schema": found["schema"]}
    assert found["schema"] == "alignprop.plans/1"
    # Everything once, and then each option's part once.
    assert counted[:2] == [None, "reward"]
    assert counted.count("reward") == 1


@pytest.mark.long
def test_where_none_fits_the_error_is_of_the_largest(described: Described) -> None:
    with pytest.raises(RunError, match=r"no plan fits 0\.02 GiB") as raised:
        described(config(), 10_000_000, 20_000_000, 1)
    assert str(raised.value.hint).startswith("try ")


def test_people_read_a_line_for_each(
    described: Described, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run.describe(
        config(), Console(), name="r", resume=None, gpu_memory=["1KB", "8GB", "80GB"], gpus=2
    )
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if " GiB (" in line]
    assert [line.partition(":")[0].partition(" (")[2] for line in shown] == [
        *("rtx3060)", "rtx3060)", "a100)")
    ]
    assert shown[0].endswith("no plan fits, and no option helps")
    assert shown[1].startswith(
        "8 GiB (rtx3060): 2 images a step = 2 processes x 1 micro-batch of 1"
    )
    assert "images an hour" in shown[2]
    assert lines[-1] == "nothing was done (--dry-run)"
    assert not list(Path().iterdir())
