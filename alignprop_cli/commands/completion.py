"""What the shell completes: presets, rewards, trackers, runs and their checkpoints.

The shell starts the program at every press of the key, so nothing heavy is imported here. After
`alignprop --install-completion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import typer


def preset_names(incomplete: str) -> list[tuple[str, str]]:
    """Return the shipped presets, each with what it does."""
    from alignprop_cli.config import presets

    found = [name for name in presets.names() if name.startswith(incomplete)]
    return [(name, presets.summary(name)) for name in found]


def rewards(incomplete: str) -> list[str]:
    """Return the shipped rewards; after a comma the next one."""
    from alignprop_cli.rewards.catalogue import SHIPPED

    return _after_comma(incomplete, SHIPPED)


def trackers(incomplete: str) -> list[str]:
    """Return the trackers; after a comma the next one."""
    from alignprop_cli.config.tracking import Tracker

    return _after_comma(incomplete, get_args(Tracker))


def runs(incomplete: str) -> list[str]:
    """Return the runs below the folder that is typed so far, and the folders on the way to more."""
    parent = incomplete.rpartition("/")[0]
    folders = sorted(Path(f"{parent}/" if "/" in incomplete else ".").glob("*/"))
    # A slash says that it is not the end yet, and the shell goes on from there.
    named = [f"{folder}" if _is_run(folder) else f"{folder}/" for folder in folders]
    return [name for name in named if name.startswith(incomplete) and "/." not in f"/{name}"]


def targets(incomplete: str) -> list[str]:
    """Return runs, and the base model."""
    return [*(["base"] if "base".startswith(incomplete) else []), *runs(incomplete)]


def resumable(incomplete: str) -> list[str]:
    """Return runs, and `auto`."""
    return [*(["auto"] if "auto".startswith(incomplete) else []), *runs(incomplete)]


def checkpoints(context: typer.Context, incomplete: str) -> list[str]:
    """Return `best` and the steps that every run on the command line has a checkpoint of."""
    # The line ends in an option without its value, so that arguments are not sorted in yet.
    given = context.params.get("resume") or context.params.get("targets") or context.args
    chosen = [given] if isinstance(given, str) else list(given)
    each = [_steps(Path(run) / "checkpoints") for run in chosen]
    common = set.intersection(*each) if each else set[str]()
    ordered = sorted(common, key=lambda name: (name != "best", len(name), name))
    return [name for name in ordered if name.startswith(incomplete)]


def _after_comma(incomplete: str, names: Iterable[str]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last.strip())]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()


def _steps(folder: Path) -> set[str]:
    """Return the names of the checkpoints in a folder as they are typed: best, 20, 40."""
    found = {path.name for path in folder.glob("*/")}
    steps = {str(int(n.removeprefix("step-"))) for n in found if re.fullmatch(r"step-\d{1,9}", n)}
    return steps | (found & {"best"})
