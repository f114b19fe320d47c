"""The guard in whole runs: a model made to hack its reward, with the guard and without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_cli.cli import main
from alignprop_cli.config.validation import parse
from alignprop_cli.evaluation.measures import Quantity
from alignprop_cli.lora.files import BEST, LORA_FILE
from alignprop_cli.training import checkpoint
from alignprop_cli.training.guard import Guard

STEPS = 7
HACK = (
    *("--preset=tiny", "--reward=redness", f"--steps={STEPS}", "--quiet"),
    *("--set=sample.num_inference_steps=3", "--set=gradient.method=last_k"),
    *("--set=train.batch_size=4", "--set=train.micro_batch=4", "--set=train.lr_decay_steps=null"),
    *("--set=train.learning_rate=4.0e-3", "--set=output.save_every=0", "--set=output.keep_last=1"),
    # Ten prompts, measured after every step: the model is gone after six. One alarm is enough.
    *("--set=eval.every=1", "--set=eval.images=20", "--set=eval.sample_images=20"),
    *("--set=guard.patience=1", "--set=guard.watch=[held_out,pixel_diversity]"),
)


def train(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *args])
    return int(ended.value.code or 0)


@dataclass(frozen=True)
class Ended:
    """A run: its folder, its summary and its metrics."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "checkpoints" / name / LORA_FILE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that the guard stops."""
    folder = tmp_path_factory.mktemp("guard") / "stopped"
    assert train(*HACK, f"--output={folder}") == 0
    return Ended(folder)


@pytest.fixture(scope="module")
def collapsed(stopped: Ended) -> Ended:
    """The same run, going on without the guard."""
    folder = stopped.folder.with_name("collapsed")
    shutil.copytree(stopped.folder, folder)
    off = ("--set=guard.enabled=false", f"--set=eval.every={STEPS}", "--set=eval.images=12")
    assert train(f"--resume={folder}", *off, "--quiet") == 0
    return Ended(folder)


def changes(line: dict[str, Any], name: str) -> dict[str, float]:
    return line["guard"]["changes"][name]


@pytest.mark.long
def test_a_run_made_to_hack_is_stopped_in_time_and_without_the_guard_it_collapses(
    stopped: Ended, collapsed: Ended
) -> None:
    # 1. Stopped, in words, at the first alarm, while most of the diversity was left.
    said = stopped.summary["guard"]
    last = stopped.lines[-1]
    assert said["stopped"]
    assert last["step"] == stopped.summary["steps"] < STEPS
    assert f"stopped at step {last['step']}" in said["told"]
    assert said["told"].startswith("redness rose from")
    assert "held-out clip_choice fell from" in said["told"]
    assert [bool(line["guard"]["alarms"]) for line in stopped.lines] == [
        *[False] * (last["step"] - 1),
        True,
    ]
    base = changes(last, "pixel_diversity")["base"]
    assert last["held_out"]["pixel_diversity"] > base / 2
    # 2. What is kept is no worse than the base model by the held-out rewards, where it was chosen
    #    and, as far as 20 images tell, on other noise.
    best = stopped.lines[said["best_step"] - 1]
    assert best["guard"]["merit"] > 0.0
    for name in ("clip_choice", "all right"):
        assert changes(best, name)["now"] >= changes(best, name)["base"]
    held_out = stopped.summary["held_out"]
    assert held_out["rewards"]["clip_choice"]["high"] >= 0.0
    assert held_out["checker"]["all"]["high"] >= 0.0
    # 3. Without the guard the reward goes on rising, and nothing is left of the rest.
    assert not collapsed.summary["guard"]["stopped"]
    assert collapsed.summary["steps"] == STEPS
    end = collapsed.lines[-1]
    assert end["held_out"]["redness"] > last["held_out"]["redness"]
    assert changes(end, "all right")["now"] < changes(end, "all right")["base"] / 4
    assert changes(end, "pixel_diversity")["now"] < changes(end, "pixel_diversity")["base"] / 2


