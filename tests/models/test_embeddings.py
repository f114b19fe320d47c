"""Embeddings beyond the memory's budget are read from disk, with the same bits."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import RunError
from alignprop_cli.guidance import Embeds
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.models import embeddings
from alignprop_cli.models.embeddings import EmbedsCache
from alignprop_cli.models.families import open_model
from alignprop_cli.planning.embeddings import count
from alignprop_cli.prompts import load_prompts
from tests.factories import generator, small_pipeline, small_xl_pipeline
from tests.flow_models import small_klein, small_sd3

CPU = torch.device("cpu")
SMALL = {"sd": small_pipeline, "sdxl": small_xl_pipeline, "sd3": small_sd3, "klein": small_klein}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the file on disk is made."""
    place = tmp_path / "disk"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    # Python looks it up once.
    monkeypatch.setattr("tempfile.tempdir", None)
    return place


def random_embeds(seed: int) -> Embeds:
    """Return 4,000 random bits of every precision, among them NaNs, and odd shapes."""
    bits = torch.randint(-(2**15), 2**15, (7, 12), generator=generator(seed), dtype=torch.int16)
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    tensors = {str(kind): bits.view(kind) for kind in kinds}
    tensors |= {"mask": bits > 0, "scalar": bits[0, 0], "empty": bits[:0], "columns": bits.T}
    return Embeds(tensors)


def same_bits(one: Embeds, other: Embeds) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    return all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and embeddings._bytes_of(a.contiguous()) == embeddings._bytes_of(b.contiguous())
        for a, b in ((one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


def test_what_is_read_has_the_bits_that_were_added(folder: Path) -> None:
    added = {f"prompt {i}": random_embeds(i) for i in range(5)}
    each = sum(t.numel() * t.element_size() for t in added["prompt 0"].tensors.values())
    cache = EmbedsCache(2 * each)
    for prompt, embeds in added.items():
        cache.add(prompt, embeds)
    assert (cache.held_bytes, cache.filed_bytes) == (2 * each, 3 * each)
    assert list(cache) == list(added)
    # In any order, and more than once.
    for prompt in ("prompt 4", "prompt 0", "prompt 2", "prompt 4", "prompt 3", "prompt 1"):
        assert same_bits(cache[prompt], added[prompt])
    assert not same_bits(cache["prompt 3"], added["prompt 4"])
    with pytest.raises(KeyError):
        cache["another"]
    assert str(folder) in cache.describe()


def test_the_file_has_no_name_and_goes_with_the_cache(folder: Path) -> None:
    def opened() -> list[str]:
        links = Path("/proc/self/fd").iterdir()
        return [str(link.readlink()) for link in links if link.is_symlink()]

    cache = EmbedsCache(0)
    cache.add("a", random_embeds(0))
    # So nothing is left, however the process ends.
    assert not list(folder.iterdir())
    assert any(str(folder) in path and path.endswith("(deleted)") for path in opened())
    del cache
    gc.collect()
    assert not any(str(folder) in path for path in opened())


def test_a_full_disk_is_told_with_what_to_do(folder: Path) -> None:
    cache = EmbedsCache(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        cache.add("prompt 0", random_embeds(0))
        with pytest.raises(RunError, match=f"{folder} has no room for the embeddings") as raised:
            cache.add("prompt 1", random_embeds(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "TMPDIR" in str(raised.value.hint)
    # What was there before can still be read.
    assert list(cache) == ["prompt 0"]
    assert same_bits(cache["prompt 0"], random_embeds(0))


def test_large_temporary_files_do_not_go_where_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert embeddings.folder() == Path("/var/tmp")


def test_processes_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "available", lambda device: (800, "test"))
    assert embeddings.budget() == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert embeddings.budget() == 50


def train(folder: Path, output: str) -> list[str]:
    options = {
        "model.id": folder,
        "sample.num_inference_steps": 2,
        "sample.guidance_scale": 2.0,
        "sample.height": 16,
        "sample.width": 16,
        "gradient.method": "full",
        "gradient.checkpoint_network": "none",
        "gradient.checkpoint_decoder": "false",
        "gradient.checkpoint_reward": "false",
        "train.batch_size": 4,
        "train.micro_batch": 2,
        "train.rollout_batch": 2,
        "train.decode_batch": 2,
        "eval.images": 2,
        "eval.sample_images": 2,
        "lora.rank": 2,
        "lora.target_modules": "null",
    }
    given = [f"--set={key}={value}" for key, value in options.items()]
    return ["train", "--preset=tiny", "--reward=brightness", "--steps=2", *given, "-o", output]


@pytest.mark.long
def test_training_from_disk_is_training_from_memory_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_klein(tmp_path / "model")
    for name, share in (("held", 0.25), ("filed", 0.0)):
        monkeypatch.setattr(embeddings, "SHARE", share)
        with pytest.raises(SystemExit) as ended:
            main(train(model, name))
        err = " ".join(capsys.readouterr().err.split())
        assert not ended.value.code, err
        assert ("0.00 GiB in memory, 0.00 GiB in a temporary file in" in err) is (name == "filed")
    held, filed = (
        load_file(Path(name, "checkpoints", "step-000002", LORA_FILE)) for name in ("held", "filed")
    )
    assert all(torch.equal(held[key], filed[key]) for key in held)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_two_processes_train_from_disk_what_they_train_from_memory(
    folder: Path, tmp_path: Path
) -> None:
    model = small_klein(tmp_path / "model")
    script = tmp_path / "run.py"
    for name, share in (("held", 0.25), ("filed", 0.0)):
        script.write_text(
            "from alignprop_cli.cli import main\n"
            "from alignprop_cli.models import embeddings\n"
            f"embeddings.SHARE = {share}\n"
            "main()\n"
        )
        launcher = ("torch.distributed.run", "--nproc-per-node=2", "--standalone")
        launcher += ("--local-addr=localhost",)
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(script), *train(model, name)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    held, filed = (
        load_file(tmp_path / name / "checkpoints" / "step-000002" / LORA_FILE)
        for name in ("held", "filed")
    )
    assert all(torch.equal(held[key], filed[key]) for key in held)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_plan_knows_the_bytes_of_a_prompt(name: str, tmp_path: Path) -> None:
    make: Callable[[Path], Path] = SMALL[name]
    config = ModelConfig(id=str(make(tmp_path / "model")), dtype="float32")
    flags = {"model.id": config.id, "model.dtype": "float32", "train.prompts": "dogs"}
    prompts, each = count(presets.resolve(preset="tiny", flags=flags), "cpu")
    held_out = load_prompts(presets.resolve(preset="tiny").eval.prompts)
    assert prompts == len({*load_prompts("dogs"), *held_out, ""})
    held = open_model(config, ["a cat"], CPU).embeds
    assert isinstance(held, EmbedsCache)
    assert held.held_bytes == each
