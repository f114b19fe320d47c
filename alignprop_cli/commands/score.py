"""`alignprop score`: measure pictures from files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_cli.commands.options import (
    DebugOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RewardOption,
    SetOption,
    check_output_file,
    make_parent,
)
from alignprop_cli.scoring.rows import Format

if TYPE_CHECKING:
    from pathlib import Path


def score(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="pictures, folders, patterns; - reads such names"),
    ],
    reward: RewardOption = None,
    sets: SetOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="prompt of all pictures")] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help=".jsonl or .csv with file_name and prompt, text or caption"),
    ] = None,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="of the rows; default table")
    ] = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="measure only what --output does not have yet")
    ] = False,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="list only the best, by the first reward")
    ] = None,
    gallery: Annotated[
        bool, typer.Option("--gallery", help="write a page of thumbnails beside --output")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="fail at the end if any picture was skipped")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="processes that decode; default by cores")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure pictures with rewards; without --reward it is their agreement with their prompt.

    The prompt of a picture is, in this order, that of --prompt, --prompts, metadata.jsonl or
    metadata.csv in its folder or above, a .txt or .caption file beside it, what this program,
    A1111 or ComfyUI wrote into it, or what its place among the folders of GenEval or HPSv2 says.
    What cannot be read is listed and counted; the exit code is 4 when nothing could be measured.

    Examples:

      alignprop score pictures/ --reward clip,brightness

      alignprop score "out/**/*.png" --prompt "an animal" --format csv

      alignprop score pictures/ --output scores.jsonl --resume --gallery --top 20
    """
    from pathlib import Path

    from alignprop_cli.commands import settings
    from alignprop_cli.console import Console
    from alignprop_cli.errors import ConfigError
    from alignprop_cli.scoring import run as scoring
    from alignprop_cli.scoring.captions import PromptFinder
    from alignprop_cli.scoring.files import find_pictures

    console = Console(as_json=as_json, quiet=quiet)
    target = Path(output).expanduser() if output else None
    if top is not None and target is None and output_format not in (None, "table"):
        raise ConfigError(f"--top is a table, and --format {output_format} wants all rows")
    page = _page(target, overwrite=overwrite or resume) if gallery else None
    chosen = _format(output_format, target, as_json=as_json, overwrite=overwrite, resume=resume)
    config = settings.for_scoring(sets, reward)
    finder = PromptFinder(prompt, Path(prompts).expanduser() if prompts else None)
    found = find_pictures(_names(paths))
    scoring.run(
        config,
        console,
        found,
        finder,
        scoring.Wanted(chosen, target, resume, top, page, strict, workers),
    )


def _names(paths: list[str]) -> list[str]:
    """Return the names to look for, with those on standard input in the place of a dash."""
    import os
    import sys

    found: list[str] = []
    for path in paths:
        if path == "-":
            # As bytes: a file's name need not be UTF-8.
            lines = sys.stdin.buffer.read().split(b"\n")
            found += [os.fsdecode(line) for line in lines if line]
        else:
            found.append(path)
    return found


def _page(target: Path | None, *, overwrite: bool) -> Path:
    """Return where the gallery goes."""
    from pathlib import Path

    from alignprop_cli.errors import ConfigError

    page = Path("gallery.html") if target is None else target.with_suffix(".html")
    if page == target:
        raise ConfigError(f"--gallery: its page would be {page}, where the rows go")
    check_output_file(page, overwrite=overwrite)
    return page


def _format(
    wanted: Format | None, target: Path | None, *, as_json: bool, overwrite: bool, resume: bool
) -> Format:
    """Return the format of the rows, or refuse what cannot be written."""
    from importlib.util import find_spec

    from alignprop_cli.errors import ConfigError
    from alignprop_cli.scoring import rows

    if target is None:
        if as_json and wanted not in (None, "table"):
            raise ConfigError(
                f"--json and --format {wanted} both write to standard output",
                hint="write the rows to a file with --output",
            )
        if resume or wanted == "parquet":
            which = "--resume" if resume else "--format parquet"
            raise ConfigError(f"{which} needs a file: give --output FILE")
        return wanted or "table"
    if resume and overwrite:
        raise ConfigError("--resume keeps what is there and --overwrite replaces it: give one")
    check_output_file(target, overwrite=overwrite or resume)
    make_parent(target)
    partial = rows.partial_of(target)
    if partial.exists() and not overwrite and not resume:
        raise ConfigError(
            f"--output: {partial} has the rows of a run that was interrupted",
            hint="go on with it by --resume, or begin anew with --overwrite",
        )
    by_suffix: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
    chosen = wanted or by_suffix.get(target.suffix.lower())
    if chosen is None or chosen == "table":
        raise ConfigError(
            f"--output: {target}: rows are written as csv, jsonl or parquet",
            hint="end the name in .csv, .jsonl or .parquet, or give --format",
        )
    if chosen == "parquet" and find_spec("pyarrow") is None:
        raise ConfigError(
            "--format parquet needs pyarrow, which is not installed",
            hint="pip install 'alignprop[parquet]'",
        )
    return chosen
