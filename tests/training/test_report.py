"""What a run's report holds, and that no run suffers from it. In a browser: test_report_page.py."""

from __future__ import annotations

import json
import re
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignprop_cli.config import presets
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError
from alignprop_cli.training import curves, frames, provenance, report
from alignprop_cli.training.resume import read_metrics
from tests.training.reported import Reported, images

PROMPTS = ["a cat", "a dog"]


class Content(HTMLParser):
    """The data of a page, and the addresses that it names."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.data, self.addresses, self._inside = "", list[str](), False
        self.texts = list[str]()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._inside = tag == "script" and values.get("id") == "data"
        self.addresses += [values[n] or "" for n in ("src", "href") if n in values]

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data
        elif data.strip():
            self.texts.append(data)

    @property
    def steps(self) -> list[int]:
        """The steps of the slider."""
        return [frame["step"] for frame in json.loads(self.data)["images"]["steps"]]

    def line(self, title: str, name: str) -> tuple[list[float], list[float]]:
        """Return the values of one line of a plot."""
        plot = next(p for p in json.loads(self.data)["plots"] if p["title"] == title)
        line = next(each for each in plot["lines"] if each["name"] == name)
        return line["x"], line["y"]


def test_the_page_is_there_before_the_first_step_and_new_after_every_evaluation(
    tmp_path: Path,
) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.begin()
    assert Content(run.file).steps == [0]
    first = run.file.stat().st_mtime_ns
    run.step(sampled=False)
    assert run.file.stat().st_mtime_ns == first
    run.step(sampled=True)
    assert Content(run.file).steps == [0, 2]
    assert "Step 2 of 6" in run.file.read_text()
    # Its curves are what metrics.jsonl says.
    lines = read_metrics(run.folder)
    measured = [line["held_out"]["brightness"] for line in lines if "held_out" in line]
    base = run.samples.base["brightness"].mean
    assert Content(run.file).line("brightness, held out", "fixed samples") == (
        [0, 2],
        [base, *measured],
    )
    assert Content(run.file).line("loss", "each step") == ([1, 2], [line["loss"] for line in lines])


def test_a_resumed_run_goes_on_with_the_same_curves_and_images(tmp_path: Path) -> None:
    whole, parts = (Reported(tmp_path / name, PROMPTS) for name in ("whole", "parts"))
    whole.begin()
    parts.begin()
    for step in range(1, 7):
        whole.step(sampled=step % 2 == 0)
    for step in range(1, 5):
        parts.step(sampled=step % 2 == 0)
    # Another process, which knows the folder alone.
    again = Reported(parts.folder, PROMPTS)
    again.begin()
    assert Content(again.file).steps == [0, 2, 4]
    again.step(sampled=False)
    again.step(sampled=True)
    assert json.loads(Content(again.file).data) == json.loads(Content(whole.file).data)


def test_images_of_steps_that_a_resumed_run_has_not_reached_are_not_shown(tmp_path: Path) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.begin()
    for _ in range(4):
        run.step(sampled=True)
    # Resumed from step 2: the lines after it are cut. Were the images not, they are not shown.
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n" for line in metrics.read_text().splitlines()[:2]))
    again = Reported(run.folder, PROMPTS)
    again.begin()
    assert Content(again.file).steps == [0, 1, 2]
    # With other prompts the old images are of something else.
    other = Reported(run.folder, ["a bird", "a horse"])
    other.begin()
    assert Content(other.file).steps == [0]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b'{"step": 2}',
        # An address that would be fetched.
        json.dumps(
            {
                "step": 2,
                "prompts": PROMPTS,
                "images": ["https://example.org/a.png"] * 2,
                "size": [8, 8],
                "rewards": {},
            }
        ).encode(),
    ],
)
def test_images_that_were_damaged_or_come_from_elsewhere_are_left_out(
    tmp_path: Path, damage: bytes
) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.begin()
    run.step(sampled=True)
    run.step(sampled=True)
    (run.folder / "samples" / "step-000002.json").write_bytes(damage)
    again = Reported(run.folder, PROMPTS)
    again.begin()
    assert Content(again.file).steps == [0, 1]


def test_large_images_are_shown_of_fewer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Reported(tmp_path / "run", PROMPTS, steps=9)
    run.begin()
    for _ in range(8):
        run.step(sampled=True)
    largest = max(p.stat().st_size for p in (run.folder / "samples").iterdir())
    monkeypatch.setattr(frames, "_MOST_TOGETHER", 3 * largest)
    run.step(sampled=True)
    # Three of nine: the first, the middle one and the last, after the base model.
    assert Content(run.file).steps == [0, 1, 5, 9]


def test_without_samples_the_page_is_written_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.without_samples()
    run.begin()
    assert json.loads(Content(run.file).data) == {"plots": []}
    run.step(sampled=False)
    assert json.loads(Content(run.file).data) == {"plots": []}
    monkeypatch.setattr(report, "_PAUSE", 0.0)
    run.step(sampled=False)
    assert Content(run.file).line("loss", "each step")[0] == [1, 2]


def test_a_report_that_cannot_be_written_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.file.mkdir()  # a folder in its place
    run.begin()
    run.step(sampled=True)
    run.finish()
    said = capsys.readouterr().err
    assert said.count("report.html cannot be written; the run goes on") == 1
    # What is in its way is gone: the next page is written.
    run.file.rmdir()
    run.step(sampled=True)
    assert Content(run.file).steps == [0, 1, 2]


def test_a_run_that_was_moved_away_leaves_no_page_behind(tmp_path: Path) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.begin()
    run.folder.rename(tmp_path / "elsewhere")
    run.report.after_training()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.run.accelerator.is_main_process = False
    run.begin()
    run.step(sampled=True)
    run.report.after_training()
    assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]


def test_the_page_fetches_nothing_and_has_plotly_once(tmp_path: Path) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.begin()
    run.step(sampled=True)
    run.finish()
    addresses = Content(run.file).addresses
    assert len(addresses) > 4
    assert all(re.match(r"data:(image/(png|jpeg);base64,|,$)|#[\w-]+$", a) for a in addresses)
    assert run.file.read_text().count("plotly.js v") == 1


def test_what_a_skipped_step_and_a_step_of_nan_lack_is_a_gap(tmp_path: Path) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.begin()
    run.step(sampled=False, skipped="a reward is not finite")
    run.step(sampled=False, grad_norm=float("nan"))
    run.step(sampled=True)
    found = Content(run.file)
    assert found.line("loss", "each step")[0] == [2, 3]
    assert found.line("gradient norm, before clipping", "each step")[1] == [None, 0.5 / 3]


def test_a_refresh_of_a_long_run_takes_less_than_a_second(tmp_path: Path) -> None:
    run = Reported(tmp_path / "run", [f"prompt {i}" for i in range(16)], steps=400, px=256)
    run.begin()
    for step in range(1, 400):
        sampled = step % 10 == 0
        run.step(sampled=False, held_out={"clip": 0.1} if sampled else {})
        if sampled:
            frame = frames.make(step, run.run.sampled)
            frames.write(run.folder / "samples", frame)
    seconds: list[float] = []
    # Of this process alone: other tests may run beside it.
    for _ in range(3):
        run.run.sampled, run.samples.now = images(1, run.prompts, 256), run.samples.base
        started = time.process_time()
        run.report._write("running", run.report._keep_samples)
        seconds.append(time.process_time() - started)
    shown = Content(run.file).steps
    assert shown[0] == 0
    assert shown[-1] == 390
    assert len(shown) == 33
    assert len(Content(run.file).line("loss", "smoothed")[0]) <= 1000
    assert min(seconds) < 1.0


def test_the_nearest_preset_is_the_one_that_was_changed_and_the_changes_are_told() -> None:
    config = presets.resolve(
        preset="tiny_count", assignments=["train.steps=3", "lora.rank=2", "output.dir=x"]
    )
    name, rows = provenance.nearest_preset(config)
    assert name == "tiny_count"
    assert {row[0]: row[2] for row in rows} == {"train.steps": "3", "lora.rank": "2"}


def test_the_page_says_what_is_planned_where_it_runs_and_what_to_type(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    run = Reported(folder, PROMPTS)
    run.begin()
    run.step(sampled=True)

    def follows(text: str) -> str:
        # The last one: what is a heading may be a link above too.
        texts = Content(run.file).texts
        return texts[len(texts) - texts[::-1].index(text)]

    # Plan and environment, each a row of a table.
    assert follows("step") == "8 images a step = 1 micro-batch of 8"
    assert follows("rewards") == "clip x 1"
    assert follows("torch") == torch.__version__.partition("+")[0]
    assert follows("device") == "cpu"
    preset, rows = provenance.nearest_preset(run.run.config)
    assert f"What differs from the preset {preset}" in Content(run.file).texts
    assert follows("train.steps") in {row[1] for row in rows if row[0] == "train.steps"}
    assert follows("Warnings") == "None since the run was started or resumed."
    # Commands, whose words a shell takes apart as they are meant.
    quoted = f"'{folder}'"
    assert follows("Reproduce it") == (
        f"alignprop train --config '{folder}/config.yaml' --output '{folder}-again'"
    )
    assert follows("Resume it") == f"alignprop train --resume {quoted}"
    assert follows("Evaluate it") == f"alignprop evaluate {quoted}"
    assert follows("Mix it with the base model") == (
        f"alignprop soup {quoted} base --coef 0.7 --output '{folder}-soup'"
    )
    # With all steps done there is nothing to resume, and a best step to look at.
    while run.trainer.step_number < 6:
        run.step(sampled=False)
    run.finish()
    assert follows("Train it further") == f"alignprop train --resume {quoted} --steps 12"
    best = follows("Evaluate its best checkpoint")
    assert best == f"alignprop evaluate --checkpoint best {quoted}"


@pytest.mark.parametrize(("decay_steps", "steps"), [(6, None), (12, 12)])
def test_a_run_whose_learning_rate_has_ended_goes_on_as_a_new_one(
    decay_steps: int, steps: int | None
) -> None:
    train = {"steps": 6, "lr_schedule": "linear", "lr_decay_steps": decay_steps}
    config = parse({"reward": {"brightness": {}}, "train": train})
    run: Any = SimpleNamespace(config=config, folder=Path("runs/a run"))
    rows = {row[0]: row[1] for row in provenance.commands(run, has_best=False, is_over=True)}
    typed = shlex.split(rows["Train it further"])
    if steps is not None:
        assert typed == ["alignprop", "train", "--resume", "runs/a run", "--steps", str(steps)]
        return
    # With more steps the run would be refused.
    with pytest.raises(ConfigError):
        parse({**config.model_dump(), "train": {**train, "steps": 12}})
    new = ["--set", "lora.init=runs/a run", "--output", "runs/a run-further"]
    assert typed == ["alignprop", "train", "--config", "runs/a run/config.yaml", *new]


def test_the_smoothed_curve_is_the_exponential_mean() -> None:
    lines = [{"step": i + 1, "loss": value} for i, value in enumerate([1.0, 0.0, 2.0])]
    found = curves.groups(lines, {}, trained=[], held_out=[], calls=1, best=None)
    (loss,) = (plot for _, plots in found for plot in plots)
    # 0.8 of the mean before and 0.2 of the value: 1, 0.8, 0.8 * 0.8 + 0.2 * 2.
    assert loss.lines[1].y == pytest.approx([1.0, 0.8, 1.04])
