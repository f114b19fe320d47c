"""The house rules that a machine can check: who imports whom, sizes, words, printing, start-up.

One test a rule; each lists every offender.
"""

from __future__ import annotations

import ast
import graphlib
import io
import os
import re
import subprocess
import sys
import time
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

import pytest

from alignprop_cli import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alignprop_cli"

# Where each module, or each folder of modules, lives. A new one is placed here first.
STORY = ("schedule", "guidance", "sampling", "calls", "estimators", "losses", "images", "rng")
LAYER = {
    **{
        name: name
        for name in (
            *("errors", "waiting", "console", "config", "evaluation", "training", "scoring"),
            "publishing",
        )
    },
    **dict.fromkeys(STORY, "story"),
    **dict.fromkeys(("paths", "parsing"), "outside"),
    **dict.fromkeys(("device", "storage", "hub", "prompts", "benchmarks", "tracking"), "ground"),
    **dict.fromkeys(("models", "rewards", "lora", "planning", "shipped"), "parts"),
    "tiny": "tiny",
    "commands": "commands",
    "api": "api",
    "cli": "cli",
    "__main__": "main",
    "__init__": "root",
}

# What each layer may import of the package, besides itself; downwards alone. Nobody imports tiny:
# what is wanted of it is named in a registry (prompts.BUILT_IN, models/rows.py).
_PARTS = {"errors", "outside", "story", "config", "ground", "parts"}
MAY_IMPORT = {
    # In functions alone: `import alignprop_cli` loads nothing.
    "root": {"errors", "api"},
    "errors": set[str](),
    "waiting": set[str](),
    "console": {"errors"},
    "story": {"errors"},
    "outside": {"errors"},
    "config": {"errors", "outside"},
    "ground": {"errors", "outside", "story", "config"},
    # What made the embedded models shares their attention with what trains them.
    "tiny": {"parts"},
    "parts": _PARTS,
    "publishing": {*_PARTS, "console"},
    "evaluation": {*_PARTS, "console", "publishing"},
    "training": {*_PARTS, "console", "evaluation", "publishing"},
    "scoring": {*_PARTS, "console", "evaluation", "publishing"},
    "commands": {*_PARTS, "console", "evaluation", "training", "scoring", "publishing"},
    "api": {*_PARTS, "console", "evaluation", "publishing", "commands"},
    "cli": {"errors", "waiting", "console", "commands"},
    "main": {"cli"},
}

# What these commands reach, however indirectly, must not include training.
WITHOUT_TRAINING = ("alignprop_cli.commands.evaluate", "alignprop_cli.commands.score")

# The only homes of libraries that would otherwise spread. An empty set: nobody.
ONLY_IMPORTERS = {
    "accelerate": {"device", "tracking", "training"},
    "bitsandbytes": {"models", "training"},
    "click": set[str](),
    "diffusers": {"models", "tiny", "training"},
    "jinja2": {"evaluation"},
    "kornia": {"rewards"},
    "matplotlib": {"evaluation"},
    "open_clip": {"rewards", "tiny"},
    "peft": {"lora"},
    "plotly": {"evaluation"},
    "prodigyopt": {"training"},
    "rich": {"console"},
    "transformers": {"models", "rewards", "tiny"},
    "typer": {"cli", "commands"},
    "mlflow": {"tracking"},
    "swanlab": {"tracking"},
    "trackio": {"tracking"},
    "wandb": {"tracking"},
    "yaml": {"parsing"},
}

# All that these layers may import from outside the standard library.
THIRD_PARTY = {"root": set[str](), "errors": set[str](), "story": {"torch"}}
NO_TORCH = {"root", "errors", "outside", "config", "console", "cli", "main"}

# Words that only models/ and the reader and writer of LoRA files know (and who trained tiny).
FAMILY_WORDS = re.compile(r"StableDiffusion|\b[Uu]net\b|UNet|U-Net|\w+Pipeline\b|Transformer2D")
KNOWS_FAMILIES = (
    "alignprop_cli/models/",
    "alignprop_cli/tiny/make/",
    "alignprop_cli/lora/files.py",
    "alignprop_cli/lora/formats.py",
    "alignprop_cli/lora/modelspec.py",
    "alignprop_cli/lora/names.py",
)

MAY_CATCH_EVERYTHING = {
    "alignprop_cli/cli.py",
    "alignprop_cli/rewards/user.py",
    "alignprop_cli/tracking/child.py",
}
MAY_PRINT = ("alignprop_cli/console.py", "alignprop_cli/tiny/make/")
ATTICS = re.compile(r"(^|_)(utils?|helpers?|common|misc)$")
MAX_HELP_SECONDS = 0.6

