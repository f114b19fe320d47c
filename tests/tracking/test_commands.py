"""The commands tell a tracker what they do; TensorBoard's own reader says what arrived."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alignprop_cli
from alignprop_cli import AlignPropError, Progress
from alignprop_cli.cli import main

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)

QUICK = (
    *("--set=sample.num_inference_steps=2", "--set=gradient.k_max=2"),
    *("--set=train.batch_size=2", "--set=train.micro_batch=2"),
    *("--set=eval.images=2", "--set=eval.sample_images=2", "--set=eval.every=2"),
)
LOGGED = ("--log-with=tensorboard", "--quiet")
PATIENT = 600.0


def ran(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code, arguments


def read(folder: Path, wanted: Callable[[Any], bool]) -> Any:
    """Return what TensorBoard reads; the tracker's process may be done after the command."""
    deadline = time.monotonic() + PATIENT
    while time.monotonic() < deadline:
        if (folder / "tensorboard").is_dir():
            found = accumulator.EventAccumulator(str(folder / "tensorboard"))
            found.Reload()
            if wanted(found):
                return found
        time.sleep(1.0)
    raise AssertionError(f"{folder}: {found.Tags()}")


@pytest.mark.long
def test_the_result_is_told_also_where_its_export_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def block(progress: Progress) -> None:
        # A file where the folder with the exports goes.
        if progress.stage == "training":
            Path("r/export").touch()

    with pytest.raises(AlignPropError, match="export"):
        alignprop_cli.train(
            "tiny",
            reward="brightness",
            steps=1,
            output="r",
            overrides={
                "sample.num_inference_steps": 1,
                "gradient.k_max": 1,
                "train.batch_size": 1,
                "train.micro_batch": 1,
                "eval.images": 1,
                "eval.sample_images": 1,
                "eval.sample_images_per_prompt": 1,
                "eval.rewards": {},
            },
            log_with="tensorboard",
            export="comfyui",
            progress=block,
        )
    read(Path("r"), lambda f: "final/seconds" in f.Tags()["scalars"])


@pytest.mark.long
def test_train_resume_evaluate_and_sweep_are_told(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran("train", "--preset", "tiny", *QUICK, "--steps=2", "--output=r", *LOGGED)
    found = read(Path("r"), lambda f: "final/seconds" in f.Tags()["scalars"])
    assert [event.step for event in found.Scalars("loss")] == [1, 2]
    assert {e.step for tag in found.Tags()["images"] for e in found.Images(tag)} == {0, 2}

    # Without the option nobody is told; with it again, also of what was missed.
    ran("train", "--resume", "r", "--steps=3", "--quiet")
    ran("train", "--resume", "r", "--steps=4", *LOGGED)
    found = read(Path("r"), lambda f: len(f.Scalars("loss")) == 4)
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]

    sampled = ("--images=2", *LOGGED)
    ran("evaluate", "r", "--scale=0,1", "--output=e", *sampled)
    found = read(Path("e"), lambda f: len(f.Tags()["images"]) == 6)
    at = [event.value for event in found.Scalars("curve/at")]
    assert at == [0.0, 1.0]
    # At strength 0 it is the base model, image by image.
    clip = {model: found.Scalars(f"rewards/clip/{model}/mean")[0].value
            for model in ("base", "strength 0", "strength 1")}  # fmt: skip
    assert clip["base"] == pytest.approx(clip["strength 0"], abs=1e-6)

    ran("soup", "r", "base", "--sweep=0:1:1", "--output=s", *sampled)
    found = read(Path("s/evaluation"), lambda f: len(f.Tags()["images"]) == 6)
    assert [event.value for event in found.Scalars("curve/at")] == [0.0, 1.0]
    with pytest.raises(SystemExit) as ended:
        main(["soup", "r", "base", "--output=x", "--log-with=tensorboard"])
    assert ended.value.code == 2
