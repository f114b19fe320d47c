"""Every command of README and docs/ runs: shortened here, in full length when marked slow."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from alignprop_cli import __version__
from alignprop_cli.cli import main
from alignprop_cli.models import families

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "alignprop_cli" / "tiny" / "README.md",
]
# What makes a command short, by command; none changes what is exercised.
SHORT = {
    "train": [
        "--steps=2",
        "--set=sample.num_inference_steps=4",  # `tiny_unguided` goes through all of its four
        "--set=gradient.k_max=2",
        "--set=train.batch_size=2",
        "--set=train.micro_batch=2",
        "--set=eval.images=2",
        "--set=eval.sample_images=2",
    ],
    "evaluate": ["--images=2"],
    "soup": [],
    "score": [],
}
# Of soup only what evaluates draws images.
EVALUATES = ("--sweep", "--evaluate")
# Plans of cards that are not here leave nothing behind and take long: once each is enough.
PLANNED: set[str] = set()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Return what a page types: alignprop's commands, and the examples that it runs."""
    lines = [shlex.split(line) for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for words in lines if words[:1] == ["alignprop"] or is_example(words)]


def is_example(words: list[str]) -> bool:
    return words[:1] == ["python"] and len(words) == 2 and words[1].endswith(".py")


# Of so many commands, or such long ones, that they take longest; what they do has tests.
MANY = ("commands.md", "contributing.md", "memory.md", "rewards.md", "README.md")
RUN = [page for page in PAGES if commands(page)]


def write_files_of(page: Path, folder: Path) -> None:
    for language in ("yaml", "python"):
        for block in blocks(page, language):
            name = re.match(r"# (\S+\.(?:yaml|py))\n", block)
            if name:
                (folder / name[1]).write_text(block, encoding="utf-8")


def shortened(arguments: list[str]) -> list[str]:
    """Return a command with what makes it short instead of what makes it long."""
    if {"--dry-run", "--list-presets", "--show-preset"} & {*arguments}:
        return arguments
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
    if arguments[:2] == ["train", "--resume"]:
        # The run has its own settings; two steps more than it has.
        extra = ["--steps=4"]
    if arguments[0] == "soup" and {*EVALUATES} & {*arguments}:
        extra = ["--images=2"]
    return [*kept, *extra]


def run_all(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    write_files_of(page, tmp_path)
    for words in commands(page):
        if is_example(words):
            runpy.run_path(words[1], run_name="__main__")
            continue
        if "--gpu-memory" in words:
            if shlex.join(words) in PLANNED:
                continue
            PLANNED.add(shlex.join(words))
        with pytest.raises(SystemExit) as ended:
            main([*change(words[1:]), "--quiet"])
        assert not ended.value.code, shlex.join(words)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.long if page.name in MANY else ())
        for page in RUN
    ],
)
def test_every_command_of_a_page_runs_in_this_order_in_an_empty_folder(
    page, tmp_path, monkeypatch
) -> None:
    run_all(page, tmp_path, monkeypatch, shortened)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_command_of_a_page_runs_in_full_length(page, tmp_path, monkeypatch) -> None:
    run_all(page, tmp_path, monkeypatch, lambda arguments: arguments)


def test_the_readme_shows_all_four_commands() -> None:
    shown = commands(README)
    assert len(shown) >= 8
    assert {words[1] for words in shown} == {"train", "evaluate", "soup", "score"}


def test_the_readme_is_short_and_begins_with_what_it_runs_on_and_what_was_not_tried() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    first = "\n".join(lines[:10])
    assert "Runs on" in first
    assert "Not tried" in first


def test_the_citation_is_of_this_version_and_of_the_paper_that_the_readme_cites() -> None:
    """The keys that the Citation File Format 1.2.0 requires, and what would go stale."""
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= said.keys()
    assert (said["cff-version"], said["type"]) == ("1.2.0", "software")
    assert said["version"] == __version__
    [bibtex] = blocks(README, "bibtex")
    paper = next(each for each in said["references"] if "2310.03739" in each["url"])
    names = [f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]]
    assert f"author = {{{' and '.join(names)}}}" in bibtex
    assert f"title = {{{paper['title']}}}" in bibtex
    assert f"year = {{{paper['year']}}}" in bibtex


def test_the_readme_installs_the_tests_as_the_checks_do() -> None:
    [line] = [
        line for block in blocks(README, "bash") for line in block.splitlines() if "[test]" in line
    ]
    assert line == "pip install '.[test]' && pytest"
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "run pip install --quiet '.[test]'" in checks
    assert "run pytest" in checks


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}


def test_every_image_file_and_heading_that_a_page_links_to_exists() -> None:
    missing: list[str] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file) if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                missing.append(f"{page.name}: {link}")
    assert not missing


def test_no_page_keeps_a_note_to_its_authors() -> None:
    notes = [
        f"{page.name}: {note.strip()[:60]}"
        for page in PAGES
        for note in re.findall(r"<!--(.*?)-->", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert not notes
