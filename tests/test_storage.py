"""Files and folders that are written: whole or not at all, one writer, hashes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignprop_cli import storage
from alignprop_cli.errors import ConfigError
from alignprop_cli.storage import fingerprint, locked, sweep, write_text, write_whole


def one_file(name: str, text: str = "x"):
    return lambda folder: (folder / name).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kernel", ["renameat2", "two steps"])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch, kernel: str) -> None:
    if kernel == "two steps":
        monkeypatch.setattr(storage.ctypes, "CDLL", lambda *a, **k: object())
    write_whole(tmp_path / "a", one_file("old"))
    write_whole(tmp_path / "a", one_file("new"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]
    with pytest.raises(ConfigError, match="has appeared meanwhile"):
        write_whole(tmp_path / "a", one_file("newer"), replace=False)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


def test_a_file_in_the_way_is_replaced_and_gone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a note", encoding="utf-8")
    write_whole(tmp_path / "a", one_file("new"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    for name in ("a", "b"):
        write_whole(tmp_path / name, one_file("new"))
    storage.remove(tmp_path / "a")
    assert names(tmp_path) == ["b"]

    # Killed before the first file of it is gone.
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
    storage.remove(tmp_path / "b")
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    storage.sweep(tmp_path)
    assert names(tmp_path) == []


def test_an_empty_folder_may_always_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_whole(tmp_path / "a", one_file("new"), replace=False)
    assert names(tmp_path / "a") == ["new"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write_whole(tmp_path / "link", one_file("new"))
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["new"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, storage._rename

    def synced(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def renamed(source: Path, target: Path, flag: int) -> None:
        done.append("renamed")
        rename(source, target, flag)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(storage, "_rename", renamed)

    def write(folder: Path) -> None:
        (folder / "images").mkdir()
        (folder / "images" / "1").write_text("x")
        (folder / "file").write_text("x")

    write_whole(tmp_path / "a", write)
    before = done[: done.index("renamed")]
    assert {"file", "images", "1"} <= set(before)
    assert before[-1] == "images" or before[-1].endswith(".unfinished") or before[-1] == "1"
    # And the name itself, which is an entry of the parent.
    assert done[-1] == tmp_path.name


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from alignprop_cli.storage import write_whole\n"
        f"folder = Path({str(tmp_path / 'a')!r})\n"
        "write_whole(folder, lambda made: os.kill(os.getpid(), signal.SIGKILL))"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = names(tmp_path)
    assert left.startswith(".a-")
    # A folder of the user's that looks similar, and what a living process is writing.
    (tmp_path / ".a-mine").mkdir()

    def write(folder: Path) -> None:
        sweep(tmp_path)
        assert folder.is_dir()
        (folder / "file").write_text("x")

    write_whole(tmp_path / "b", write)
    assert names(tmp_path) == [".a-mine", "b"]


def test_an_old_half_written_text_is_swept_and_a_new_one_is_not(tmp_path: Path) -> None:
    for name, age in {".t-12.unfinished": 3600.0, ".t-13.unfinished": 0.0}.items():
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(tmp_path, "t")
    assert names(tmp_path) == [".t-13.unfinished"]
    # Where nobody else writes, it can only be of a process that was killed.
    sweep(tmp_path, is_ours=True)
    assert names(tmp_path) == []


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "t", "\ud800")
    assert (tmp_path / "t").read_text() == "old"
    assert names(tmp_path) == ["t"]


HOLD = """
import sys, time
from pathlib import Path
from alignprop_cli.storage import locked
with locked(Path(sys.argv[1]), "runs/x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_lock_and_the_other_names_it(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        message = rf"runs/x: .*process {other.pid}\)"
        with pytest.raises(ConfigError, match=message), locked(file, "runs/x"):
            pass
        assert file.exists()
        # Even kill -9 leaves it free.
        other.kill()
        other.wait()
    with locked(file, "runs/x"):
        assert file.read_text() == f"{os.getpid()}\n"
    assert names(tmp_path) == []


def test_a_fingerprint_tells_other_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    weights = folder / "unet" / "weights.safetensors"
    weights.write_bytes(bytes(100_000))
    (folder / "README.md").write_text("about")
    before = fingerprint(folder)
    (folder / "README.md").write_text("more about")
    assert fingerprint(folder) == before
    weights.write_bytes(bytes(99_999) + b"\1")
    changed = fingerprint(folder)
    assert changed != before
    weights.rename(folder / "unet" / "other.safetensors")
    assert fingerprint(folder) not in {before, changed}


def test_where_there_are_no_posix_locks_a_command_says_so(tmp_path: Path) -> None:
    """Windows has neither these nor SIGHUP."""
    code = (
        "import signal, sys; sys.modules['fcntl'] = None; del signal.SIGHUP\n"
        "from alignprop_cli.cli import main; main(['soup', 'a', 'b'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "error: alignprop runs on Linux and macOS: this system has no POSIX file locks (fcntl)",
        "hint: on Windows install it in WSL",
    ]
