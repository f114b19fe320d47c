"""Folders are written where they can be, and replaced only where nothing of others is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignprop_cli.cli import main
from alignprop_cli.commands.output import EVALUATION, check_output
from alignprop_cli.errors import ConfigError

QUICK = (
    *("--preset", "tiny", "--images", "1", "--reward", "brightness", "--quiet"),
    *("--set", "sample.num_inference_steps=1", "--set", "sample.guidance_scale=1"),
)


def check(folder: Path) -> None:
    check_output(folder, overwrite=True, ours=EVALUATION, sign="results.json")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


RESULT = ("results.json", "results.csv", "report.html", "sheet.png", "images/base/0000.png")


def test_an_empty_folder_may_be_used_and_a_file_never(tmp_path):
    check_output(tmp_path / "new", overwrite=False, ours=())
    check_output(tmp_path, overwrite=False, ours=())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True, ours=("file",))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_result_is_replaced_when_asked(tmp_path):
    folder = fill(tmp_path / "out", *RESULT, "curve.png", "images/strength 0.5/12345.png")
    check(folder)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        check_output(folder, overwrite=False, ours=EVALUATION)


@pytest.mark.parametrize(
    "name",
    [
        "my-only-photo.png",
        "images/my-only-photo.png",
        "images/base/my-only-photo.png",
        "images/base/0001.png.txt",
        "images/base/more/0001.png",
        "images/0001.png",
        "results.json.bak",
    ],
)
def test_what_is_inside_the_folders_of_a_result_counts_too(tmp_path, name):
    folder = fill(tmp_path / "out", *RESULT, name)
    with pytest.raises(ConfigError, match=f"holds {name}, which --overwrite would remove"):
        check(folder)


def test_images_alone_are_no_result(tmp_path):
    folder = fill(tmp_path / "out", "images/base/0000.png")
    with pytest.raises(ConfigError, match=r"has no results\.json, so it is no result"):
        check(folder)


def test_a_link_inside_is_not_ours(tmp_path):
    folder = fill(tmp_path / "out", *RESULT)
    (folder / "images" / "tuned").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="holds images/tuned"):
        check(folder)


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, args)))
    return int(ended.value.code or 0)


def test_the_commands_delete_nothing_of_others(tmp_path, capsys):
    photo = fill(tmp_path / "out", "images/my-only-photo.png") / "images" / "my-only-photo.png"
    out = ("-o", tmp_path / "out")
    assert run("evaluate", "base", *QUICK, *out, "--overwrite") == 2
    assert photo.read_text() == "x"
    assert "my-only-photo.png" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/alignprop/out", "FILE/out"])
def test_where_nothing_can_be_written_is_said_before_anything_is_done(
    tmp_path, capsys, monkeypatch, place
):
    import alignprop_cli.evaluation.run as evaluation

    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("it was drawn")

    monkeypatch.setattr(evaluation, "run_evaluation", drawn)
    (tmp_path / "FILE").touch()
    folder = place.replace("FILE", str(tmp_path / "FILE"))
    assert run("evaluate", "base", *QUICK, "-o", folder) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"error: --output: {folder} cannot be written: " in err
    assert not Path(folder).exists()


def test_a_link_is_followed_and_not_replaced(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    for more in ([], ["--overwrite"]):
        assert run("evaluate", "base", *QUICK, "-o", tmp_path / "link", *more) == 0
        assert (tmp_path / "link").is_symlink()
        assert (disk / "results.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_no_path_at_all_is_refused(capsys):
    for flag in ("--output", "--config"):
        assert run("evaluate", "base", "--preset", "tiny", flag, "") == 2
        assert f"error: {flag}: expected a path, got an empty text" in capsys.readouterr().err
    assert run("train", "--config", "", "--reward", "brightness") == 2
    assert "--config: expected a path" in capsys.readouterr().err


def test_what_appears_while_images_are_sampled_stays(tmp_path, capsys, monkeypatch):
    import alignprop_cli.evaluation.run as evaluation

    check_memory = evaluation.check_memory

    def somebody_writes(*args: object, **more: object) -> object:
        fill(tmp_path / "out", "note.txt")
        return check_memory(*args, **more)

    monkeypatch.setattr(evaluation, "check_memory", somebody_writes)
    assert run("evaluate", "base", *QUICK, "-o", tmp_path / "out") == 2
    assert "out has appeared meanwhile" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "note.txt").read_text() == "x"
