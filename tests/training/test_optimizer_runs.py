"""Whole runs with KL, a schedule, an average and each optimiser: what they write, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from alignprop_cli.cli import main
from alignprop_cli.errors import AssetError
from alignprop_cli.lora import files
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.models.families import TINY
from tests.cli.test_train import FAST, adapter, metrics, same
from tests.training.test_optimizer import KINDS

Command = Callable[..., tuple[int, str, str]]
CHEAP = (*FAST, "--reward=brightness", "--set=eval.every=0", "--set=train.lr_decay_steps=4")
KEPT = ("pytorch_lora_weights.safetensors", f"ema/{LORA_FILE}", "optimizer.safetensors")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_one_that_was_not_stopped_bit_for_bit(kind: str, run: Command) -> None:
    shared = (
        "--preset", "tiny", "-q", *CHEAP,
        f"--set=train.optimizer={kind}", "--set=train.ema_decay=0.5", "--set=train.kl_weight=0.5",
        "--set=train.lr_schedule=cosine",
        f"--set=train.learning_rate={1.0 if kind == 'prodigy' else 0.01}",
    )  # fmt: skip
    often = ("--steps", 3, "--output", "whole", "--set=output.save_every=1")
    code, out, err = run("train", *shared, *often, "--json")
    assert code == 0, err
    assert run("train", *shared, "--steps", 2, "--output", "parts")[0] == 0
    code, _, err = run("train", "--resume", "parts", "--steps", 3, "-q", "--reward=brightness")
    assert code == 0, err
    whole, parts = Path("whole"), Path("parts")
    assert metrics(whole) == metrics(parts)
    for name in KEPT:
        one, two = (load_file(f / "checkpoints/step-000003" / name) for f in (whole, parts))
        assert one
        assert same(one, two), name

    lines = metrics(whole)
    # A fresh LoRA differs by nothing from the base model, and then by more and more; Prodigy begins
    # with steps that are a thousand times smaller.
    assert lines[0]["kl"] == 0.0
    if kind != "prodigy":
        assert 0.0 < lines[1]["kl"] < lines[2]["kl"]
        # Half a cosine over four steps.
        expected = [0.005 * (1.0 + math.cos(math.pi * step / 4)) for step in range(3)]
        assert [line["learning_rate"] for line in lines] == pytest.approx(expected, rel=1e-12)

    # The average of its definition: d_1 = 0, d_2 = 2 / 11, d_3 = 3 / 12.
    seen = [adapter(whole, step) for step in (1, 2, 3)]
    average = load_file(f"whole/checkpoints/step-000003/ema/{LORA_FILE}")
    assert average.keys() == seen[0].keys()
    for name, value in average.items():
        second = seen[0][name].lerp(seen[1][name], 9 / 11)
        torch.testing.assert_close(value, second.lerp(seen[2][name], 9 / 12), rtol=1e-5, atol=1e-7)

    # What was compared at the end is said, and where the other is.
    told = json.loads(out)
    assert told["weights"] == "last step"
    assert told["ema_adapter"] == str(
        Path(f"whole/checkpoints/step-000003/ema/{LORA_FILE}").resolve()
    )


def test_the_average_is_evaluated_and_loads_in_plain_diffusers(run: Command) -> None:
    given = ("--preset", "tiny", "-q", *CHEAP, "--steps", 2, "--set=train.learning_rate=0.02")
    assert run("train", *given, "--output", "r", "--set=train.ema_decay=0.9")[0] == 0
    checkpoint = Path("r/checkpoints/step-000002")
    evaluated = ("-q", "--json", "--reward=brightness", "--images", 2)
    code, out, err = run("evaluate", "r", "--ema", *evaluated)
    assert code == 0, err
    result = json.loads(out)
    assert result["output"] == str(Path("r/evaluation-ema").resolve())
    (identity,) = result["adapters"].values()
    assert identity["file"] == str((checkpoint / "ema" / LORA_FILE).resolve())
    assert list(result["adapters"]) == ["ema"]

    pipeline = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.load_lora_weights(checkpoint / "ema")
    held = dict(pipeline.unet.named_parameters())
    saved = load_file(checkpoint / "ema" / LORA_FILE)
    raw = load_file(checkpoint / LORA_FILE)
    for name, value in saved.items():
        part = name.removeprefix("unet.").replace(".weight", ".default_0.weight")
        torch.testing.assert_close(held[part].float(), value, rtol=0.0, atol=0.0)
    assert not same(saved, raw)

    # A flipped bit is noticed, by a resumed run and by whoever reads the file.
    file = checkpoint / "ema" / LORA_FILE
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, _, err = run("train", "--resume", "r", "--steps", 3, "-q", "--reward=brightness")
    assert code == 4
    assert f"ema/{LORA_FILE} is not as it was written" in err
    code, _, err = run("evaluate", "r", "--ema", "--overwrite", *evaluated)
    assert code == 3
    assert "is not the file that training wrote" in err
    file.unlink()
    code, _, err = run("train", "--resume", "r", "--steps", 3, "-q", "--reward=brightness")
    assert code == 4
    assert f"ema/{LORA_FILE} is missing" in err


def test_without_an_average_it_says_so(tmp_path: Path, run: Command) -> None:
    folder = tmp_path / "r" / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / LORA_FILE).write_bytes(b"")
    (tmp_path / "r" / "config.yaml").write_text("")
    with pytest.raises(AssetError, match="has no average of its weights") as refused:
        files.locate("r", averaged=True)
    assert "train.ema_decay=0.995" in (refused.value.hint or "")
    code, _, err = run("evaluate", "r", "--ema")
    assert code == 3
    assert "has no average of its weights (EMA)" in err
    code, _, err = run("evaluate", "base", "--ema", "--preset", "tiny")
    assert code == 2
    assert "name the LoRAs alone" in err


def test_labels_tell_the_average_from_the_weights(tmp_path: Path) -> None:
    run = tmp_path / "r"
    folder = run / "checkpoints" / "step-000002"
    (folder / "ema").mkdir(parents=True)
    for place in (folder, folder / "ema"):
        (place / LORA_FILE).write_bytes(b"")
    (run / "config.yaml").write_text("")

    def label(path: Path, **options: bool) -> str:
        return files.locate(str(path), **options).label

    assert label(run) == "r"
    assert label(run, averaged=True) == "r-ema"
    assert label(folder) == "r-step-000002"
    assert label(folder, averaged=True) == "r-step-000002-ema"
    assert label(folder / "ema") == label(folder / "ema", averaged=True) == "step-000002-ema"
    assert files.locate(str(run), averaged=True).run == run


@pytest.mark.parametrize("kind", ["adamw8bit", "prodigy"])
def test_a_missing_package_ends_a_run_before_it_begins(
    kind: str, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec

    def missing(name: str, *more: object) -> object:
        return None if name in ("bitsandbytes", "prodigyopt") else found(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    code, _, err = run("train", "--preset", "tiny", f"--set=train.optimizer={kind}", "--dry-run")
    assert code == 3
    assert "pip install 'alignprop[optimizers]'" in err
    assert not Path("runs").exists()
