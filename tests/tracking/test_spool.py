"""What the run and the processes of its trackers share, and what trackers may not be told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alignprop_cli.commands.recorded import build, resume
from alignprop_cli.config import presets
from alignprop_cli.config.schema import dump
from alignprop_cli.config.tracking import TrackingConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.tracking import follow
from alignprop_cli.tracking.secrets import masked
from alignprop_cli.tracking.spool import Job, State, identity
from alignprop_cli.training.setup import settled
from alignprop_cli.training.trackers import Trackers


def job(folder: Path) -> Job:
    return Job("train", "n", None, None, (), {}, str(folder))


def test_a_job_and_a_state_are_read_as_they_were_written(tmp_path) -> None:
    made = Job("train", "n", "p", None, ("a", "b"), {"x": [1, None]}, str(tmp_path), "s", 3)
    made.write(tmp_path)
    assert Job.read(tmp_path) == made
    state = State("abc", 4, 5, 1, "http://x", "why", True)
    state.write(tmp_path / "s.json")
    assert State.read(tmp_path / "s.json") == state


@pytest.mark.parametrize("text", ["", "[]", "{", '{"nonce": 1}', '{"nonce": "a", "step": "x"}'])
def test_a_state_that_is_none_is_a_new_one(tmp_path, text) -> None:
    (tmp_path / "s.json").write_text(text)
    state = State.read(tmp_path / "s.json")
    assert (state.step, state.done) == (0, False)
    assert len(state.nonce) == 32


def test_a_pipe_in_a_run_folder_of_somebody_else_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "s.json")
    assert State.read(tmp_path / "s.json").step == 0
    # A number that is none of ours either.
    text = '{"nonce": "a", "step": 1e999, "taken": 0, "lost": 0, "done": true}'
    (tmp_path / "t.json").write_text(text)
    assert State.read(tmp_path / "t.json").done is False


def test_the_id_is_of_the_folder_and_the_nonce(tmp_path) -> None:
    """A folder that somebody else has made cannot name the run of another folder."""
    ours = identity(job(tmp_path / "ours"), "nonce")
    assert ours == identity(job(tmp_path / "x" / ".." / "ours"), "nonce")
    assert ours != identity(job(tmp_path / "foreign"), "nonce")
    assert ours != identity(job(tmp_path / "ours"), "other")


def test_a_run_waits_for_all_its_trackers_together_at_most_five_seconds() -> None:
    assert follow.LIMIT <= 5.0
    assert follow.Followers([], print)._limit == follow.LIMIT


def test_secrets_are_masked() -> None:
    environment = {"WANDB_API_KEY": "abcdef123", "HOME": "/home/me", "X_TOKEN": "abcdef123456"}
    text = "401 for abcdef123456 or abcdef123 in /home/me at http://me:pw@host:1/x"
    assert masked(text, environment) == "401 for *** or *** in /home/me at http://***@host:1/x"


def test_only_finite_numbers_are_told() -> None:
    values = {"a": {"b": 1, "c": float("inf")}, "d": "text", "e": None, "f": 0.5, "g": True}
    assert follow._flat(values) == [("a/b", 1.0), ("f", 0.5), ("g", 1.0)]


def test_a_missing_package_is_named_with_the_line_to_type(monkeypatch) -> None:
    monkeypatch.setattr(follow.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError) as caught:
        follow.check(TrackingConfig(log_with=("wandb",)))
    assert caught.value.message == "tracking.log_with: wandb is not installed"
    assert caught.value.hint == "pip install 'alignprop[wandb]'"
    follow.check(TrackingConfig())


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'tensorboard', 'wandb', .* got 'wandbx'"):
        presets.resolve(preset="tiny", flags={"tracking.log_with": ["wandbx"]})


def test_trackers_are_not_stored_with_a_run() -> None:
    given = {"tracking.log_with": ["wandb"], "tracking.project": "p"}
    config = presets.resolve(preset="tiny", flags=given)
    assert config.tracking.log_with == ("wandb",)
    assert settled(config).tracking == TrackingConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [("log_with", ("wandb",)), ("project", "theirs/x"), ("run_name", "x"), ("tags", ("x",))],
)
def test_a_foreign_configuration_sends_nothing_to_trackers(tmp_path, key, value) -> None:
    """Neither on evaluation nor on resuming, unless the same is typed."""
    config = presets.resolve(preset="tiny")
    tracking = config.tracking.model_copy(update={key: value})
    text = dump(config.model_copy(update={"tracking": tracking}))
    (tmp_path / "config.yaml").write_text(text)
    for read in (lambda **given: build(run=tmp_path, **given), lambda **g: resume(tmp_path, **g)):
        with pytest.raises(ConfigError, match=f"tracking.{key}"):
            read()
        # As the command line gives it: a list, and not the tuple that it becomes.
        typed = list(value) if isinstance(value, tuple) else value
        assert getattr(read(flags={f"tracking.{key}": typed}).tracking, key) == value
    header = {"tracking": {key: value if isinstance(value, str) else list(value)}}
    with pytest.raises(ConfigError, match=f"tracking.{key}"):
        build(header=json.loads(json.dumps(header)))


def test_the_command_to_resume_names_the_trackers() -> None:
    assert Trackers(TrackingConfig()).words == ""
    settings = TrackingConfig(log_with=("wandb", "mlflow"), project="a b", tags=("x",))
    words = Trackers(settings).words
    assert words.startswith(" --log-with wandb,mlflow --set 'tracking.project=a b' --set ")
