"""An evaluation that cannot fit the memory says so before it starts; one that fits runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config, ModelConfig
from alignprop_cli.device import available
from alignprop_cli.errors import RunError
from alignprop_cli.guidance import guided
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.planning import meter, sampling
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.estimate import Budget
from alignprop_cli.planning.sampling import check_memory, fitting_batch, measure
from alignprop_cli.rewards.clip import ClipReward
from tests.factories import randn, small_pipeline

CPU = torch.device("cpu")
GIB = 2**30


def config(*sets: str, preset: str = "tiny") -> Config:
    return presets.resolve(preset=preset, assignments=["model.dtype=float32", *sets])


def test_what_is_counted_is_what_the_real_parts_allocate(tmp_path: Path) -> None:
    folder = small_pipeline(tmp_path / "model")
    settings = config(f"model.id={folder}", "sample.guidance_scale=3", "sample.height=32")
    need = measure(settings, CPU)
    assert (need.height, need.width) == (32, 16)

    # The same work with real weights and real numbers.
    model = open_model(ModelConfig(id=str(folder), dtype="float32"), ["a", ""], CPU)
    shape = model.network.latent_shape(32, None)
    step = model.network.schedule(20, shape).steps[0]
    guidance = sampler(settings.sample, model.family).guidance
    denoise = guided(model.network.predict, model.conditioning(["a"], ""), guidance)
    latents = randn(1, 1, *shape, dtype=torch.float32)
    weights = [*model.network.module.parameters(), *model.decoder.module.parameters(), latents]
    with torch.no_grad():
        call = meter.count(lambda: denoise(latents, step), exclude=weights)
        decode = meter.count(lambda: model.decoder.decode(latents), exclude=weights)
    assert need.parts["network"](1) == pytest.approx(call.forward, rel=0.05)
    assert need.parts["decoder"](1) == pytest.approx(decode.forward, rel=0.05)
    parts = (model.network.module, model.decoder.module)
    real = sum(4 * p.numel() for part in parts for p in part.parameters())
    aligner = ClipReward("tiny").networks[0].parameters()
    assert need.weights == real + sum(4 * p.numel() for p in aligner)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the memory be what a test says."""
    size = [available(CPU)[0]]
    monkeypatch.setattr(sampling, "available", lambda device: (size[0], "free RAM"))
    return size


def test_exactly_what_is_needed_is_enough_and_a_byte_less_is_not(free: list[int]) -> None:
    settings = config("eval.batch_size=4", "eval.images=10")
    need = measure(settings, CPU)
    kept = 3 * 10 * 3 * 48 * 48
    free[0] = int(need.peak(4)) + kept + 1
    check_memory(settings, CPU, models=3)
    free[0] = int(need.peak(3)) + kept + 1
    with pytest.raises(RunError) as caught:
        check_memory(settings, CPU, models=3)
    assert caught.value.hint == "--batch-size 3 would fit"
    check_memory(config("eval.batch_size=3", "eval.images=10"), CPU, models=3)
    # Fewer images than a batch are no batch.
    check_memory(config("eval.batch_size=100", "eval.images=3"), CPU, models=3)


def test_images_that_stay_are_counted(free: list[int]) -> None:
    settings = config("eval.images=1000000")
    free[0] = GIB
    with pytest.raises(RunError) as caught:
        check_memory(settings, CPU, models=2)
    assert "2000000 images of 48 x 48 pixels need 12.87 GiB, there are 1.00 GiB (free RAM)" in (
        caught.value.message
    )
    assert f"at most --images {GIB // (2 * 3 * 48 * 48)} would fit" in str(caught.value.hint)


def test_more_images_than_the_ram_holds_are_kept_on_a_disk_that_has_the_space(
    free: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("eval.images=100000", "eval.batch_size=1")
    kept = 2 * 100_000 * 3 * 48 * 48
    # Up to a quarter of the RAM stays there.
    free[0] = 4 * kept
    assert not check_memory(settings, CPU, models=2, disk=tmp_path).on_disk
    free[0] = 4 * kept - 1
    assert check_memory(settings, CPU, models=2, disk=tmp_path).on_disk
    assert not check_memory(settings, CPU, models=2).on_disk
    # Pixels and files: twice as much.
    usage = shutil.disk_usage(tmp_path)
    for space, is_enough in ((2 * kept, False), (int(2.03 * kept) + 2**20, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, s=space: usage._replace(free=s))
        if is_enough:
            check_memory(settings, CPU, models=2, disk=tmp_path)
        else:
            with pytest.raises(RunError, match="evaluation of 200000 images of 48 x 48 pixels nee"):
                check_memory(settings, CPU, models=2, disk=tmp_path)


def test_the_largest_pictures_do_not_fit_here_and_it_takes_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if available(CPU)[0] > 256 * GIB:
        pytest.skip("this machine may have enough memory")
    check_memory(config(), CPU, models=1)  # imports, and what is made once
    started = time.perf_counter()
    words = ("--set", "sample.height=8184", "--set", "sample.width=8184")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "base", "--preset", "tiny", *words, "-o", str(tmp_path / "out")])
    assert ended.value.code == 4
    err = " ".join(capsys.readouterr().err.split())
    assert "sampling 16 images of 8184 x 8184 pixels together needs at least" in err
    assert "hint: " in err
    assert time.perf_counter() - started < 60.0
    assert not (tmp_path / "out").exists()


def test_what_fits_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--set", "sample.height=192", "--set", "sample.num_inference_steps=1")
    ask = ["evaluate", "base", "--preset", "tiny", "-n", "2", *words, "--reward", "brightness"]
    with pytest.raises(SystemExit) as ended:
        main([*ask, "-o", str(tmp_path / "out"), "-q"])
    assert not ended.value.code, capsys.readouterr().err


def test_samples_fit_beside_what_training_holds() -> None:
    settings = config()
    parts = planning.measure(settings, "cuda")
    weights = sum(parts.weights.values()) + 16 * parts.trained
    # What is planned for an image is what it takes without gradient, or a little more.
    largest = max(part.each for part in measure(settings, CPU).parts.values())
    assert parts.sampling_decoder is not None
    each = max(p.forward.each for p in (parts.rollout, parts.sampling_decoder, parts.reward[True]))
    assert largest <= each < 1.3 * largest

    def fits(images: float, held: float = 0.0) -> int:
        # By what an estimate is exceeded on a GPU.
        size = Budget(0, "cuda", "").least(int(1.04 * (weights + images * each)))
        return fitting_batch(parts, Budget(size, "cuda", ""), 8, held=held)

    assert [fits(n) for n in (0.5, 1.01, 3.01, 7.99, 8.01, 50.0)] == [1, 1, 3, 7, 8, 8]
    assert fits(3.01, held=each) == 2
