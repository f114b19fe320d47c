"""The house rules that a machine can check: who imports whom, sizes, printing, start-up."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest

from alignprop_cli import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alignprop_cli"

# Where each module, or each folder of modules, lives. A new one is placed here first.
LAYER = {
    "errors": "errors",
    **dict.fromkeys(["config", "validation", "presets", "trust", "estimate", "plan"], "decide"),
    **dict.fromkeys(
        ["schedule", "sampling", "truncation", "losses", "images"],
        "maths",
    ),
    **dict.fromkeys(
        [
            "models",
            "rewards",
            "hub",
            "lora",
            "prompts",
            "rng",
            "memory",
            "machine",
            "footprint",
            "soup",
            "tiny",
        ],
        "parts",
    ),
    **dict.fromkeys(
        [
            "trainer",
            "probe",
            "compiling",
            "evaluator",
            "scorer",
            "pictures",
            "captions",
            "checkpoint",
            "report",
            "page",
            "adapter",
        ],
        "run",
    ),
    "console": "console",
    "commands": "commands",
    "cli": "cli",
    "__main__": "main",
    "__init__": "root",
}

# What each layer may import of the package. `__version__` is everyone's.
MAY_IMPORT = {
    "root": set[str](),
    "errors": set[str](),
    "console": {"errors"},
    "decide": {"errors", "decide"},
    "maths": {"errors", "maths"},
    "parts": {"errors", "decide", "maths", "parts"},
    "run": {"errors", "decide", "maths", "parts", "run"},
    "commands": {"errors", "console", "decide", "maths", "parts", "run", "commands"},
    "cli": {"errors", "console", "commands"},
    "main": {"cli"},
}

# The only homes of libraries that would otherwise spread. An empty set: nobody.
ONLY_IMPORTERS = {
    "accelerate": {"trainer", "commands"},
    "click": set[str](),
    "diffusers": {"models", "tiny"},
    "jinja2": {"page"},
    "kornia": {"rewards"},
    "matplotlib": {"report"},
    "open_clip": {"rewards", "tiny"},
    "peft": {"lora"},
    "rich": {"console"},
    "transformers": {"models", "rewards", "tiny"},
    "typer": {"cli", "commands"},
    "yaml": {"config", "presets"},
}

# All that these layers may import from outside the standard library.
THIRD_PARTY = {"root": set[str](), "errors": set[str](), "maths": {"torch"}}
NO_TORCH = {"root", "errors", "decide", "console", "cli", "main"}

MAY_CATCH_EVERYTHING = {"alignprop_cli/cli.py", "alignprop_cli/rewards/own.py"}
ATTICS = re.compile(r"(^|_)(utils?|helpers?|common|misc)$")
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_HELP_SECONDS = 0.6


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def home(self) -> str:
        """The top-level module or folder it belongs to: `lora`, `models`."""
        return self.path.relative_to(PACKAGE).with_suffix("").parts[0]

    @property
    def layer(self) -> str:
        return LAYER[self.home]

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, dotted name) of every import, wherever it stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: write imports in full"
                assert node.module is not None
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)

    def own_imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, home) for what it imports of the package, but for `__version__`."""
        for line, dotted in self.imports():
            top, _, rest = dotted.partition(".")
            if top == "alignprop_cli" and rest != "__version__":
                yield line, rest.partition(".")[0] or "__init__"

    def third_party(self) -> Iterator[tuple[int, str]]:
        """Yield (line, library) for what it imports from outside the package and Python."""
        for line, dotted in self.imports():
            top = dotted.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "alignprop_cli":
                yield line, top


MODULES = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def test_the_package_is_found():
    assert {"alignprop_cli/__init__.py", "alignprop_cli/cli.py"} <= {m.name for m in MODULES}


@each_module
def test_every_module_has_a_layer(module: Module):
    assert module.home in LAYER, f"{module.name}: place '{module.home}' in LAYER above"


@each_module
def test_imports_within_the_package_point_one_way(module: Module):
    wrong = [
        f"{module.name}:{line}: {module.layer} imports {home} ({LAYER.get(home, 'no layer')})"
        for line, home in module.own_imports()
        if LAYER.get(home) not in MAY_IMPORT[module.layer]
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_each_library_is_imported_only_at_home(module: Module):
    allowed = THIRD_PARTY.get(module.layer)
    wrong = [
        f"{module.name}:{line}: imports {library}"
        for line, library in module.third_party()
        if module.home not in ONLY_IMPORTERS.get(library, {module.home})
        or (allowed is not None and library not in allowed)
        or (module.layer in NO_TORCH and library.startswith("torch"))
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_module_is_small_and_named_for_a_concept(module: Module):
    lines = module.text.count("\n")
    assert lines <= MAX_MODULE_LINES, f"{module.name}: {lines} lines; split it by concept"
    for part in module.path.relative_to(PACKAGE).with_suffix("").parts:
        assert not ATTICS.search(part), f"{module.name}: name it after what it holds"


@each_module
def test_functions_are_short(module: Module):
    wrong = [
        f"{module.name}:{node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_only_the_console_prints(module: Module):
    if module.home in {"console", "tiny"}:  # tiny: the scripts that made the embedded model
        return
    wrong = [
        f"{module.name}:{node.lineno}: print()"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_only_two_places_catch_everything(module: Module):
    broad = [
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and _swallows_everything(node)
    ]
    # The last resort, which hides the traceback, and the place that runs code of others.
    allowed = 1 if module.name in MAY_CATCH_EVERYTHING else 0
    assert len(broad) <= allowed, f"{module.name}: broad except on lines {broad}"


def _swallows_everything(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:  # tidies up, then lets it through
        return False
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        name is None or (isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"})
        for name in names
    )


def test_help_loads_no_heavy_library():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['alignprop', '--help']\n"
        "try:\n"
        "    runpy.run_module('alignprop_cli', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'diffusers', 'peft', 'transformers', 'accelerate', 'scipy', 'numpy'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)))\n"
    )
    done = _python("-c", code)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.skipif(
    os.environ.get("ALIGNPROP_NO_TIMING") == "1", reason="ALIGNPROP_NO_TIMING=1 is set"
)
def test_help_is_quick():
    seconds: list[float] = []
    while len(seconds) < 5 and not any(one < MAX_HELP_SECONDS for one in seconds):
        started = time.perf_counter()
        _python("-m", "alignprop_cli", "--help")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < MAX_HELP_SECONDS, f"--help took {seconds} s"


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


CATEGORIES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Numerics"}
RELEASE = re.compile(r"\[(?P<version>\d+\.\d+\.\d+)\] - (?P<day>\d{4}-\d{2}-\d{2})")


def test_changelog_keeps_its_form():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    first, *others = (line.removeprefix("## ") for line in lines if line.startswith("## "))
    assert first == "[Unreleased]"

    releases = [RELEASE.fullmatch(heading) for heading in others]
    assert None not in releases, f"write '## [1.2.3] - 2026-01-31', got {others}"
    versions = [
        tuple(int(number) for number in release["version"].split("."))
        for release in releases
        if release
    ]
    days = [date.fromisoformat(release["day"]) for release in releases if release]
    assert versions == sorted(versions, reverse=True)
    assert days == sorted(days, reverse=True)
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= CATEGORIES

    if releases and releases[0]:
        assert releases[0]["version"] == __version__
    else:
        assert __version__ == "0.1.0"  # the first release is still to come


def test_the_version_is_written_once():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == "alignprop_cli/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
