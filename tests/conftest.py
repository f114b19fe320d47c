"""What holds for every test: no network, deterministic arithmetic, this checkout's code."""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

# Read when the libraries are imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores have processes of their own
# Else every process that the tests start compiles all of this checkout again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns in every forked process
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic algorithms on a GPU ask for it
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)
# Help and tables look the same on a terminal, in a pipe and in continuous integration.
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "100"
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # each makes typer use colours
    os.environ.pop(name, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.warm import Warm  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Make arithmetic deterministic where tests run.

    Not in the process that hands them out (pytest-xdist): the others wait while it imports torch.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        import torch

        torch.use_deterministic_algorithms(True)


# Those with the longest tests, so that no process is left with one of them at the end.
_FIRST = (
    "tests/end_to_end/",
    "tests/training/test_compiling.py",
    "tests/training/test_trainer.py",
    "tests/training/test_guard.py",
    "tests/fuzz/test_commands.py",
    "tests/crash/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, and skip what needs a package that is not there."""
    # pytest-xdist by itself begins with the files of most tests.
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))
    for item in items:
        for mark in item.iter_markers("extra"):
            package, extra = mark.args
            if importlib.util.find_spec(package) is None:
                reason = f"{package} is not installed (pip install 'alignprop[{extra}]')"
                item.add_marker(pytest.mark.skip(reason=reason))


_frozen = 0  # modules


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Spare every later collection of garbage what is there for good: libraries and tests.

    Each model that is opened collects, and what libraries are made of takes it half a second.
    """
    global _frozen
    if len(sys.modules) > _frozen + 100:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Yield what starts commands in processes of their own, without the seconds of a start."""
    # The folder of a process of pytest-xdist is in that of the run.
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    made = Warm(tmp_path_factory.mktemp("warm") / "streams", shared)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def same_recursion_limit() -> Iterator[None]:
    """Take back what libraries do to the limit, at which texts that nest too deeply are refused."""
    limit = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(limit)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail the test that reaches for another machine, even when its caller hides the error.

    Yields:
        The addresses refused so far.
    """
    refused: list[str] = []

    def guarded(connect: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in {socket.AF_INET, socket.AF_INET6} and not _is_local(address[0]):
                refused.append(f"{address[0]}:{address[1]}")
                raise OSError(f"tests have no network; refused {refused[-1]}")
            return connect(self, address)

        return call

    for method in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, method, guarded(getattr(socket.socket, method)))
    yield refused
    if refused:
        pytest.fail(f"the test reached for the network: {', '.join(refused)}")


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
