"""Every tracker really runs, offline, and is read back by its own reader.

Each needs its package (pip install 'alignprop[trackers]'); .ci/run runs this file with all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from alignprop_cli.config.tracking import Tracker
from alignprop_cli.tracking.follow import Followers
from alignprop_cli.tracking.spool import Job, State, identity

INSTALLED = [name for name in get_args(Tracker) if importlib.util.find_spec(name) is not None]
SECRET = "0123456789abcdef0123456789abcdef01234567"  # what a key of wandb looks like
PROMPT = "two red cats"
PATIENT = 600.0  # seconds; more than any tracker needs to import and write


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.extra(name, name)


def offline(place: Path, patch: pytest.MonkeyPatch) -> None:
    """Let every tracker write below a folder, with keys that must be written nowhere."""
    patch.chdir(place)
    patch.setenv("HOME", str(place / "home"))
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        patch.setenv(name, "offline")
    patch.setenv("WANDB_API_KEY", SECRET)
    patch.setenv("SWANLAB_API_KEY", SECRET)
    patch.setenv("HF_TOKEN", f"hf_{SECRET}")
    patch.setenv("TRACKIO_DIR", str(place / "trackio"))
    patch.setenv("MLFLOW_TRACKING_URI", f"file:{place / 'mlruns'}")
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def job_of(folder: Path, **changes: Any) -> Job:
    """Return the job of a run in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    made = Job(
        kind="train",
        name="first",
        project="pictures",
        run_name=None,
        tags=("mine",),
        config={
            "lora": {"rank": 7, "alpha": None},
            # A key has no place in a configuration; it is masked all the same.
            "model": {"id": "tiny", "revision": SECRET, "also": [f"https://me:{SECRET}@here"]},
        },
        folder=str(folder),
        states=str(folder / "trackers"),
    )
    return replace(made, **changes)


