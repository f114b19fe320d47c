"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.commands import Commands
from tests.warm import Warm


@pytest.fixture(scope="session")
def commands(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(warm, tmp_path_factory.mktemp("commands"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return an empty folder; the test's own may hold logs."""
    made = tmp_path / "place"
    made.mkdir()
    return made
