"""A quantised base and the approximate decoder from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from alignprop_cli.cli import main
from alignprop_cli.lora.files import LORA_FILE
from tests.models.test_taesd import small_tiny

FAST = (
    "--preset=tiny",
    "--reward=brightness",
    "--set=sample.num_inference_steps=2",
    "--set=gradient.k_max=2",
    "--set=train.batch_size=2",
    "--set=train.micro_batch=2",
    "--set=eval.images=2",
    "--set=eval.sample_images=2",
)
Run = Callable[..., tuple[int, str, str]]

needs_bitsandbytes = pytest.mark.extra("bitsandbytes", "quantize")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


def rewards(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["rewards"]["brightness"]["mean"] for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("how", ["int8", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_a_quantised_base_is_trained_and_evaluated_as_it_was_trained(run: Run, how: str) -> None:
    given = [*FAST, f"--set=model.quantize={how}"]
    code, out, err = run("train", *given, "--steps=2", "--output=r", "--json")
    assert code == 0, err
    result = json.loads(out)
    file = Path("r/checkpoints/step-000002") / LORA_FILE
    # The file is a LoRA as any other, in float32.
    factors = load_file(file)
    assert all(str(value.dtype) == "torch.float32" for value in factors.values())
    assert any(float(v.abs().max()) > 0 for name, v in factors.items() if "lora_B" in name)

    code, out, err = run("evaluate", "r", "--images=2", "--json")
    assert code == 0, err
    found = json.loads(out)["rewards"]["brightness"]["base"]["mean"]
    # The same held-out samples in the same precision.
    held_out = result["held_out"]["rewards"]["brightness"]
    assert found == pytest.approx(held_out["base"], abs=1e-6)
    code, out, err = run(
        "evaluate", "r", "--images=2", "--json", "--overwrite", "--set=model.quantize=none"
    )
    assert code == 0, err
    full = json.loads(out)["rewards"]["brightness"]["base"]["mean"]
    assert full != found
    assert full == pytest.approx(found, abs=0.1)
    # A run goes on with the weights it began with.
    code, _, err = run("train", "--resume=r", "--steps=3", "--set=model.quantize=none")
    assert code == 2
    assert "model.quantize" in err


@pytest.mark.long
def test_a_dry_run_plans_quantised_weights_without_the_library(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, out, err = run(
        *("train", "--preset=klein_aesthetic", "--dry-run", "--gpu-memory=16GB", "--json"),
        *("--set=model.quantize=nf4", "--set=sample.height=256", "--set=sample.width=256"),
    )
    assert code == 0, err
    # 3.876 billion parameters, nearly all of them in linear layers: half a byte each, and a float32
    # for 64 of them.
    expected = 3.876e9 * (0.5 + 4 / 64)
    assert json.loads(out)["plan"]["estimate"]["parts"]["network weights"] == pytest.approx(
        expected, rel=0.01
    )


@pytest.mark.long
def test_training_sees_the_approximate_images_and_samples_are_the_models_own(run: Run) -> None:
    # The latents of the embedded model have 12 channels, and a quarter of the image's width.
    folder = small_tiny(
        Path("decoder").absolute(),
        latent_channels=12,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    decoder = f"--set=model.decoder={folder}"
    code, out, err = run("train", *FAST, "--steps=2", "--output=full", "--json")
    assert code == 0, err
    full: dict[str, Any] = json.loads(out)["held_out"]["rewards"]["brightness"]
    code, out, err = run("train", *FAST, decoder, "--steps=2", "--output=r", "--json")
    assert code == 0, err
    said = (
        f"decoder: {folder} for the rewards of training, an approximation; samples and evaluation"
    )
    assert said in err
    assert json.loads(out)["held_out"]["rewards"]["brightness"]["base"] == full["base"]
    assert rewards(Path("r"))[0] != pytest.approx(rewards(Path("full"))[0], abs=1e-3)
    code, out, err = run("evaluate", "r", "--images=2", "--json")
    assert code == 0, err
    found = json.loads(out)["rewards"]["brightness"]["base"]["mean"]
    assert found == pytest.approx(full["base"], abs=1e-6)

    # A file that a run names is read by a resumed one where it is named again.
    code, _, err = run("train", "--resume=r", "--steps=3")
    assert code == 2
    assert f"--set {decoder.removeprefix('--set=')}" in err
    code, out, err = run("train", "--resume=r", "--steps=3", decoder, "--json")
    assert code == 0, err
    # And the dry run says what is approximate.
    code, out, err = run("train", *FAST, decoder, "--dry-run")
    assert code == 0, err
    assert said in out


def test_what_cannot_work_is_one_message(run: Run) -> None:
    code, _, err = run("train", *FAST, "--set=model.decoder=taesd", "--steps=1", "--quiet")
    assert code == 2
    assert err.startswith("error: model.decoder: madebyollin/taesd does not fit tiny: pixels a lat")
    code, _, err = run("train", *FAST, "--set=model.decoder=./nowhere", "--steps=1", "--quiet")
    assert code == 3
    assert err.startswith("error: model.decoder: no such folder: ./nowhere")
    code, _, err = run("train", *FAST, "--set=model.quantize=int4", "--steps=1", "--quiet")
    assert code == 2
    assert "model.quantize" in err
