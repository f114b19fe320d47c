"""`alignprop score` from the command line: rows, summary, files, exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import rich.console

from alignprop_cli.cli import main
from alignprop_cli.console import table
from alignprop_cli.evaluation.sheet import save_image
from alignprop_cli.scoring import report, rows, scorer
from alignprop_cli.scoring import run as scoring
from tests.factories import picture


def run(capsys, *args):
    """Return the exit code, standard output and standard error of `alignprop score`."""
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, args)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three grey images, the last with a prompt, and a broken one."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name, value, texts in (
        ("a.png", 51, {}),
        ("b.png", 102, {}),
        ("sub/c.png", 204, {"prompt": 'one :cat: [red]\nsecond line, "quoted"'}),
    ):
        save_image(np.full((8, 8, 3), value, dtype=np.uint8), images / name, texts)
    (images / "broken.png").write_bytes(b"no image")
    return images


def test_a_table_and_a_summary_are_printed_and_skipped_files_are_named(capsys, folder):
    code, out, err = run(capsys, folder, "--reward", "brightness,contrast")
    assert code == 0
    assert "0.2000" in out
    assert "sub/c.png" in out
    assert "3 images measured, 1 skipped" in out
    assert "broken.png" in err
    line = next(line for line in out.splitlines() if line.startswith("brightness"))
    # (0.2 + 0.4 + 0.8) / 3, the deviation of these three, the least, quantiles between neighbours
    figures = ["0.4667", "0.2494", "0.2000", "0.2200", "0.4000", "0.7600", "0.8000"]
    assert line.split()[1:8] == figures
    # Each of 20 bars is 0.03 wide: those from 0.20, 0.38 and 0.77 on have one image each.
    assert line.split("0.8000 ")[1].strip() == "█" + 5 * " " + "█" + 12 * " " + "█"


def test_json_is_one_object_and_nothing_else_on_standard_output(capsys, folder):
    code, out, _ = run(capsys, folder, "--reward", "brightness", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["schema"] == "alignprop.score/3"
    assert values["scored"] == 3
    assert [s["file"].rsplit("/", 1)[1] for s in values["skipped"]] == ["broken.png"]
    assert values["rewards"]["brightness"]["max"] == pytest.approx(0.8, abs=1e-6)
    assert [p["prompt_source"] for p in values["images"]] == ["none", "none", "image"]


def test_csv_and_jsonl_rows_are_complete(capsys, folder):
    code, out, err = run(capsys, folder, "--reward", "brightness", "--format", "csv")
    listed = list(csv.DictReader(out.splitlines(keepends=True)))
    assert code == 0
    assert list(listed[0]) == ["file", "brightness", "prompt", "prompt_source", "content"]
    assert listed[2]["prompt"] == 'one :cat: [red]\nsecond line, "quoted"'
    assert "3 images measured" in err
    _, out, _ = run(capsys, folder, "--reward", "brightness", "--format", "jsonl", "--quiet")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == [None, None, listed[2]["prompt"]]
    assert [float(row["brightness"]) for row in listed] == [line["brightness"] for line in lines]


def test_rows_go_to_a_file_that_is_not_replaced_unasked(capsys, folder, tmp_path):
    target = tmp_path / "new" / "scores.jsonl"
    code, out, _ = run(capsys, folder, "--reward", "brightness", "--output", target, "--json")
    assert code == 0
    assert "images" not in json.loads(out)
    assert len(target.read_text().splitlines()) == 3
    assert [p.name for p in target.parent.iterdir()] == ["scores.jsonl"]
    code, _, err = run(capsys, folder, "--reward", "brightness", "--output", target)
    assert code == 2
    assert "exists" in err
    code, _, _ = run(
        capsys, folder, "--reward", "contrast", "--output", target, "--overwrite", "--format", "csv"
    )
    assert code == 0
    assert target.read_text().startswith("file,contrast,")


def test_a_users_own_reward_gets_the_prompt_of_the_flag(capsys, folder, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch\n"
        "def length(images, prompts):\n"
        "    return torch.tensor([float(len(p)) for p in prompts])\n"
    )
    code, out, _ = run(
        capsys, folder, "--reward", f"{mine}:length", "--prompt", "12345", "--json", "-q"
    )
    assert code == 0
    assert json.loads(out)["rewards"][f"{mine}:length"]["mean"] == 5.0


def test_nothing_to_measure_ends_with_4(capsys, folder, tmp_path):
    code, out, err = run(capsys, folder / "broken.png", "--reward", "brightness")
    assert (code, out) == (4, "")
    assert "all 1 images were skipped" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, tmp_path / "empty", "--reward", "brightness")
    assert code == 4
    assert "no images were found" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--reward", "brightnes"], 2, "Did you mean 'brightness'"),
        (["--set", "sample.eta=1"], 2, "only reward.NAME.OPTION"),
        (["--set", "reward.contrast.weight=2"], 2, "reward.contrast.weight is about training"),
        (["--reward", "brightness", "--format", "csv", "--json"], 2, "both write"),
        (["--reward", "brightness", "--output", "scores.txt"], 2, "csv, jsonl or parquet"),
        (["--reward", "brightness", "--resume"], 2, "--resume needs a file"),
        (["--reward", "brightness", "--format", "parquet"], 2, "needs a file"),
        (["--reward", "brightness", "--prompts", "none.csv"], 3, "cannot read none.csv"),
        (["--set", "reward.clip.model=/none"], 3, "no such folder"),
        (["**.png", "--reward", "brightness"], 3, "**.png: cannot be read: ** stands for folders"),
        (["x" * 300, "--reward", "brightness"], 3, "cannot be read"),
        (["--reward", "brightness", "--format", "csv", "--top", "3"], 2, "--top is a table"),
        (["--reward", "brightness", "--output", "rows.csv/a.csv"], 2, "cannot be made"),
        (
            ["--reward", "brightness", "--output", "a.html", "--format", "csv", "--gallery"],
            2,
            "where the rows go",
        ),
    ],
)
def test_mistakes_are_explained(capsys, folder, args, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    found, out, err = run(capsys, folder, *args)
    assert (found, out) == (code, "")
    assert words in err


def test_a_missing_path_ends_with_3(capsys, tmp_path):
    code, _, err = run(capsys, tmp_path / "none", "--reward", "brightness")
    assert code == 3
    assert "no such file or folder" in err


@pytest.fixture
def many(tmp_path):
    """Return a folder of 40 images from dark to bright, the third like the first."""
    for index in range(40):
        picture(tmp_path / "many" / f"{index:02d}.png", 5 * (0 if index == 2 else index))
    return tmp_path / "many"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
@pytest.mark.long
def test_a_run_that_was_killed_and_resumed_gives_the_same_file(
    capsys, many, tmp_path, monkeypatch, name
):
    whole, cut = tmp_path / "whole" / name, tmp_path / "cut" / name
    ask = ("score", many, "--reward", "brightness,contrast", "--quiet")
    assert run(capsys, *ask[1:], "--output", whole)[0] == 0
    kill_after = (
        "import os, sys\n"
        "from alignprop_cli.scoring import scorer\n"
        "from alignprop_cli.cli import main\n"
        "measure, rest = scorer._measure, [2]\n"
        "def killed(*args):\n"
        "    rest[0] -= 1\n"
        "    if rest[0] < 0:\n"
        "        os._exit(9)\n"
        "    return measure(*args)\n"
        "scorer._measure = killed\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", kill_after, *map(str, ask), "--output", str(cut)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 9
    partial = cut.with_name(f"{name}.partial")
    assert not cut.exists()
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 33
    # Killed while it wrote: in the middle of a chunk, in the middle of a line.
    partial.write_text("".join(lines[:-3]) + lines[-3][:20])
    code, _, err = run(capsys, *ask[1:], "--output", cut)
    assert code == 2
    assert "--resume" in err
    asked = []
    monkeypatch.setattr(
        scorer, "_decode", lambda path, f=scorer._decode: asked.append(path) or f(path)
    )
    assert run(capsys, *ask[1:], "--output", cut, "--resume", "--workers", 0)[0] == 0
    assert len(asked) == 24
    assert cut.read_bytes() == whole.read_bytes()
    assert [p.name for p in cut.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_resume_adds_what_is_new_to_a_whole_file(capsys, folder, tmp_path, name):
    target = tmp_path / name
    ask = (folder, "--reward", "brightness", "--output", target, "--quiet")
    assert run(capsys, *ask)[0] == 0
    picture(folder / "new.png", 255)
    shutil.copy(folder / "a.png", folder / "same.png")
    code, out, _ = run(capsys, *ask, "--resume", "--json")
    assert code == 0
    summary = json.loads(out)
    assert (summary["scored"], summary["same_content"]) == (5, 1)
    assert summary["rewards"]["brightness"]["max"] == 1.0
    code, out, _ = run(capsys, *ask, "--resume", "--json")
    assert {**json.loads(out), "notes": []} == {**summary, "notes": []}


def test_resume_with_other_rewards_is_refused(capsys, folder, tmp_path):
    target = tmp_path / "rows.csv"
    assert run(capsys, folder, "--reward", "brightness", "--output", target)[0] == 0
    before = target.read_bytes()
    code, _, err = run(capsys, folder, "--reward", "contrast", "--output", target, "--resume")
    assert code == 2
    assert "other rewards" in err
    assert target.read_bytes() == before


def test_a_partial_file_that_is_damaged_is_told(capsys, folder, tmp_path):
    (tmp_path / "rows.csv.partial").write_text("{]\n")
    ask = (folder, "--reward", "brightness", "--output", tmp_path / "rows.csv")
    code, _, err = run(capsys, *ask, "--resume")
    assert code == 3
    assert "rows.csv.partial" in err
    assert run(capsys, *ask, "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.csv"]


def test_parquet_has_the_rows_of_csv_with_their_types(capsys, folder, tmp_path):
    for name in ("rows.parquet", "rows.csv"):
        assert run(capsys, folder, "--reward", "brightness", "--output", tmp_path / name)[0] == 0
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert table.column_names == list(rows[0])
    assert table.schema.field("brightness").type == pyarrow.float64()
    assert table["brightness"].to_pylist() == [float(row["brightness"]) for row in rows]
    assert table["prompt"].to_pylist() == [row["prompt"] or None for row in rows]


def test_the_best_are_listed_best_first(capsys, many):
    code, out, _ = run(capsys, many, "--reward", "brightness", "--top", 3, "--json")
    assert code == 0
    values = json.loads(out)
    assert [p["file"][-6:] for p in values["images"]] == ["39.png", "38.png", "37.png"]
    assert values["scored"] == 40
    assert values["same_content"] == 1
    code, out, _ = run(capsys, many, "--reward", "brightness", "--top", 2)
    listed = [line.split()[0] for line in out.splitlines() if ".png" in line]
    assert listed == ["39.png", "38.png"]


def test_a_narrow_terminal_shows_whole_names_of_files():
    names = [f"{'folder/' * 20}{number}.png" for number in range(2)]
    listed = table("Images", ("file", "brightness"), [(name, "0.1234") for name in names])
    shown = io.StringIO()
    rich.console.Console(file=shown, width=40).print(listed)
    # Cut, both would be the same.
    assert "".join(shown.getvalue().replace("0.1234", "").split()).endswith("".join(names))


def test_a_long_list_is_left_out_and_said_to_be(capsys, many, monkeypatch):
    for module in (scoring, report):
        monkeypatch.setattr(module, "LISTED", 39)
    code, out, _ = run(capsys, many, "--reward", "brightness")
    assert code == 0
    assert ".png" not in out
    assert "give --top N" in out


def test_strict_fails_after_everything_else_was_measured(capsys, folder, tmp_path):
    target = tmp_path / "rows.csv"
    ask = (folder, "--reward", "brightness", "--output", target, "--strict")
    code, out, err = run(capsys, *ask)
    assert code == 4
    assert "1 of 4 images were skipped" in err
    assert "3 images measured" in out
    assert len(target.read_text().splitlines()) > 3
    (folder / "broken.png").unlink()
    assert run(capsys, *ask, "--overwrite")[0] == 0


def test_names_come_from_standard_input(capsys, folder, monkeypatch):
    names = f"{folder / 'a.png'}\n\n{folder / 'sub'}\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(names)))
    code, out, _ = run(capsys, "-", folder / "b.png", "--reward", "brightness", "--json")
    assert code == 0
    assert [p["file"].rsplit("/", 1)[1] for p in json.loads(out)["images"]] == [
        "a.png",
        "c.png",
        "b.png",
    ]


def test_a_gallery_is_not_replaced_unasked(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, folder, "--reward", "brightness", "--gallery")[0] == 0
    first = (tmp_path / "gallery.html").read_text()
    assert "sub/c.png" in first
    code, _, err = run(capsys, folder, "--reward", "brightness", "--gallery")
    assert code == 2
    assert "gallery.html exists" in err
    code, out, _ = run(
        capsys, folder, "--reward", "brightness", "--gallery", "--output", "new/rows.csv", "--json"
    )
    assert code == 0
    assert json.loads(out)["gallery"] == str(tmp_path / "new" / "rows.html")
    assert (tmp_path / "gallery.html").read_text() == first


def test_what_was_kept_is_on_the_disk_before_anything_is_measured(tmp_path):
    target = tmp_path / "a.csv"
    kept = [{"file": "a.png", "x": 1.0, "prompt": None, "prompt_source": "none", "content": "c"}]
    asked = {"rewards": {}, "prompt": None, "prompts": None}
    with rows.to_file(target, "csv", ("x",), asked, kept):
        found = rows.resume(target, "csv", ("x",), asked)
        assert (found.rows, found.whole) == (kept, False)
    found = rows.resume(target, "csv", ("x",), asked)
    assert (found.rows, found.whole) == (kept, True)


def test_resume_with_another_prompt_is_refused_on_a_whole_file_too(capsys, folder, tmp_path):
    target = tmp_path / "rows.csv"
    ask = (folder, "--reward", "brightness", "--output", target)
    assert run(capsys, *ask, "--prompt", "cat")[0] == 0
    for other in (("--prompt", "dog"), ()):
        code, _, err = run(capsys, *ask, "--resume", *other)
        assert code == 2
        assert "other rewards, options or prompts" in err
    assert run(capsys, *ask, "--resume", "--prompt", "cat")[0] == 0


def test_resume_with_other_prompts_in_a_table_is_refused_on_a_whole_file_too(
    capsys, folder, tmp_path
):
    table, target = tmp_path / "t.csv", tmp_path / "rows.csv"
    ask = (folder, "--reward", "brightness", "--output", target)
    # 1. Rows without a table, then one that names an image.
    assert run(capsys, *ask)[0] == 0
    table.write_text("file_name,text\na.png,cat\n")
    given = (*ask, "--prompts", table)
    code, _, err = run(capsys, *given, "--resume")
    assert (code, "other rewards, options or prompts" in err) == (2, True)
    # 2. Rows with the table, without it, and after it was changed.
    assert run(capsys, *given, "--overwrite")[0] == 0
    assert run(capsys, *given, "--resume")[0] == 0
    assert run(capsys, *ask, "--resume")[0] == 2
    table.write_text("file_name,text\na.png,dog\n")
    assert run(capsys, *given, "--resume")[0] == 2


def test_a_table_that_names_no_image_is_told(capsys, folder, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("file_name,text\nelsewhere/a.png,cat\n")
    code, _, err = run(capsys, folder, "--reward", "brightness", "--prompts", table)
    assert code == 0
    assert "t.csv names none of the images" in " ".join(err.split())
    table.write_text("file_name,text\na.png,cat\n")
    assert "names none" not in run(capsys, folder, "--reward", "brightness", "--prompts", table)[2]


def test_resume_never_takes_a_foreign_file_for_its_own(capsys, folder, tmp_path):
    target = tmp_path / "notes.jsonl"
    target.write_text('{"note": "keep me"}')
    ask = (folder, "--reward", "brightness", "--output", target)
    code, _, _ = run(capsys, *ask, "--resume")
    assert code == 2
    assert target.read_text() == '{"note": "keep me"}'


def test_a_relative_and_a_whole_name_are_one_file(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    target = tmp_path / "rows.jsonl"
    assert run(capsys, ".", "--reward", "brightness", "--output", target)[0] == 0
    before = target.read_bytes()
    assert run(capsys, folder, "--reward", "brightness", "--output", target, "--resume")[0] == 0
    assert target.read_bytes() == before


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_odd_names_and_prompts_come_back_as_they_were(capsys, tmp_path, name):
    folder = tmp_path / "odd"
    picture(folder / "a.png", 10, prompt="cat\rdog")
    picture(folder / "b\n\x1b[31m.png", 20, prompt='"x", y\u2028z')
    path = os.fsencode(folder) + b"/caf\xe9.png"
    shutil.copy(folder / "a.png", path)
    (folder / "broken\x1b[31m.png").write_bytes(b"no")
    target = tmp_path / name
    ask = (folder, "--reward", "brightness", "--output", target)
    code, _, err = run(capsys, *ask)
    assert code == 0
    assert "\x1b[31m" not in err
    before = target.read_bytes()
    code, out, _ = run(capsys, *ask, "--resume", "--json")
    assert code == 0
    # Parquet holds UTF-8 alone: there the odd name is changed, and the file is measured again.
    assert json.loads(out)["scored"] == (4 if name == "rows.parquet" else 3)
    assert (target.read_bytes() == before) == (name != "rows.parquet")
    found = rows.resume(target, name.rpartition(".")[2], ("brightness",), {"prompt": None})
    assert [row["prompt"] for row in found.rows][:2] == ["cat\rdog", '"x", y\u2028z']
    code, out, _ = run(capsys, folder, "--reward", "brightness", "--json")
    assert code == 0
    assert len(json.loads(out)["images"]) == 3
