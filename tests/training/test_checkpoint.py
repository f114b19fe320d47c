"""The run folder: whole or not at all, and read back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.lora.files import LORA_FILE, checkpoints, latest
from alignprop_cli.storage import write_whole
from alignprop_cli.training import checkpoint
from alignprop_cli.training.checkpoint import State


def save_adapter(folder: Path) -> None:
    save_file({"unet.a.lora_A.weight": torch.ones(2)}, folder / LORA_FILE, metadata={"made": "by"})


def state(step: int) -> State:
    return State(step, 4 * step, {"0.exp_avg": torch.full((3,), float(step))})


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), save_adapter, keep=None)
    found = checkpoint.load(path)
    assert (found.step, found.images_seen) == (7, 28)
    assert torch.equal(found.optimizer["0.exp_avg"], torch.full((3,), 7.0))
    assert checkpoint.load_lora(path, "unet.").keys() == {"a.lora_A.weight"}
    assert checkpoint.header(path)["made"] == "by"


def test_only_the_newest_are_kept_and_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (999_999, 2, 1_000_000):
        checkpoint.save(tmp_path, state(step), save_adapter, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert latest(tmp_path).name == "step-1000000"


def test_a_failure_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter, keep=None)

    def full_disk(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, full_disk)
    assert [p.name for p in path.parent.iterdir()] == ["step-000001"]
    assert checkpoint.load(path).step == 1


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_whole(path, lambda folder: (folder / "old").write_text("x"))
    write_whole(path, lambda folder: (folder / "new").write_text("y"))
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in path.iterdir()] == ["new"]


def test_what_a_killed_run_left_behind_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), save_adapter, keep=None)
    (tmp_path / "checkpoints" / ".step-000002-abc").mkdir()
    assert len(checkpoints(tmp_path)) == 1
    checkpoint.sweep(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", LORA_FILE])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter, keep=None)
    if damage == "cut":
        (path / file).write_bytes((path / file).read_bytes()[:9])
    else:
        (path / file).unlink()

    def read() -> None:
        checkpoint.load(path)
        checkpoint.load_lora(path, "unet.")

    with pytest.raises(RunError, match=r"step-000001.*damaged checkpoint"):
        read()


def test_new_runs_are_numbered_and_foreign_folders_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint.new_run(None, "tiny") == Path("runs/tiny")
    checkpoint.make_run(Path("runs/tiny"))
    assert checkpoint.new_run(None, "tiny") == Path("runs/tiny-2")
    assert not Path("runs/tiny-2").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="full exists and is not empty"):
        checkpoint.new_run("full", "tiny")
    with pytest.raises(AssetError, match="runs/tiny: has no checkpoint"):
        latest(Path("runs/tiny"))
    with pytest.raises(AssetError, match="runs/none: does not exist"):
        latest(Path("runs/none"))


def test_counters_are_plain_json(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3), save_adapter, keep=None)
    assert json.loads((path / "state.json").read_text()) == {"step": 3, "images_seen": 12}
