"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.commands import Commands
from tests.warm import Warm


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make those `long` that need what the commands begin with, but for one file.

    It takes ten seconds to train, in every process.
    """
    for item in items:
        of_here = isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent
        if of_here and "commands" in item.fixturenames and item.path.name != "test_rot.py":
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def commands(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(warm, tmp_path_factory.mktemp("commands"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return an empty folder; the test's own may hold logs."""
    made = tmp_path / "place"
    made.mkdir()
    return made
