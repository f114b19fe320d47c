"""How a batch is divided."""

from __future__ import annotations

import pytest

from alignprop_cli.config import Config
from alignprop_cli.errors import ConfigError
from alignprop_cli.plan import make_plan
from alignprop_cli.validation import parse


def config(**train: object) -> Config:
    group = train.pop("window_group", None)
    gradient = {"window_group": group}
    return parse({"reward": {"brightness": {}}, "train": train, "gradient": gradient})


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 16, 128])
def test_an_automatic_plan_covers_the_batch_exactly(processes: int, batch_size: int) -> None:
    plan = make_plan(config(batch_size=batch_size), processes=processes, device_type="cpu")
    assert plan.micro_batch * plan.accumulation * plan.processes == batch_size
    assert plan.window_group % (plan.micro_batch * plan.processes) == 0
    assert batch_size % plan.window_group == 0


def test_an_automatic_micro_batch_keeps_a_given_window_group() -> None:
    plan = make_plan(config(batch_size=24, window_group=6), processes=2, device_type="cpu")
    assert plan.window_group == 6
    assert 6 % (plan.micro_batch * 2) == 0


def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can() -> None:
    with pytest.raises(
        ConfigError, match="10 is not a multiple of 4 processes; nearest that is: 8"
    ):
        make_plan(config(batch_size=10), processes=4, device_type="cpu")


def test_a_micro_batch_that_does_not_divide_the_share_of_a_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 x 2 processes does not divide"):
        make_plan(config(batch_size=12, micro_batch=4), processes=2, device_type="cpu")


def test_a_window_group_smaller_than_all_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a multiple of micro-batch x processes"):
        make_plan(
            config(batch_size=8, micro_batch=2, window_group=2), processes=2, device_type="cpu"
        )