# Calls that run or load code, or read a format that can. docs/security.md says of each place why it
# is safe; a new one is reviewed and written there first.
MAY_LOAD_CODE = {
    "import_module": {
        "alignprop_cli/evaluation/compare.py",
        "alignprop_cli/models/rows.py",
        "alignprop_cli/prompts.py",
        "alignprop_cli/rewards/registry.py",
        "alignprop_cli/scoring/rows.py",
        "alignprop_cli/tracking/child.py",
    },
    "spec_from_file_location": {"alignprop_cli/rewards/registry.py"},
    **{key: set[str]() for key in ("eval", "exec", "compile", "__import__", "system", "popen")},
}
MAY_IMPORT_UNSAFE = {
    "ctypes": {
        "alignprop_cli/device.py",
        "alignprop_cli/scoring/scorer.py",
        "alignprop_cli/storage.py",
    },
    # The class of its error alone.
    "pickle": {"alignprop_cli/hub.py"},
    "subprocess": {"alignprop_cli/tracking/follow.py"},
    **{key: set[str]() for key in ("marshal", "shelve", "code", "pty")},
}

# Lines. The step and the chain are read top to bottom on one page.
MAX_MODULE_LINES = 400
MAX_LINES = {"alignprop_cli/commands/": 150, "alignprop_cli/training/trainer.py": 200}
MAX_FUNCTION_LINES = 60
MAY_BE_LONG = {
    ("alignprop_cli/training/trainer.py", "step"),
    ("alignprop_cli/sampling.py", "backprop"),
    # A line for every option, and again where it is passed on.
    *(
        (f"alignprop_cli/commands/{folder}{name}.py", name)
        for folder in ("", "bodies/")
        for name in ("train", "evaluate", "soup", "score")
    ),
    *(("alignprop_cli/api/functions.py", n) for n in ("train", "evaluate", "soup", "score")),
}
MIN_COMMENT_SHARE = 0.06
PRAGMAS = re.compile(r"#\s*(type:|noqa|pyright:|fmt:|ruff:)")


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def dotted(self) -> str:
        """Its name in an import statement."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def home(self) -> str:
        """The top-level module or folder it belongs to: `lora`, `models`."""
        return self.path.relative_to(PACKAGE).with_suffix("").parts[0]

    @property
    def layer(self) -> str:
        return LAYER[self.home]

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    def walk(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        """Yield its nodes of some kinds."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, dotted name) of every import, in functions and for type checkers too."""
        for node in self.walk(ast.Import, ast.ImportFrom):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: write imports in full"
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)

    def own_imports(self) -> Iterator[tuple[int, Module]]:
        """Yield (line, module) for what it imports of the package, but for `__version__`."""
        for line, dotted in self.imports():
            parts = dotted.split(".")
            if parts[0] == "alignprop_cli" and parts[1:] != ["__version__"]:
                # The last part may be a name inside the module.
                found = BY_NAME.get(dotted) or BY_NAME.get(".".join(parts[:-1]))
                assert found is not None, f"{self.name}:{line}: there is no module {dotted}"
                yield line, found

    def third_party(self) -> Iterator[tuple[int, str]]:
        """Yield (line, library) for what it imports from outside the package and Python."""
        for line, dotted in self.imports():
            top = dotted.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "alignprop_cli":
                yield line, top


MODULES = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
BY_NAME = {module.dotted: module for module in MODULES}


def nobody(offenders: Iterable[str]) -> None:
    """Fail with all offenders, one a line."""
    found = list(offenders)
    assert not found, "\n" + "\n".join(found)


def test_every_module_has_a_layer():
    assert {"alignprop_cli/__init__.py", "alignprop_cli/cli.py"} <= {m.name for m in MODULES}
    nobody(
        f"{module.name}: place '{module.home}' in LAYER above"
        for module in MODULES
        if module.home not in LAYER
    )


def test_imports_within_the_package_point_downwards():
    nobody(
        f"{module.name}:{line}: {module.layer} imports {other.name} ({other.layer})"
        for module in MODULES
        for line, other in module.own_imports()
        if other.layer not in {module.layer, *MAY_IMPORT[module.layer]}
    )