@pytest.mark.long
def test_the_best_checkpoint_is_whole_survives_keep_last_and_has_a_name(
    stopped: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = stopped.folder / "checkpoints" / BEST
    step = stopped.summary["guard"]["best_step"]
    assert checkpoint.damage(best) is None
    assert checkpoint.load(best).step == step
    last = f"step-{stopped.summary['steps']:06d}"
    assert sorted(p.name for p in best.parent.iterdir()) == [BEST, last]
    assert stopped.summary["adapter"] == str((best / LORA_FILE).resolve())
    assert f"--checkpoint {BEST}" in stopped.summary["next"]
    assert "Stopped by the guard" in (stopped.folder / "report.html").read_text()
    # By its name, with the base model in the first two of the three calls, and in all of them.
    common = ("--images=2", "--checkpoint=best", f"--output={tmp_path / 'e'}", "--json", "--quiet")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(stopped.folder), "--base-until=0,0.6,1", *common])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert {v["base_until"] for v in found["adapters"].values()} == {0.0, 0.6, 1.0}
    assert all(v["file"] == str((best / LORA_FILE).resolve()) for v in found["adapters"].values())
    # Exactly the base model where the LoRA is never on.
    assert found["rewards"]["redness"]["base until 1"]["ties"] == 1.0
    assert found["rewards"]["redness"]["base until 0"]["ties"] == 0.0
    assert (tmp_path / "e" / "curve.png").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_a_resumed_run_remembers_and_one_that_goes_back_repeats_itself(
    stopped: Ended, tmp_path: Path
) -> None:
    # 1. It goes on from where it was stopped, and the next measurement is one too many.
    again = Ended(tmp_path / "again")
    shutil.copytree(stopped.folder, again.folder)
    assert train(f"--resume={again.folder}", "--quiet") == 0
    steps = stopped.summary["steps"]
    assert again.summary["guard"]["stopped"]
    assert again.summary["steps"] == steps + 1
    assert again.summary["guard"]["best_step"] == stopped.summary["guard"]["best_step"]
    # 2. From the best one on, it does the same once more, bit for bit.
    back = Ended(tmp_path / "again")
    assert train(f"--resume={back.folder}", f"--checkpoint={BEST}", "--quiet") == 0
    ours, theirs = (run.weights(f"step-{steps:06d}") for run in (back, stopped))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = ("held_out", "guard")
    assert [[line[k] for k in kept] for line in back.lines] == [
        [line[k] for k in kept] for line in stopped.lines
    ]


