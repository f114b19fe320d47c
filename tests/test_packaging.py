"""What reaches the user: the files inside the source archive's wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from alignprop_cli import __version__

ROOT = Path(__file__).parent.parent
DIST_INFO = f"alignprop-{__version__}.dist-info"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from the source archive, as an installer from source would build it."""
    pytest.importorskip("build", reason="needs the `dev` extra")
    pytest.importorskip("hatchling", reason="needs the `dev` extra")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


def test_wheel_holds_every_source_file_and_the_embedded_model(names: set[str]):
    package = ROOT / "alignprop_cli"
    kinds = {
        ".py",
        ".typed",
        ".html",
        ".css",
        ".js",
        ".safetensors",
        ".json",
        ".txt",
        ".png",
        ".md",
    }
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if (path.suffix in kinds or path.name == "py.typed")
        and not path.is_relative_to(package / "tiny" / "make")
    }
    assert "alignprop_cli/py.typed" in wanted
    assert any(name.endswith(".safetensors") for name in wanted)
    assert not wanted - names


def test_wheel_holds_the_presets_inside_the_package(names: set[str]):
    wanted = {f"alignprop_cli/_presets/{path.name}" for path in (ROOT / "presets").glob("*.yaml")}
    assert "alignprop_cli/_presets/tiny.yaml" in wanted
    assert {name for name in names if "presets/" in name} == wanted


def test_wheel_leaves_out_the_scripts_that_made_the_embedded_model(names: set[str]):
    assert (ROOT / "alignprop_cli" / "tiny" / "make" / "build.py").exists()
    assert not {name for name in names if name.startswith("alignprop_cli/tiny/make")}


def test_wheel_holds_nothing_else(names: set[str]):
    assert {name.split("/")[0] for name in names} == {"alignprop_cli", DIST_INFO}
    assert not {name for name in names if name.endswith((".pyc", ".pt", ".ckpt"))}
    assert not {name for name in names if "test" in Path(name).name}


def test_whatever_is_imported_is_a_dependency_or_in_an_extra_for_users(wheel: zipfile.ZipFile):
    """An environment with the wheel alone lacks what only tests and tools bring."""
    metadata = Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    asked = [value for value in metadata.get_all("Requires-Dist", []) if not _is_for_us(value)]
    # mlflow is the package of mlflow-skinny too.
    known = {_plain(re.split(r"[^\w.-]", value)[0]) for value in asked} | {"mlflow"}
    homes, imported = packages_distributions(), set[str]()
    for name in wheel.namelist():
        if name.endswith(".py"):
            imported |= set(_imports(ast.parse(wheel.read(name))))
    foreign = imported - {"alignprop_cli", *sys.stdlib_module_names}
    assert len(foreign) > 15
    for module in foreign:
        assert known & {_plain(home) for home in homes.get(module, [module])}, module


def _is_for_us(requirement: str) -> bool:
    return bool(re.search(r"extra == ['\"](test|dev)['\"]", requirement))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imports(tree: ast.AST) -> list[str]:
    """Return the first parts of all names that are imported, also inside functions."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module or "")
    return [name.partition(".")[0] for name in found]


def test_wheel_carries_its_command_and_its_licence(wheel: zipfile.ZipFile, names: set[str]):
    entry_points = wheel.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert "alignprop = alignprop_cli.cli:main" in entry_points
    assert f"{DIST_INFO}/licenses/LICENSE" in names

    metadata = Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
