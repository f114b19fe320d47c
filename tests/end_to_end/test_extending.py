"""A family, an estimator, a reward and a callback from outside, one file each, in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignprop_cli.config.validation import parse
from alignprop_cli.console import Console
from alignprop_cli.lora import files
from alignprop_cli.models import families
from alignprop_cli.training.run import run_training
from tests.end_to_end.toys.callback import StopAfter
from tests.end_to_end.toys.estimator import every_other
from tests.end_to_end.toys.family import TOY, write

REWARD = f"{Path(__file__).parent / 'toys' / 'reward.py'}:warmth"


def test_two_steps_with_parts_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    families.register(TOY)
    config = parse(
        {
            "model": {"id": str(write(tmp_path / "toy"))},
            "lora": {"rank": 2},
            "sample": {"num_inference_steps": 5, "guidance_scale": 1.5},
            "reward": {REWARD: {}},
            "train": {"prompts": "animals", "steps": 9, "batch_size": 4, "learning_rate": 0.05},
            "eval": {"images": 6, "every": 0},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    callback = StopAfter(2)
    run_training(
        config,
        Console(quiet=True),
        name="toy",
        resume=None,
        callbacks=[callback],
        estimator=every_other(),
    )

    assert callback.told == ["begins at 0", "step 1", "step 2", "ends"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # Every other one of 5 calls, as a coin falls for the one group of each step.
    assert {record["backprop_steps"] for record in records} <= {2.0, 3.0}
    assert all(record["grad_norm"] > 1e-6 for record in records)
    # The reward rises, and the adapter is named after the family's network.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["held_out"]["rewards"][REWARD]["difference"] > 0.0
    adapter = files.read(files.latest(tmp_path / "run") / files.LORA_FILE)
    assert adapter.layers.keys() == {"into", "out"}
    assert all(float(torch.as_tensor(f.up).norm()) > 0.0 for f in adapter.layers.values())