def test_no_imports_go_in_a_circle():
    graph = {m.dotted: {other.dotted for _, other in m.own_imports()} for m in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_scoring_and_evaluating_need_no_training():
    reached: set[str] = set()
    waiting = list(WITHOUT_TRAINING)
    while waiting:
        dotted = waiting.pop()
        if dotted not in reached:
            reached.add(dotted)
            waiting += [other.dotted for _, other in BY_NAME[dotted].own_imports()]
    nobody(sorted(name for name in reached if BY_NAME[name].layer == "training"))


def test_each_library_is_imported_only_at_home():
    nobody(
        f"{module.name}:{line}: imports {library}"
        for module in MODULES
        for line, library in module.third_party()
        if module.home not in ONLY_IMPORTERS.get(library, {module.home})
        or library not in THIRD_PARTY.get(module.layer, {library})
        or (module.layer in NO_TORCH and library.startswith("torch"))
    )


def test_only_models_and_lora_files_know_a_family():
    nobody(
        f"{module.name}:{number}: {found[0]}"
        for module in MODULES
        if not module.name.startswith(KNOWS_FAMILIES)
        for number, line in enumerate(module.text.splitlines(), start=1)
        if (found := FAMILY_WORDS.search(line))
    )


def test_modules_are_named_for_a_concept():
    nobody(
        f"{module.name}: name it after what it holds"
        for module in MODULES
        for part in module.path.relative_to(PACKAGE).with_suffix("").parts
        if ATTICS.search(part)
    )


def test_modules_are_small():
    def most(name: str) -> int:
        return next(
            (n for start, n in MAX_LINES.items() if name.startswith(start)), MAX_MODULE_LINES
        )

    nobody(
        f"{module.name}: {lines} lines, at most {most(module.name)}; split it by concept"
        for module in MODULES
        if (lines := module.text.count("\n")) > most(module.name)
    )


def test_functions_are_short():
    nobody(
        f"{module.name}:{node.lineno}: {node.name} has {length} lines"
        for module in MODULES
        for node in module.walk(ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
        and (module.name, node.name) not in MAY_BE_LONG
    )


def test_comments_say_why_often_enough():
    """Comments, not docstrings, on at least 6 % of the lines that are not blank."""
    comments = lines = 0
    for module in MODULES:
        lines += sum(1 for line in module.text.splitlines() if line.strip())
        tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
        comments += sum(
            1 for t in tokens if t.type == tokenize.COMMENT and not PRAGMAS.match(t.string)
        )
    share = comments / lines
    assert share >= MIN_COMMENT_SHARE, f"{comments} comments on {lines} lines: {share:.1%}"


def test_only_the_console_prints():
    nobody(
        f"{module.name}:{node.lineno}: print()"
        for module in MODULES
        if not module.name.startswith(MAY_PRINT)
        for node in module.walk(ast.Call)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    )


def test_only_three_places_catch_everything():
    """The last resort, which hides the traceback, and the places that run code of others."""
    broad = [
        (module.name, node.lineno)
        for module in MODULES
        for node in module.walk(ast.ExceptHandler)
        if isinstance(node, ast.ExceptHandler) and _swallows_everything(node)
    ]
    allowed = {name: broad.index((name, line)) for name, line in reversed(broad)}
    nobody(
        f"{name}:{line}: broad except"
        for index, (name, line) in enumerate(broad)
        if name not in MAY_CATCH_EVERYTHING or index != allowed[name]
    )


def test_code_is_loaded_in_known_places_alone():
    nobody(
        f"{module.name}:{node.lineno}: {name}()"
        for module in MODULES
        for node in module.walk(ast.Call)
        if isinstance(node, ast.Call)
        for name in [_called(node)]
        # `model.eval()` and `re.compile()` are methods; the built-in functions are names.
        if name in MAY_LOAD_CODE
        and (isinstance(node.func, ast.Name) or name not in {"eval", "compile"})
        and module.name not in MAY_LOAD_CODE[name]
    )
    nobody(
        f"{module.name}:{line}: {name}"
        for module in MODULES
        for line, dotted in module.imports()
        for name in [dotted.partition(".")[0]]
        if name in MAY_IMPORT_UNSAFE and module.name not in MAY_IMPORT_UNSAFE[name]
    )


def test_pickles_are_read_as_plain_weights():
    loads = [
        (module.name, node)
        for module in MODULES
        for node in module.walk(ast.Call)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(loads) >= 4
    nobody(
        f"{name}:{node.lineno}: torch.load without weights_only=True"
        for name, node in loads
        if "weights_only=True" not in [ast.unparse(keyword) for keyword in node.keywords]
    )
    nobody(
        f"{module.name}: names trust_remote_code, which runs code from the hub"
        for module in MODULES
        if "trust_remote_code" in module.text
    )


def _called(node: ast.Call) -> str:
    """Return the last name of what is called."""
    return ast.unparse(node.func).rpartition(".")[2]


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
        "heavy = {'torch', 'diffusers', 'peft', 'transformers', 'accelerate', 'scipy', 'numpy',\n"
        "         'plotly'}\n"
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
