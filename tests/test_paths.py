"""Paths from outside: found, missing, or refused with one message."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.paths import read_bytes, read_text, user_path


def test_home_is_expanded_and_a_missing_path_is_returned(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("x")
    assert user_path("~/file", "--config").is_file()
    assert not user_path("~/none", "--config").exists()
    # A file is no folder: nothing can be inside.
    assert not user_path("~/file/inside", "--config").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a path, got an empty text"),
        ("a\0b", "null"),
        ("x" * 300, "name too long"),
        ("/".join(["y" * 200] * 30), "name too long"),
        ("~nosuchuser/x", "home"),
        ("half\ud800", "surrogate"),
    ],
)
def test_what_can_be_no_path_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        user_path(name, "--config")
    assert refused.value.message.startswith("--config: ")
    assert message in refused.value.message.lower()
    assert len(refused.value.message) < 300


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="symbolic links"):
        user_path(str(tmp_path / "loop"), "--output")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_keeps_to_himself_is_told_as_that() -> None:
    # Not in `tmp_path`, which is closed to others as a whole.
    locked = Path(tempfile.mkdtemp())
    (locked / "inside").mkdir()
    locked.chmod(0o700)
    child = os.fork()
    if child == 0:
        # Another user, who ends without the cleaning up of the tests.
        os.setgid(65534)
        os.setuid(65534)
        found = 0
        for path in (locked, locked / "inside"):
            try:
                user_path(str(path), "--resume")
            except AssetError as error:
                found += "Permission denied" in error.message
            except Exception:  # noqa: BLE001  counted as not found
                continue
        os._exit(found)
    status = os.waitpid(child, 0)[1]
    shutil.rmtree(locked)
    assert os.waitstatus_to_exitcode(status) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_text_is_read_by_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    data = "ein Bär\n".encode(encoding)
    if encoding == "utf-16-be":
        data = b"\xfe\xff" + data
    (tmp_path / "text").write_bytes(data)
    assert read_text(tmp_path / "text", "prompts") == "ein Bär\n"


def test_another_encoding_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(AssetError, match=r"not UTF-8: byte 5 is 0xe4"):
        read_text(tmp_path / "text", "prompts")


def test_only_regular_files_of_a_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for path, message in {
        tmp_path / "pipe": "a pipe or a device",
        Path("/dev/zero"): "a pipe or a device",
        tmp_path: "a folder",
        tmp_path / "none": "No such file",
        tmp_path / "large": "at most",
    }.items():
        with pytest.raises(AlignPropError, match=message) as refused:
            read_bytes(path, "--config", most=10)
        assert refused.value.exit_code == 3
    assert read_bytes(tmp_path / "large", "--config", most=11) == b"x" * 11
