"""`alignprop score` from the command line: rows, summary, files, exit codes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from alignprop_cli.cli import main
from alignprop_cli.report import save_picture


def run(capsys, *args):
    """Return the exit code, standard output and standard error of `alignprop score`."""
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, args)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three grey pictures, the last with a prompt, and a broken one."""
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for name, value, texts in (
        ("a.png", 51, {}),
        ("b.png", 102, {}),
        ("sub/c.png", 204, {"prompt": 'one :cat: [red]\nsecond line, "quoted"'}),
    ):
        save_picture(np.full((8, 8, 3), value, dtype=np.uint8), pictures / name, texts)
    (pictures / "broken.png").write_bytes(b"no picture")
    return pictures


def test_a_table_and_a_summary_are_printed_and_skipped_files_are_named(capsys, folder):
    code, out, err = run(capsys, folder, "--reward", "brightness,contrast")
    assert code == 0
    assert "0.2000" in out
    assert "sub/c.png" in out
    assert "3 pictures measured, 1 skipped" in out
    assert "broken.png" in err
    mean = next(line for line in out.splitlines() if line.startswith("brightness"))
    # (0.2 + 0.4 + 0.8) / 3, and the deviation of these three
    assert mean.split()[1:3] == ["0.4667", "0.2494"]


def test_json_is_one_object_and_nothing_else_on_standard_output(capsys, folder):
    code, out, _ = run(capsys, folder, "--reward", "brightness", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["schema"] == "alignprop.score/1"
    assert values["scored"] == 3
    assert [s["file"].rsplit("/", 1)[1] for s in values["skipped"]] == ["broken.png"]
    assert values["rewards"]["brightness"]["max"] == pytest.approx(0.8, abs=1e-6)
    assert [p["prompt_source"] for p in values["pictures"]] == ["none", "none", "picture"]


def test_csv_and_jsonl_rows_are_complete(capsys, folder):
    code, out, err = run(capsys, folder, "--reward", "brightness", "--format", "csv")
    rows = list(csv.DictReader(out.splitlines(keepends=True)))
    assert code == 0
    assert list(rows[0]) == ["file", "brightness", "prompt", "prompt_source"]
    assert rows[2]["prompt"] == 'one :cat: [red]\nsecond line, "quoted"'
    assert "3 pictures measured" in err
    _, out, _ = run(capsys, folder, "--reward", "brightness", "--format", "jsonl", "--quiet")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == [None, None, rows[2]["prompt"]]
    assert [float(row["brightness"]) for row in rows] == [line["brightness"] for line in lines]


def test_rows_go_to_a_file_that_is_not_replaced_unasked(capsys, folder, tmp_path):
    target = tmp_path / "new" / "scores.jsonl"
    code, out, _ = run(capsys, folder, "--reward", "brightness", "--output", target, "--json")
    assert code == 0
    assert "pictures" not in json.loads(out)
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
    assert "all 1 pictures were skipped" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, tmp_path / "empty", "--reward", "brightness")
    assert code == 4
    assert "no pictures were found" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--reward", "brightnes"], 2, "Did you mean 'brightness'"),
        (["--set", "sample.eta=1"], 2, "only reward.NAME.OPTION"),
        (["--reward", "brightness", "--format", "csv", "--json"], 2, "both write"),
        (["--reward", "brightness", "--output", "scores.txt"], 2, "csv or jsonl"),
        (["--reward", "brightness", "--prompts", "none.csv"], 3, "cannot read none.csv"),
        (["--set", "reward.clip.model=/none"], 3, "no such folder"),
    ],
)
def test_mistakes_are_explained(capsys, folder, args, code, words):
    found, out, err = run(capsys, folder, *args)
    assert (found, out) == (code, "")
    assert words in err


def test_a_missing_path_ends_with_3(capsys, tmp_path):
    code, _, err = run(capsys, tmp_path / "none", "--reward", "brightness")
    assert code == 3
    assert "no such file or folder" in err
