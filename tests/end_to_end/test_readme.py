"""Every command line of the README runs: shortened here, in full length when marked slow."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from alignprop_cli.cli import main

README = Path(__file__).parents[2] / "README.md"
# What makes a command short, by command; none changes what is exercised.
SHORT = {
    "train": [
        "--steps=2",
        "--set=sample.num_inference_steps=2",
        "--set=gradient.k_max=2",
        "--set=train.batch_size=2",
        "--set=train.micro_batch=2",
        "--set=eval.images=2",
    ],
    "evaluate": ["--images=2"],
    "soup": [],
    "score": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("alignprop ")]


def write_files_of_the_readme(folder: Path) -> None:
    for language in ("yaml", "python"):
        for block in blocks(language):
            name = re.match(r"# (\S+\.(?:yaml|py))\n", block)
            if name:
                (folder / name[1]).write_text(block, encoding="utf-8")


def shortened(arguments: list[str]) -> list[str]:
    """Return a command with what makes it short, in place of what makes it long."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--steps", "--images"):
            skip = True
        elif "gradient.k_max" not in argument:
            kept.append(argument)
        elif kept[-1] == "--set":
            kept.pop()
    extra = SHORT[arguments[0]]
    if "--resume" in arguments:
        # The run has its own settings; two steps more than it has.
        extra = ["--steps=4"]
    return [*kept, *extra]


def run_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change) -> int:
    monkeypatch.chdir(tmp_path)
    write_files_of_the_readme(tmp_path)
    for arguments in commands():
        with pytest.raises(SystemExit) as ended:
            main([*change(arguments), "--quiet"])
        assert not ended.value.code, f"alignprop {shlex.join(arguments)}"
    return len(commands())


def test_every_command_of_the_readme_runs_in_this_order(tmp_path, monkeypatch) -> None:
    assert run_all(tmp_path, monkeypatch, shortened) >= 8
    names = {arguments[0] for arguments in commands()}
    assert names == {"train", "evaluate", "soup", "score"}


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_full_length(tmp_path, monkeypatch) -> None:
    run_all(tmp_path, monkeypatch, lambda arguments: arguments)


def test_every_picture_and_file_the_readme_links_to_exists() -> None:
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
    for link in links:
        assert link in anchors if link[0] == "#" else (README.parent / link).exists(), link