def tell(job: Job, names: list[str], steps: range, adapter: Path) -> list[str]:
    """Run trackers to their end; return what was said."""
    said: list[str] = []
    followers = Followers(names, said.append, limit=PATIENT)
    followers.start(job)
    for step in steps:
        reward = {"clip": {"mean": 0.5 * step, "std": float("nan")}}
        followers.scalars(step, {"loss": 1.0 / step, "rewards": reward, "told": "a text"})
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200
    last = steps[-1]
    followers.images(last, "samples", [(image, PROMPT, "clip 0.25")])
    followers.artifact("adapter", [adapter])
    followers.end("finished")
    return said


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Tell all trackers of steps 1 to 3, then, resumed at step 2, of 1 to 4."""
    if not INSTALLED:
        pytest.skip("no tracker is installed")
    place = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        offline(place, patch)
        adapter = place / "pytorch_lora_weights.safetensors"
        adapter.write_bytes(b"weights" * 100)
        job = job_of(place / "run")
        said = tell(job, INSTALLED, range(1, 4), adapter)
        # As a run does that is resumed: all lines of its metrics come again.
        said += tell(replace(job, resumed=2), INSTALLED, range(1, 5), adapter)
        yield SimpleNamespace(place=place, run=place / "run", said=said, adapter=adapter, job=job)


def test_nothing_is_lost_and_every_tracker_says_so(told) -> None:
    assert told.said == []
    for name in INSTALLED:
        state = json.loads((told.run / "trackers" / f"{name}.json").read_text())
        assert (state["taken"], state["lost"], state["step"], state["done"]) == (6, 0, 4, True)
        assert state["error"] is None


def test_no_key_is_written_anywhere(told) -> None:
    files = [file for file in told.place.rglob("*") if file.is_file()]
    assert len(files) > len(INSTALLED)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


@needs("tensorboard")
def test_tensorboard_reads_its_files(told) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(told.run / "tensorboard"))
    read.Reload()
    tags = read.Tags()
    # Step 3 was undone by resuming at step 2, so it is there once.
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4]
    found = {event.step: event.value for event in read.Scalars("rewards/clip/mean")}
    assert found == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert "rewards/clip/std" not in tags["scalars"]
    assert tags["images"] == [f"samples/00 {PROMPT}"]
    assert read.Images(tags["images"][0])[-1].width == 8
    texts = {tag: read.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in tags["tensors"]}
    assert b"lora.rank: 7" in texts["config/text_summary"]
    assert b"clip 0.25" in texts["samples/captions/text_summary"]


@needs("tensorboard")
def test_tensorboard_shows_a_run_that_was_begun_again_once(tmp_path: Path) -> None:
    from accelerate import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from alignprop_cli.tracking.backends import TensorBoard

    PartialState()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    shown = {"file": str(tmp_path / "image.png"), "prompt": PROMPT, "text": "clip 0.25"}
    # Killed after step 2, before there was a checkpoint.
    for start, steps in enumerate((2, 3)):
        tracker = TensorBoard(job_of(tmp_path / "run"), "id")
        tracker.images(0, "samples", [shown])
        for step in range(1, steps + 1):
            tracker.scalars(step, {"loss": 10.0 * start + step})
        tracker.end("failed")
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("loss")]
    assert found == [(1, 11.0), (2, 12.0), (3, 13.0)]
    assert [event.step for event in read.Images(f"samples/00 {PROMPT}")] == [0]


@needs("wandb")
def test_wandb_reads_its_offline_files(told) -> None:
    files = sorted((told.place / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    first, second = ([record for record in _records(file)] for file in files)
    # Both starts are of one run, which `wandb sync` joins.
    ids = {record.run.run_id for record in (*first, *second) if record.HasField("run")}
    state = State.read(told.run / "trackers" / "wandb.json")
    assert ids == {identity(told.job, state.nonce)}
    steps = [
        [row["step"] for row in _history(records) if "loss" in row] for records in (first, second)
    ]
    assert steps == [[1, 2, 3], [3, 4]]
    shown = [row["samples.captions"] for row in _history(second) if "samples.captions" in row]
    assert shown == [[f"{PROMPT}\nclip 0.25"]]
    configs = [record.run for record in first if record.HasField("run")]
    assert configs[0].project == "pictures"
    assert list(configs[0].tags) == ["mine"]
    known = {item.key: json.loads(item.value_json) for item in configs[0].config.update}
    assert known["lora"] == {"rank": 7, "alpha": None}
    artifacts = [
        r.request.log_artifact.artifact for r in first if r.request.HasField("log_artifact")
    ]
    artifacts += [record.artifact for record in first if record.HasField("artifact")]
    assert [entry.path for entry in artifacts[0].manifest.contents] == [told.adapter.name]


@needs("trackio")
def test_trackio_reads_its_database(told, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(told.place / "trackio"))
    import trackio
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(utils, "TRACKIO_DIR", told.place / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", told.place / "trackio")
    runs = list(trackio.Api().runs("pictures"))
    assert len(runs) == 1
    assert runs[0].name.startswith("first-")
    assert runs[0].config["lora.rank"] == 7
    rows = SQLiteStorage.get_logs("pictures", runs[0].name)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 3, 4]
    shown = [row["samples/00"] for row in rows if "samples/00" in row]
    assert shown[-1]["caption"] == f"{PROMPT}\nclip 0.25"
    stored = [file.read_bytes() for file in (told.place / "trackio").rglob("*") if file.is_file()]
    assert told.adapter.read_bytes() in stored


@needs("mlflow")
def test_mlflow_reads_its_store(told, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{told.place / 'mlruns'}")
    experiment = client.get_experiment_by_name("pictures")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == "7"
    assert run.data.tags["tag.mine"] == "true"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 3, 4]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "adapter")] == [
        f"adapter/{told.adapter.name}"
    ]
    captions = client.download_artifacts(run.info.run_id, "samples/step-000004.json")
    assert json.loads(Path(captions).read_text()) == {"00": f"{PROMPT}\nclip 0.25"}
    assert any(a.path.endswith(".png") for a in client.list_artifacts(run.info.run_id, "images"))


def test_the_environment_names_what_the_options_do_not(tmp_path, monkeypatch) -> None:
    names = [name for name in ("wandb", "trackio", "mlflow") if name in INSTALLED]
    if not names:
        pytest.skip("no tracker with variables for its names is installed")
    offline(tmp_path, monkeypatch)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "theirs")
    for name in ("WANDB_NAME", "MLFLOW_RUN_NAME"):
        monkeypatch.setenv(name, "named")
    monkeypatch.setenv("WANDB_TAGS", "one,two")
    monkeypatch.setenv("MLFLOW_TAGS", '{"one": "two"}')
    job = job_of(tmp_path / "run", project=None, tags=())
    (tmp_path / "adapter").write_bytes(b"weights")
    assert tell(job, names, range(1, 2), tmp_path / "adapter") == []
    if "wandb" in names:
        (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        (run,) = [record.run for record in _records(file) if record.HasField("run")]
        assert (run.project, run.display_name, list(run.tags)) == (
            "theirs",
            "named",
            ["one", "two"],
        )
    if "trackio" in names:
        assert [file.stem for file in (tmp_path / "trackio").glob("*.db")] == ["theirs"]
    if "mlflow" in names:
        from mlflow import MlflowClient

        client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
        experiment = client.get_experiment_by_name("theirs")
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.run_name, run.data.tags["one"]) == ("named", "two")


@needs("swanlab")
def test_swanlab_keeps_its_files(told) -> None:
    """It has no reader of its own files but its server, so the bytes are looked at."""
    files = sorted((told.place / "swanlog").glob("run-*/*.swanlab"))
    assert len(files) == 2
    assert b"rewards/clip/mean" in files[0].read_bytes()
    assert len(list((told.place / "swanlog").glob("run-*/media/image/*.png"))) == 2


@needs("mlflow")
def test_a_server_that_never_answers_does_not_keep_the_run(tmp_path, monkeypatch) -> None:
    offline(tmp_path, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://me:{SECRET}@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        said: list[str] = []
        followers = Followers(["mlflow"], said.append, limit=0.5)
        followers.start(job_of(tmp_path / "run"))
        process = followers._running["mlflow"]
        try:
            before = time.monotonic()
            for step in range(200):
                followers.scalars(step, {"loss": 1.0})
            followers.end("finished")
            waited = time.monotonic() - before
        finally:
            process.kill()
            process.wait()
    assert waited < 5.0
    assert len(said) == 1
    assert "goes on by itself" in said[0]
    assert SECRET not in said[0]


@needs("wandb")
def test_a_tracker_without_a_key_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch) -> None:
    offline(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    said: list[str] = []
    followers = Followers(["wandb"], said.append, limit=PATIENT)
    followers.start(job_of(tmp_path / "run"))
    followers.scalars(1, {"loss": 1.0})
    followers._running["wandb"].wait(PATIENT)
    for step in range(2, 4):
        followers._looked = 0.0  # as if a second had passed
        followers.scalars(step, {"loss": 1.0})
    followers.end("finished")
    assert len(said) == 1
    assert "key" in said[0].lower()


@needs("tensorboard")
def test_a_killed_tracker_is_told_once_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    offline(tmp_path, monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    followers = Followers(["tensorboard"], said.append, limit=PATIENT)
    followers.start(job_of(tmp_path / "run"))
    assert list(tmp_path.glob("alignprop-tracking-*"))
    os.kill(followers._running["tensorboard"].pid, signal.SIGKILL)
    followers._running["tensorboard"].wait()
    for step in range(1, 4):
        followers._looked = 0.0
        followers.scalars(step, {"loss": 1.0})
    followers.end("finished")
    assert len(said) == 1
    assert "ended with code -9" in said[0]
    assert list(tmp_path.glob("alignprop-tracking-*")) == []


def _records(file: Path) -> Iterator[Any]:
    """Yield the records of wandb's file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 2**15 - place % 2**15
        if room < 7:  # the rest of a block is padding
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def _history(records: list[Any]) -> list[dict[str, Any]]:
    """Return the rows that were logged."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.HasField("history")
    ]
