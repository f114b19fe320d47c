"""The run folder: whole or not at all, and read back as it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from alignprop_cli import benchmarks
from alignprop_cli.config import presets
from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.lora.files import BEST, LORA_FILE, checkpoints, latest, named_checkpoint
from alignprop_cli.storage import sha256, sweep, write_whole
from alignprop_cli.training import checkpoint, folders, resume, setup
from alignprop_cli.training.checkpoint import State


def save_adapter(folder: Path) -> None:
    save_file({"unet.a.lora_A.weight": torch.ones(2)}, folder / LORA_FILE, metadata={"made": "by"})


def state(step: int) -> State:
    return State(step, 4 * step, {"0.exp_avg": torch.full((3,), float(step))})


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), save_adapter)
    found = checkpoint.load(path)
    assert (found.step, found.images_seen) == (7, 28)
    assert torch.equal(found.optimizer["0.exp_avg"], torch.full((3,), 7.0))
    assert checkpoint.load_lora(path, "unet.").keys() == {"a.lora_A.weight"}
    assert checkpoint.header(path)["made"] == "by"


def test_only_the_newest_are_kept_and_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (999_999, 2, 1_000_000):
        checkpoint.save(tmp_path, state(step), save_adapter)
    checkpoint.drop_old(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 3
    checkpoint.drop_old(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert latest(tmp_path).name == "step-1000000"


def test_a_failure_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter)

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
    checkpoint.save(tmp_path, state(1), save_adapter)
    (tmp_path / "checkpoints" / ".step-000002-abcdefgh.unfinished").mkdir()
    assert len(checkpoints(tmp_path)) == 1
    sweep(tmp_path / "checkpoints")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", LORA_FILE])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter)
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
    assert folders.new_run(None, "tiny") == Path("runs/tiny")
    assert folders.make_run(None, "tiny") == Path("runs/tiny")
    assert folders.new_run(None, "tiny") == Path("runs/tiny-2")
    assert not Path("runs/tiny-2").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="full exists and is not empty"):
        folders.new_run("full", "tiny")
    with pytest.raises(AssetError, match="runs/tiny: has no checkpoint"):
        latest(Path("runs/tiny"))
    with pytest.raises(AssetError, match="runs/none: does not exist"):
        latest(Path("runs/none"))


def checked(values: dict[str, object]) -> str:
    text = json.dumps(values, sort_keys=True)
    return json.dumps({**values, "check": hashlib.sha256(text.encode()).hexdigest()})


def test_counters_and_hashes_are_plain_json(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3), save_adapter)
    values = json.loads((path / "state.json").read_text())
    check = values.pop("check")
    text = json.dumps(values, sort_keys=True)
    assert check == hashlib.sha256(text.encode()).hexdigest()
    assert values == {
        "step": 3,
        "images_seen": 12,
        "skipped_in_row": 0,
        "metrics": "",
        "inputs": {},
        "sha256": {name: sha256(path / name) for name in (LORA_FILE, "optimizer.safetensors")},
    }


@pytest.mark.parametrize("file", ["optimizer.safetensors", LORA_FILE, "state.json"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, file: str) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter)
    good = (path / file).read_bytes()
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        (path / file).write_bytes(bad)
        assert file in (checkpoint.damage(path) or "")
    (path / file).write_bytes(good)
    assert checkpoint.damage(path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[1]", "cannot be read"),
        ("5", "cannot be read"),
        ("[" * 5000, "nested too deeply"),
        (checked({"step": 1, "sha256": {}}), "lacks a hash"),
        (checked({"step": 1, "sha256": 5}), "cannot be read"),
        ('{"step": 1, "sha256": {}}', r"state\.json is not as it was written"),
    ],
)
def test_damaged_counters_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter)
    (path / "state.json").write_text(text)
    with pytest.raises(RunError, match=message):
        checkpoint.load(path)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter)
    path.rename(path.with_name("step-000002"))
    with pytest.raises(RunError, match="is of step 1"):
        checkpoint.load(path.with_name("step-000002"))


def test_the_newest_whole_checkpoint_is_taken_and_the_others_are_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step), save_adapter)
    (tmp_path / "checkpoints" / "step-000003" / "state.json").unlink()
    adapter = tmp_path / "checkpoints" / "step-000002" / LORA_FILE
    adapter.write_bytes(adapter.read_bytes()[:-4] + bytes(4))
    said: list[str] = []
    assert resume.newest(tmp_path, said.append) == tmp_path / "checkpoints" / "step-000001"
    assert ["step-000003" in said[0], "step-000002" in said[1]] == [True, True]
    assert "state.json is missing" in said[0]
    assert "SHA-256" in said[1]
    for path in checkpoints(tmp_path):
        (path / "state.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match="step-000003: damaged checkpoint"):
        resume.newest(tmp_path)


def test_a_hidden_folder_is_no_content_and_a_killed_beginning_can_be_begun_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "r" / ".step-000001-abcdefgh.unfinished").mkdir(parents=True)
    (tmp_path / "r" / ".lock").write_text("1\n")
    assert folders.new_run(str(tmp_path / "r"), "tiny") == tmp_path / "r"


def test_a_link_to_a_checkpoint_is_dropped_and_what_it_points_to_stays(tmp_path: Path) -> None:
    kept = checkpoint.save(tmp_path / "elsewhere", state(1), save_adapter)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000001").symlink_to(kept)
    checkpoint.save(tmp_path, state(2), save_adapter)
    checkpoint.drop_old(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002"]
    assert checkpoint.damage(kept) is None


def test_the_best_is_kept_beside_the_newest_and_is_no_step_of_its_own(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, state(step), save_adapter)
        if step < 6:
            best = checkpoint.save(tmp_path, state(step), save_adapter, name=BEST)
    checkpoint.drop_old(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000006"]
    assert checkpoint.damage(best) is None
    assert checkpoint.load(best).step == 4
    assert resume.newest(tmp_path) == latest(tmp_path)
    assert named_checkpoint(tmp_path, "best") == best
    for same in ("6", "06", "0000000006"):
        assert named_checkpoint(tmp_path, same) == named_checkpoint(tmp_path, "step-000006")
    for name in ("9" * 5000, "4", "..", "best/", "./best", "", "²"):
        with pytest.raises(AssetError, match="has no checkpoint"):
            named_checkpoint(tmp_path, name)


def test_going_back_makes_a_checkpoint_the_newest_and_removes_what_came_after(
    tmp_path: Path,
) -> None:
    for step in (2, 6, 8):
        checkpoint.save(tmp_path, state(step), save_adapter)
    best = checkpoint.save(tmp_path, state(4), save_adapter, name=BEST)
    (tmp_path / "summary.json").write_text('{"steps": 8}')
    told: list[str] = []
    resume.go_back(tmp_path, best, told.append)
    assert not (tmp_path / "summary.json").exists()
    assert told == ["going back to step 4; removed: step-000006, step-000008"]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    assert checkpoint.damage(latest(tmp_path)) is None
    assert checkpoint.load(latest(tmp_path)).step == 4
    # Once more is the same: a run that is killed on the way back goes back again.
    resume.go_back(tmp_path, best, told.append)
    assert told[-1] == "going back to step 4"
    assert checkpoint.damage(best) is None


def test_samples_of_weights_that_are_gone_are_removed(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    (samples / "step-000009.png").mkdir(parents=True)
    names = [f"step-{step:06d}.{kind}" for step in (0, 4, 6, 1234567) for kind in ("png", "json")]
    own = ["step-000006.jpg", "step-8.png", "best.png"]
    for name in (*names, *own):
        (samples / name).touch()
    resume.cut_samples(tmp_path, 4)
    kept = {*names[:4], *own, "step-000009.png"}
    assert {path.name for path in samples.iterdir()} == kept
    # A run that begins again has none of its own; one without the folder needs none.
    resume.cut_samples(tmp_path, 0)
    assert {path.name for path in samples.iterdir()} == kept - set(names[2:])
    resume.cut_samples(tmp_path / "other", 0)


def spoil(path: Path) -> None:
    data = (path / LORA_FILE).read_bytes()
    (path / LORA_FILE).write_bytes(data[:-4] + bytes(4))


def test_the_best_is_taken_only_where_it_is_named_and_then_alone(tmp_path: Path) -> None:
    """Neither takes the place of the other; the message says that it is there."""
    steps = [checkpoint.save(tmp_path, state(step), save_adapter) for step in (2, 4)]
    best = checkpoint.save(tmp_path, state(2), save_adapter, name=BEST)
    # 1. A damaged best is no matter to a run that is resumed, nor to an evaluation of it.
    spoil(best)
    assert resume.newest(tmp_path) == latest(tmp_path) == steps[1]
    with pytest.raises(RunError, match="best: damaged checkpoint") as refused:
        checkpoint.load(named_checkpoint(tmp_path, "best"))
    assert refused.value.hint == "the newest checkpoint is resumed without --checkpoint best"
    # 2. Damaged steps: the one before them, and none where there is none. An evaluation is of the
    #    newest step or of nothing.
    checkpoint.keep_best(tmp_path, 2)
    spoil(steps[1])
    assert resume.newest(tmp_path) == steps[0]
    assert latest(tmp_path) == steps[1]
    spoil(steps[0])
    with pytest.raises(RunError, match="step-000004: damaged checkpoint") as refused:
        resume.newest(tmp_path)
    assert refused.value.hint == (
        "remove this folder to resume from the checkpoint before it; --checkpoint best resumes "
        "from the best one, of step 2"
    )
    # 3. Going back to the best leaves no damaged step of its number behind: it would be passed over
    #    if the process were killed before its next checkpoint.
    resume.go_back(tmp_path, best, lambda text: None)
    assert resume.newest(tmp_path) == steps[0]


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 0.5 * step})


def with_metrics(run: Path, done: int, text: str | None) -> Path:
    """Return a checkpoint that was saved after whole lines, with other metrics written since."""
    run.mkdir(exist_ok=True)
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(f"{line(i)}\n" for i in range(1, done + 1)))
    saved = State(done, 4 * done, {}, metrics=resume.metrics_hash(run, done))
    path = checkpoint.save(run, saved, save_adapter)
    if text is None:
        metrics.unlink()
    else:
        metrics.write_text(text)
    return path


@pytest.mark.parametrize("after", ["", f"{line(3)}\n", f"{line(3)}\n" + '{"step": 4, "lo'])
def test_metrics_are_cut_to_the_checkpoint_without_a_word(tmp_path: Path, after: str) -> None:
    path = with_metrics(tmp_path, 2, f"{line(1)}\n{line(2)}\n{after}")
    said: list[str] = []
    assert resume.cut_metrics(tmp_path, path, said.append)
    assert said == []
    assert (tmp_path / "metrics.jsonl").read_text() == f"{line(1)}\n{line(2)}\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (None, []),
        ("", []),
        (f"{line(1)}\n", [1]),
        (f"{line(1)}\n" + "\0" * 30 + "\n", [1]),
        (f"{line(1)}\nnoise\n{line(2)}\n", [1, 2]),
        (f"{line(1)}\n" + line(2).replace("1.0", "9.0") + "\n", [1, 2]),
        ("[" * 5000 + f"\n{line(2)}\n", [2]),
    ],
)
def test_damaged_metrics_are_told_kept_aside_and_do_not_stop_a_run(
    tmp_path: Path, text: str | None, kept: list[int]
) -> None:
    path = with_metrics(tmp_path, 2, text)
    said: list[str] = []
    resume.cut_metrics(tmp_path, path, said.append)
    assert len(said) == 1
    assert "is not as it was written" in said[0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(each)["step"] for each in lines] == kept
    if text is not None:
        assert (tmp_path / "metrics.damaged.jsonl").read_text() == text
    # The next checkpoint is of the file as it is now: resuming from it is silent.
    saved = State(3, 12, {}, metrics=resume.metrics_hash(tmp_path, 3))
    said.clear()
    resume.cut_metrics(tmp_path, checkpoint.save(tmp_path, saved, save_adapter), said.append)
    assert said == []


def test_metrics_that_are_a_folder_are_put_aside(tmp_path: Path) -> None:
    path = with_metrics(tmp_path, 1, None)
    (tmp_path / "metrics.jsonl").mkdir()
    said: list[str] = []
    resume.cut_metrics(tmp_path, path, said.append)
    assert len(said) == 1
    assert (tmp_path / "metrics.damaged.jsonl").is_dir()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_what_the_run_reads_must_be_what_it_was(tmp_path: Path) -> None:
    before = {"train.prompts": "a", "model.id": "b"}
    path = checkpoint.save(tmp_path, State(1, 4, {}, inputs=before), save_adapter)
    resume.refuse_other_inputs(path, before)
    with pytest.raises(ConfigError, match=r"model\.id: .*\n.*reward\.x: ") as refused:
        resume.refuse_other_inputs(path, {"train.prompts": "a", "model.id": "c", "reward.x": "d"})
    assert "train.prompts" not in refused.value.message


def test_prompts_that_have_changed_on_the_hub_since_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub's newest file is taken, so only what it holds tells whether it is the same.
    file = tmp_path / "PartiPrompts.tsv"
    monkeypatch.setattr(benchmarks, "hf_hub_download", lambda *given, **options: str(file))
    config = presets.resolve(preset="tiny", flags={"train.prompts": "parti"})

    def inputs(text: str) -> dict[str, str]:
        file.write_text(f"Prompt\tCategory\n{text}\n")
        return setup.inputs(config, cast("Any", SimpleNamespace(path=None)))

    saved = State(1, 4, {}, inputs=inputs("an atom\tAbstract"))
    path = checkpoint.save(tmp_path, saved, save_adapter)
    # What is not the prompts may change.
    resume.refuse_other_inputs(path, inputs("an atom\tArts"))
    with pytest.raises(ConfigError, match=r"train\.prompts: its content has changed since"):
        resume.refuse_other_inputs(path, inputs("two atoms\tAbstract"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in a folder")
@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", LORA_FILE])
def test_a_pipe_in_place_of_a_file_is_a_missing_file(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, state(1), save_adapter)
    (path / name).unlink()
    os.mkfifo(path / name)
    assert checkpoint.damage(path) == f"{name} is missing"


@pytest.mark.parametrize(
    ("steps", "best", "kept"),
    [
        ([3, 6], 3, 3),  # as it should be
        ([3, 6], 8, 3),  # killed after 8 was found best, and resumed from 6
        ([3, 6], None, 3),  # killed after 3 was saved, before it became best
        ([6], 8, None),  # 3 has been dropped meanwhile
        ([3, 6], 8, None),  # gone back to where nothing had been better than the base model
    ],
)
def test_the_best_checkpoint_is_that_of_the_best_measurement(
    tmp_path: Path, steps: list[int], best: int | None, kept: int | None
) -> None:
    for step in steps:
        checkpoint.save(tmp_path, state(step), save_adapter)
    if best is not None:
        checkpoint.save(tmp_path, state(best), save_adapter, name=BEST)
    wanted = kept if steps != [6] else 3
    place = tmp_path / "checkpoints" / BEST
    assert checkpoint.keep_best(tmp_path, wanted) == (kept is not None)
    assert place.exists() == (kept is not None)
    if kept is not None:
        assert checkpoint.damage(place) is None
        assert checkpoint.load(place).step == kept
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n:06d}" for n in steps]
