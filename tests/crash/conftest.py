"""The process that starts the commands, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.commands import Commands
from tests.warm import Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    made = Warm(tmp_path_factory.mktemp("warm") / "streams")
    yield made
    made.close()


@pytest.fixture(scope="session")
def commands(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(warm, tmp_path_factory.mktemp("commands"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return an empty folder; the test's own may hold logs."""
    made = tmp_path / "place"
    made.mkdir()
    return made
