"""The real program at a shell: completion, colours, and what goes to a file."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What the installed script does, under its name, which completion asks for.
PROGRAM = "import sys; sys.argv[0] = 'alignprop'; from alignprop_cli.cli import main; main()"
# Of the foreground or the background; bold and dim are none.
COLOUR = re.compile(r"\x1b\[(\d+;)*([349][0-8]|10[0-7])(;\d+)*m")
ESCAPE = "\x1b["


def complete(line: str, cwd: Path) -> list[str]:
    """Return what bash is told to complete the line with."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_ALIGNPROP_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, one with a best checkpoint, and folders that are none."""
    for name in ("runs/one/checkpoints/step-000020", "runs/one/checkpoints/step-000100",
                 "runs/one/checkpoints/best", "runs/two/checkpoints/step-000020",
                 "runs/two/checkpoints/.step-000040-x.unfinished", "photos", ".git"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "runs" / name / "config.yaml").write_text("train: {}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("alignprop train --preset tiny_k", ["tiny_k1"]),
        ("alignprop train --reward clip,bri", ["clip,brightness"]),
        ("alignprop train --log-with wandb,tra", ["wandb,trackio"]),
        ("alignprop train --resume ", ["auto", "photos/", "runs/"]),
        ("alignprop train --resume runs/", ["runs/one", "runs/two"]),
        ("alignprop train --resume runs/one --checkpoint ", ["best", "20", "100"]),
        ("alignprop evaluate runs/t", ["runs/two"]),
        ("alignprop evaluate ba", ["base"]),
        ("alignprop evaluate runs/one runs/two --checkpoint ", ["20"]),
        ("alignprop soup runs/o", ["runs/one"]),
    ],
)
def test_the_shell_completes(runs, line, expected) -> None:
    if "tiny_k" in line:
        from alignprop_cli.config import presets

        expected = [name for name in presets.names() if name.startswith("tiny_k")]
        assert expected
    assert complete(line, runs) == expected


def test_completing_loads_nothing_heavy(runs) -> None:
    """At every press of the key: measured in what is imported, which no load changes."""
    code = (
        "import sys\n"
        "from alignprop_cli.commands import completion\n"
        "completion.runs(''), completion.rewards('c'), completion.preset_names('t')\n"
        "print(*{'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def run(*arguments: str, cwd: Path, terminal: bool = False, **variables: str) -> str:
    """Run the program, with both streams a pipe or a terminal; return all that it wrote."""
    names = ("NO_COLOR", "FORCE_COLOR", "TERM", "GITHUB_ACTIONS", "PY_COLORS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"TERM": "xterm-256color", **variables}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    if not terminal:
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        return done.stdout + done.stderr
    ours, its = pty.openpty()
    process = subprocess.Popen(command, env=environment, cwd=cwd, stdin=its, stdout=its, stderr=its)
    os.close(its)
    text = b""
    try:
        while part := os.read(ours, 2**16):
            text += part
    except OSError:  # Linux says so when the other end is closed
        pass
    finally:
        os.close(ours)
        process.wait()
    return text.decode()


# Help is typer's, errors are ours: each has its own way to colours.
@pytest.mark.parametrize(
    "arguments", [("train", "--help"), ("train", "--preset", "tinny")], ids=["help", "error"]
)
def test_colours_are_for_terminals_and_obey_the_environment(tmp_path, arguments) -> None:
    assert COLOUR.search(run(*arguments, cwd=tmp_path, terminal=True))
    assert not COLOUR.search(run(*arguments, cwd=tmp_path, terminal=True, NO_COLOR="1"))
    assert ESCAPE not in run(*arguments, cwd=tmp_path, terminal=True, TERM="dumb")
    assert ESCAPE not in run(*arguments, cwd=tmp_path)
    assert COLOUR.search(run(*arguments, cwd=tmp_path, FORCE_COLOR="1"))


def test_the_json_result_never_has_colours(tmp_path) -> None:
    arguments = ("train", "--list-presets", "--json")
    printed = run(*arguments, cwd=tmp_path, FORCE_COLOR="1")
    assert printed == run(*arguments, cwd=tmp_path)
    assert printed.startswith('{"schema": "alignprop.presets/1"')
