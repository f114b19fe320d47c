"""`alignprop score` on what others bring: damaged rows, odd names, pipes, images left out."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from alignprop_cli.cli import main
from alignprop_cli.config.schema import RewardConfig
from alignprop_cli.scoring import rows
from tests.factories import picture

SLOW = """
import time

def slow(images, prompts):
    time.sleep(0.1)
    return images.mean(dim=(1, 2, 3))
"""


def run(capsys, *args):
    """Return the exit code, standard output and standard error of `alignprop score`."""
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, args)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return ended.value.code or 0, captured.out, captured.err


def test_rows_that_are_lost_from_the_partial_file_are_missed(tmp_path):
    target = tmp_path / "a.jsonl"
    row = {"file": "a.png", "x": 1.0, "prompt": None, "prompt_source": "none", "content": "c"}
    with rows.to_file(target, "jsonl", ("x",), {}, []) as add:
        add(row)
        # Another program replaces the file: ours is converted, from the handle.
        rows.partial_of(target).unlink()
        rows.partial_of(target).write_text("foreign\n")
        add(row | {"file": "b.png"})
    assert [json.loads(line)["file"] for line in target.read_text().splitlines()] == [
        "a.png",
        "b.png",
    ]


ROW = {"file": "a.png", "brightness": 0.5, "prompt": None, "prompt_source": "none", "content": "c"}
WHOLE = json.dumps(ROW)


def damaged(**changes):
    return json.dumps({k: v for k, v in (ROW | changes).items() if v != "gone"})


DAMAGED = [
    damaged(brightness="x"),
    damaged(brightness=None),
    damaged(brightness=float("nan")),
    damaged(brightness=float("-inf")),
    damaged(brightness=True),
    damaged(brightness=10**400),
    damaged(file=3),
    damaged(file=None),
    damaged(file=""),
    damaged(file="gone"),
    damaged(brightness="gone"),
    damaged(content="gone"),
    damaged(content=[1]),
    damaged(prompt={"a": 1}),
    damaged(prompt="\ud800"),
    damaged(file="\ud800.png"),
    damaged(content="\udc80"),
    damaged(more=1),
    "[" * 100_000,
    '{"file": ' + "[" * 100_000,
    "3",
    "{]",
    '{"file": "a", "file": "b"}',
]


@pytest.mark.parametrize("line", DAMAGED, ids=[line[:60] for line in DAMAGED])
@pytest.mark.parametrize("whole", [True, False], ids=["finished", "partial"])
def test_a_damaged_row_is_named_with_its_line(capsys, tmp_path, line, whole):
    picture(tmp_path / "b.png")
    target = tmp_path / "rows.jsonl"
    ask = (tmp_path / "b.png", "--reward", "brightness", "--output", target, "--resume")
    if whole:
        file, number = target, 2
        target.write_text(f"{WHOLE}\n{line}\n")
    else:
        file, number = rows.partial_of(target), 3
        described = {"brightness": RewardConfig().model_dump(mode="json")}
        header = {"schema": rows.SCHEMA, "rewards": described, "prompt": None, "prompts": None}
        file.write_text(f"{json.dumps(header)}\n{WHOLE}\n{line}\n{WHOLE}\n")
    before = file.read_bytes()
    code, out, err = run(capsys, *ask)
    assert (code, out) == (3, ""), err
    assert f"{file}:{number}" in err.replace("\n", "")
    assert len(err) < 1000
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "cells", ["x", "nan", "inf", "", "0.5,,none,c,too,many", "0.5"], ids=lambda cells: cells or "-"
)
def test_a_damaged_line_of_csv_is_named(capsys, tmp_path, cells):
    picture(tmp_path / "b.png")
    target = tmp_path / "rows.csv"
    row = f"a.png,{cells}" if "," in cells or cells == "0.5" else f"a.png,{cells},,none,c"
    target.write_text(f"file,brightness,prompt,prompt_source,content\na.png,0.5,,none,c\n{row}\n")
    ask = (tmp_path / "b.png", "--reward", "brightness", "--output", target, "--resume")
    code, _, err = run(capsys, *ask)
    assert code == 3
    assert f"{target}:3" in err.replace("\n", "")


def test_a_foreign_table_without_rows_is_not_replaced(capsys, tmp_path):
    picture(tmp_path / "b.png")
    target = tmp_path / "rows.csv"
    target.write_text("name,age\n")
    ask = (tmp_path / "b.png", "--reward", "brightness", "--output", target, "--resume")
    assert run(capsys, *ask)[0] == 2
    assert target.read_text() == "name,age\n"


def test_a_pipe_by_name_is_refused_and_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    code, _, err = run(capsys, tmp_path / "a.png", "--reward", "brightness")
    assert code == 3
    assert "is a pipe or a device" in " ".join(err.split())
    assert run(capsys, "/dev/zero", "--reward", "brightness")[0] == 3
    assert run(capsys, tmp_path, "--reward", "brightness")[0] == 4  # passed over in a folder


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_what_there_is(
    capsys, tmp_path, monkeypatch
):
    name = "a\x1b]0;title\x07\u202e.png"
    picture(tmp_path / name)
    for chosen in ("csv", "jsonl"):
        ask = (tmp_path, "--reward", "brightness", "--format", chosen, "--quiet")
        piped = run(capsys, *ask)[1]
        assert name in piped or json.loads(piped)["file"].endswith(name)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        shown = run(capsys, *ask)[1]
        monkeypatch.undo()
        assert r"\u202e.png" in shown
        assert not any(c in shown for c in "\x1b\x07\u202e")


def test_a_closed_standard_input_is_told(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    code, _, err = run(capsys, "-", "--reward", "brightness")
    assert code == 2
    assert "standard input is closed" in err


def test_a_gallery_takes_names_that_are_not_utf8(capsys, tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    target = tmp_path / "out.csv"
    ask = (tmp_path / "in", "--reward", "brightness", "--output", target, "--gallery")
    assert run(capsys, *ask)[0] == 0
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "in/caf%E9.png" in page
    assert r"caf\udce9.png" in page


def test_no_image_of_a_folder_is_left_out_without_a_word(capsys, tmp_path):
    frames = [Image.new("RGB", (4, 4), (51, 51, 51)) for _ in range(2)]
    frames[1].putpixel((0, 0), (255, 255, 255))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.jfif", format="JPEG")
    frames[0].save(tmp_path / "c.avif")
    for name in ("d.heic", "e.svg", "f.jxl", "g.psd", "h.HEIC"):
        (tmp_path / name).write_bytes(b"something else")
    (tmp_path / "notes.txt").write_text("no image")
    code, out, err = run(capsys, tmp_path, "--reward", "brightness", "--json", "--strict")
    assert code == 4
    result = json.loads(out)
    assert result["scored"] == 3
    assert result["rewards"]["brightness"]["min"] == pytest.approx(0.2, abs=0.02)
    reasons = {Path(s["file"]).name: s["reason"] for s in result["skipped"]}
    assert reasons == {
        "d.heic": ".heic files are not read",
        "e.svg": ".svg files are not read",
        "f.jxl": ".jxl files are not read",
        "g.psd": ".psd files are not read",
        "h.HEIC": ".HEIC files are not read",
    }
    assert "1 images: animated: the first frame was measured" in " ".join(err.split())
    assert "5 of 8 images were skipped" in err


def test_a_text_that_cannot_be_read_is_said_where_the_image_can_be_measured(capsys, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    code, out, err = run(capsys, tmp_path, "--reward", "brightness", "--json")
    assert code == 0
    assert json.loads(out)["images"][0]["prompt"] is None
    assert "a.txt is not UTF-8" in " ".join(err.split())
    (tmp_path / "mine.py").write_text(SLOW)
    code, _, err = run(capsys, tmp_path, "--reward", f"{tmp_path}/mine.py:slow")
    assert code == 4
    assert "no prompt found" in err
    assert "a.txt is not UTF-8" in " ".join(err.split())


def test_without_a_reward_only_images_of_the_embedded_model_are_measured(capsys, tmp_path):
    drawn = {"prompt": "one red circle on a white background", "Software": "alignprop 0.1.0"}
    picture(tmp_path / "tiny" / "a.png", size=(64, 64), model="tiny", **drawn)
    code, out, _ = run(capsys, tmp_path / "tiny", "--json")
    assert code == 0
    assert list(json.loads(out)["rewards"]) == ["clip"]
    assert run(capsys, tmp_path / "tiny", "--reward", "clip,brightness")[0] == 0
    # One image of another model, or of a person, is enough.
    picture(tmp_path / "other" / "a.png", model="runwayml/stable-diffusion-v1-5", **drawn)
    picture(tmp_path / "mine" / "a.png", prompt="a cat")
    for folder in ("other", "mine"):
        code, out, err = run(capsys, tmp_path / "tiny", tmp_path / folder)
        assert (code, out) == (2, "")
        assert "no reward is named" in err
        assert "aesthetic" in err
        assert "hps" in err
        code, out, err = run(capsys, tmp_path / folder, "--reward", "clip")
        assert (code, out) == (2, "")
        assert "--set reward.clip.model=ViT-L-14" in " ".join(err.split())
    ask = (tmp_path / "mine", "--reward", "clip", "--set", "reward.clip.model=tiny")
    assert run(capsys, *ask)[0] == 0


@pytest.mark.parametrize("reward", ["clip", "clip_count", "clip_choice"])
def test_the_embedded_reward_is_not_taken_unasked_for_another_model(capsys, tmp_path, reward):
    for command in (["train"], ["evaluate", "base"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--model", str(tmp_path / "sd"), "--reward", reward])
        assert ended.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"--set reward.{reward}.model=ViT-L-14" in said


HANDED = Path(os.environ.get("ALIGNPROP_CASES", Path(__file__).parents[3] / "shared" / "cases"))
SHORT = (
    "--preset=tiny",
    "--set=sample.num_inference_steps=1",
    "--set=gradient.k_max=1",
    "--set=eval.images=2",
)


def test_prompts_that_are_cut_are_said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # They differ only after the 77 tokens that CLIP's text towers read.
    long = "two small green triangles " * 40
    Path("p.txt").write_text(f"{long}on a brown background\n{long}on a white background\n")
    sizes = ("--set=train.batch_size=2", "--set=train.micro_batch=2", "--set=eval.sample_images=1")
    quick = ("--steps=1", *sizes, "--output=out")
    for args in (
        ["train", *SHORT, "--set=train.prompts=p.txt", *quick],
        ["evaluate", "base", *SHORT, "--set=eval.prompts=p.txt", "--output=results"],
        ["score", "results/images/base", "--reward", "clip"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(args)
        said = " ".join(capsys.readouterr().err.split())
        assert not ended.value.code, said
        readers = ("clip",) if args[0] == "score" else ("tiny", "clip")
        for reader in readers:
            assert said.count(f"{reader} does not read 2 of") == 1
        assert "background'" in said


def test_the_handed_prompts_are_said_to_be_cut(capsys, tmp_path, monkeypatch):
    path = HANDED / "prompts" / "p_long.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set ALIGNPROP_CASES to the folder of cases")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "base", *SHORT, f"--set=eval.prompts={path}", "--output=results"])
    assert not ended.value.code
    assert "tiny does not read 2 of 3 prompts to their end" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_prompt_without_end_is_measured_in_no_time(capsys, tmp_path):
    picture(tmp_path / "a.png", size=(64, 64))
    (tmp_path / "a.txt").write_text("two red circles " * 60_000)
    before = time.monotonic()
    ask = (tmp_path / "a.png", "--reward", "clip", "--set", "reward.clip.model=tiny", "--json")
    code, out, _ = run(capsys, *ask)
    assert code == 0
    long = json.loads(out)["rewards"]["clip"]["mean"]
    assert time.monotonic() - before < 20
    (tmp_path / "a.txt").write_text("two red circles " * 60)
    assert json.loads(run(capsys, *ask)[1])["rewards"]["clip"]["mean"] == long
    (tmp_path / "a.txt").write_text("x" * 50_000_000)
    code, _, err = run(capsys, *ask)
    assert code == 4
    assert "a.txt has 48 MiB" in " ".join(err.split())


def test_rows_do_not_replace_a_device(tmp_path, capsys):
    picture(tmp_path / "a.png")
    ask = (tmp_path, "-r", "brightness", "-o", "/dev/null", "--overwrite")
    code, _, err = run(capsys, *ask)
    assert code == 2
    assert "/dev/null is a pipe or a device" in err
