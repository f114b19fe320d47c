"""How threads wait is decided once, before torch is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignprop_cli.waiting import choose_waiting

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def unset(monkeypatch) -> None:
    # Set first, so that what is chosen is taken back after the test.
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def chosen(file: Path) -> dict[str, str]:
    choose_waiting(file)
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        (1, {"GOMP_SPINCOUNT": "1000"}),
        (2, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (40, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_threads_give_their_core_away_beside_others(
    tmp_path: Path, running: int, expected: dict[str, str]
) -> None:
    file = tmp_path / "stat"
    file.write_text(f"cpu  1 2 3\nprocs_running {running}\nprocs_blocked 7\n", encoding="ascii")
    assert chosen(file) == expected


def test_nothing_is_set_where_nobody_tells(tmp_path: Path) -> None:
    assert chosen(tmp_path / "stat") == {}
    (tmp_path / "stat").write_text("cpu  1 2 3\n", encoding="ascii")
    assert chosen(tmp_path / "stat") == {}


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch, name: str) -> None:
    (tmp_path / "stat").write_text("procs_running 1\n", encoding="ascii")
    monkeypatch.setenv(name, "ACTIVE" if name == "OMP_WAIT_POLICY" else "5")
    before = dict(os.environ)
    choose_waiting(tmp_path / "stat")
    assert dict(os.environ) == before


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux tells what runs")
def test_the_command_line_chooses_before_torch_is_imported() -> None:
    code = (
        "import contextlib, os, sys; from alignprop_cli.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "with contextlib.suppress(SystemExit): main(['--version'])\n"
        "assert 'torch' not in sys.modules\n"
        f"print([name for name in {VARIABLES!r} if name in os.environ])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] in ("['OMP_WAIT_POLICY']", "['GOMP_SPINCOUNT']")