def benchmark(folder: Path, *args: str) -> str:
    """Run tests/benchmarks/guard.py, and return the table that it prints."""
    script = Path(__file__).parents[1] / "benchmarks" / "guard.py"
    command = [sys.executable, str(script), f"--output={folder}", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_ten_honest_runs_are_not_stopped(tmp_path: Path) -> None:
    said = benchmark(tmp_path, "--steps=12", "--batch-size=4", "--every=3", "--images=24")
    assert len([line for line in said.splitlines() if line.startswith("| tiny")]) == 10
    assert said.endswith("0 stopped\n")


@pytest.mark.slow
def test_the_shipped_presets_in_full_are_not_stopped(tmp_path: Path) -> None:
    # Some twenty minutes. The first three runs are one of each preset.
    said = benchmark(tmp_path, "--last=3")
    assert [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| tiny")] == [
        "| tiny",
        "| tiny_count",
        "| tiny_compressibility",
    ]
    assert said.endswith("0 stopped\n")


def line(step: int, merit: float, *alarms: str) -> str:
    guard = {"alarms": alarms, "merit": merit, "changes": {}}
    return json.dumps({"step": step, "held_out": {"clip": merit}, "guard": guard}) + "\n"


@pytest.mark.parametrize("measures", [True, False])
def test_weights_of_a_step_that_a_resumed_run_has_not_reached_are_not_called_the_best(
    tmp_path: Path, measures: bool
) -> None:
    # Killed after step 8 was kept as best, and resumed from 6: what it measured later is gone.
    (tmp_path / "metrics.jsonl").write_text(line(3, 0.2) + line(6, 0.1, "clip"))
    state, said = checkpoint.State(8, 8, {"p.step": torch.zeros(())}), list[str]()
    checkpoint.save(
        tmp_path, state, lambda made: save_file({"p": torch.ones(1)}, made / LORA_FILE), name=BEST
    )
    base = {"clip": Quantity(np.zeros(8), 1.0)} if measures else {}
    run = SimpleNamespace(
        config=parse({"reward": {"clip": {}}}),
        folder=tmp_path,
        accelerator=SimpleNamespace(is_main_process=True),
        console=SimpleNamespace(note=said.append),
        trainer=SimpleNamespace(step_number=6, mixture=SimpleNamespace(names=("clip",))),
    )
    guard = Guard(cast("Any", SimpleNamespace(base=base)))
    guard.before_training(cast("Any", run))
    assert guard.verdict().best is None
    assert not (tmp_path / "checkpoints" / BEST).exists()
    assert "the weights of step 3, the best so far, are gone" in said[0]


def test_what_was_measured_before_is_judged_by_what_counts_now(tmp_path: Path) -> None:
    # By `clip` the first was the better one; `guard.best` may change when a run is resumed.
    said = [
        {"alarms": [], "merit": 2.0, "by": ["clip"], "changes": {}},
        {"alarms": [], "merit": 0.5, "by": ["clip"], "changes": {}},
    ]
    held_out = [{"clip": 2.0, "saturation": 0.1}, {"clip": 0.5, "saturation": 0.9}]
    lines = [
        {"step": step, "held_out": seen, "guard": guard}
        for step, seen, guard in zip((3, 6), held_out, said, strict=True)
    ]
    # Lines that somebody has changed are no crash.
    damaged = [{"step": 7, "guard": 3}, {"step": 8, "held_out": {"clip": []}, "guard": said[0]}]
    text = "".join(json.dumps(each) + "\n" for each in (*lines, *damaged))
    (tmp_path / "metrics.jsonl").write_text(text)
    state, notes = checkpoint.State(6, 6, {"p.step": torch.zeros(())}), list[str]()
    checkpoint.save(
        tmp_path, state, lambda made: save_file({"p": torch.ones(1)}, made / LORA_FILE), name=BEST
    )
    run = SimpleNamespace(
        config=parse({"reward": {"clip": {}}, "guard": {"best": "saturation"}}),
        folder=tmp_path,
        accelerator=SimpleNamespace(is_main_process=True),
        console=SimpleNamespace(note=notes.append),
        trainer=SimpleNamespace(
            step_number=6, mixture=SimpleNamespace(members=(), names=("clip",))
        ),
    )
    base = {name: Quantity(np.zeros(8), 1.0) for name in ("clip", "saturation")}
    guard = Guard(cast("Any", SimpleNamespace(base=base)))
    guard.before_training(cast("Any", run))
    assert guard.verdict().best == 6
    assert (tmp_path / "checkpoints" / BEST).is_dir()
    assert not [note for note in notes if "gone" in note]


def resumed(folder: Path, lines: list[dict[str, Any]], step: int, **sections: Any) -> Any:
    """Return a run at a step, as the guard sees it, with these lines of metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return SimpleNamespace(
        config=parse({"reward": {"redness": {}}, "eval": {"rewards": {"clip": {}}}, **sections}),
        folder=folder,
        accelerator=SimpleNamespace(is_main_process=True),
        console=SimpleNamespace(note=lambda text: None),
        trainer=SimpleNamespace(
            step_number=step, mixture=SimpleNamespace(members=(), names=("redness",))
        ),
    )


@pytest.mark.parametrize(
    ("steps", "enabled", "goes_on", "summary", "stops"),
    [
        (6, True, False, None, True),
        (6, True, True, None, True),
        (6, False, False, None, False),
        # It was not the last step, and the run would have ended there all the same.
        (9, True, False, None, True),
        (9, True, False, 2, True),
        (9, False, False, None, False),
        # It did end there, or that checkpoint was named: now it is to go on.
        (9, True, False, 6, False),
        (9, True, True, None, False),
    ],
)
def test_a_run_killed_after_the_guards_verdict_ends_as_that_had_said(
    tmp_path: Path, steps: int, enabled: bool, goes_on: bool, summary: int | None, stops: bool
) -> None:
    """Its last two measurements alarmed; then it was killed before its summary was written."""
    measured = [(2, 0.3, []), (4, 0.1, ["clip"]), (6, -0.2, ["clip"])]
    lines = [
        {
            "step": step,
            "held_out": {"clip": merit, "redness": 0.9},
            "guard": {"alarms": alarms, "merit": merit, "changes": {}},
        }
        for step, merit, alarms in measured
    ]
    state = checkpoint.State(2, 2, {"p.step": torch.zeros(())})
    checkpoint.save(
        tmp_path, state, lambda made: save_file({"p": torch.ones(1)}, made / LORA_FILE), name=BEST
    )
    sections = {"train": {"steps": steps}, "guard": {"enabled": enabled}}
    run = resumed(tmp_path, lines, 6, **sections)
    base = {name: Quantity(np.full(8, 0.5), 1.0) for name in ("clip", "redness")}
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps({"steps": summary}))
    guard = Guard(cast("Any", SimpleNamespace(base=base)), goes_on=goes_on)
    guard.before_training(cast("Any", run))
    verdict = guard.verdict()
    assert (verdict.stopped, verdict.best) == (stops, 2)
    assert guard.should_stop() == stops
    why = "redness rose from 0.5 to 0.9 while held-out clip fell from 0.5 to -0.2"
    assert verdict.why == why


def test_a_run_resumed_after_its_last_measurement_tells_of_that_at_its_end(tmp_path: Path) -> None:
    # Measured at 6, killed after 7, its last step: it would have ended with the words of step 6.
    said = {"alarms": ["clip"], "merit": -0.2, "changes": {}}
    lines = [{"step": 6, "held_out": {"clip": -0.2, "redness": 0.9}, "guard": said}]
    lines.append({"step": 7})
    run = resumed(tmp_path, lines, 7)
    base = {name: Quantity(np.full(8, 0.5), 1.0) for name in ("clip", "redness")}
    guard = Guard(cast("Any", SimpleNamespace(base=base)))
    guard.before_training(cast("Any", run))
    verdict = guard.verdict()
    assert (verdict.stopped, verdict.best) == (False, None)
    assert verdict.why == "redness rose from 0.5 to 0.9 while held-out clip fell from 0.5 to -0.2"
