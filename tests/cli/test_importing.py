"""Large imports leave Python's collector as it was, and take their objects out of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def answers(code: str) -> list[str]:
    """Return the words that a new process prints."""
    head = "import gc, sys; from alignprop_cli.commands.importing import large_imports; "
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_nothing_is_collected_inside_and_what_was_imported_is_left_alone() -> None:
    code = """
with large_imports():
    print(gc.isenabled())
    import torch
print(gc.isenabled(), gc.get_freeze_count() > 50_000)
frozen = gc.get_freeze_count()
mine = [[] for _ in range(1000)]
with large_imports():
    print(gc.isenabled())
print(gc.get_freeze_count() <= frozen)
"""
    assert answers(code) == ["False", "True", "True", "True", "True"]


def test_it_is_on_again_after_an_error_and_stays_off_where_it_was_off() -> None:
    code = """
try:
    with large_imports():
        raise ImportError
except ImportError:
    print(gc.isenabled())
gc.disable()
with large_imports():
    print(gc.isenabled())
print(gc.isenabled())
"""
    assert answers(code) == ["True", "False", "False"]


@pytest.mark.long
@pytest.mark.parametrize(
    "args",
    [
        ["train", "--preset=tiny", "--dry-run", "--reward=brightness"],
        ["evaluate", "nowhere"],
        ["soup", "nowhere", "base"],
        ["score", "nowhere.png", "--reward=brightness"],
    ],
    ids=lambda args: args[0],
)
def test_every_command_imports_so(args: list[str]) -> None:
    code = f"""
from alignprop_cli.cli import main
try:
    main({args})
except SystemExit:
    print()
print(gc.isenabled(), gc.get_freeze_count() > 50_000)
"""
    assert answers(code)[-2:] == ["True", "True"]
