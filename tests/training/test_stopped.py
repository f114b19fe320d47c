"""`train --resume auto` with a run that the guard has stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import dump
from alignprop_cli.errors import NothingToDo
from alignprop_cli.training.resume import refuse_stopped

TOLD = "redness rose from 0 to 1 while held-out clip fell from 1 to 0: stopped at step 4"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder as far as `--resume auto` looks at it."""
    folder = tmp_path / "a run"
    (folder / "checkpoints" / "step-000004").mkdir(parents=True)
    config = presets.resolve(preset="tiny", flags={"output.dir": str(folder)})
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    summarise(folder, stopped=True)
    return folder


def summarise(run: Path, **guard: Any) -> None:
    values = {"steps": 4, "guard": {"told": TOLD, **guard}}
    (run / "summary.json").write_text(json.dumps(values), encoding="utf-8")


def test_it_says_so_and_how_to_go_on_and_is_no_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--preset", "tiny", "--output", str(run), "--resume", "auto"]
    for more in ([], ["--steps", "20"], ["--reward", "clip"]):
        with pytest.raises(SystemExit) as ended:
            main([*line, *more])
        assert not ended.value.code
        captured = capsys.readouterr()
        assert captured.out == ""
        err = " ".join(captured.err.split())
        assert TOLD in err
        assert f"to go on with it all the same: alignprop train --resume '{run}'" in err
        assert "guard.enabled=false" in err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]


def test_other_settings_of_the_guard_go_on(run: Path) -> None:
    config = presets.resolve(run=run, source="run")
    with pytest.raises(NothingToDo, match="stopped at step 4"):
        refuse_stopped(run, config)
    for text in ("guard.enabled=false", "guard.patience=7", "guard.watch=[held_out]"):
        refuse_stopped(run, presets.resolve(run=run, assignments=[text], source="run"))


def test_a_run_that_went_on_since_or_was_not_stopped_is_resumed(run: Path) -> None:
    config = presets.resolve(run=run, source="run")
    (run / "checkpoints" / "step-000005").mkdir()
    refuse_stopped(run, config)
    (run / "checkpoints" / "step-000005").rmdir()
    summarise(run, stopped=False)
    refuse_stopped(run, config)
    for text in ("", "[1]", '{"guard": 3}', '{"guard": {"stopped": true}}', "{"):
        (run / "summary.json").write_text(text, encoding="utf-8")
        refuse_stopped(run, config)
    (run / "summary.json").unlink()
    refuse_stopped(run, config)
