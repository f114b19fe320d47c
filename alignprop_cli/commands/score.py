"""`alignprop score`: measure images from files."""

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

PathsArgument = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="images, folders, patterns; - reads such names"),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", help="prompt of all images")]
PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", help=".jsonl or .csv with file_name and prompt, text or caption"),
]
FormatOption = Annotated[Format | None, typer.Option("--format", help="of the rows; default table")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="measure only what --output does not have yet")
]
TopOption = Annotated[
    int | None, typer.Option("--top", min=1, help="list only the best, by the first reward")
]
GalleryOption = Annotated[
    bool, typer.Option("--gallery", help="write a page of thumbnails next to --output")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="fail at the end if any image was skipped")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=0, help="processes that decode; default by cores")
]


def score(
    paths: PathsArgument,
    reward: RewardOption = None,
    sets: SetOption = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    output_format: FormatOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    top: TopOption = None,
    gallery: GalleryOption = False,
    strict: StrictOption = False,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure images with rewards; without --reward, how well they match their prompts.

    The prompt of an image is taken from the first of these that has one: --prompt, --prompts,
    metadata.jsonl or metadata.csv in its folder or above, a .txt or .caption file next to it, what
    this program, A1111 or ComfyUI wrote into it, its place in the folders of GenEval or HPSv2.
    What cannot be read is listed and counted; the exit code is 4 if nothing could be measured.

    Examples:

      alignprop score images/ --reward clip,brightness

      alignprop score "out/**/*.png" --prompt "an animal" --format csv

      alignprop score images/ --output scores.jsonl --resume --gallery --top 20
    """
    from pathlib import Path

    from alignprop_cli.commands import settings
    from alignprop_cli.console import Console
    from alignprop_cli.device import make_accelerator
    from alignprop_cli.errors import RunError
    from alignprop_cli.scoring import files, report, run
    from alignprop_cli.scoring.captions import PromptFinder

    console = Console(as_json=as_json, quiet=quiet)
    # 1. Options that contradict each other, and the images: quick, and most mistakes are here.
    target = Path(output).expanduser() if output else None
    page = _page(target, overwrite=overwrite or resume) if gallery else None
    chosen = _format(
        output_format, target, as_json=as_json, overwrite=overwrite, resume=resume, top=top
    )
    config = settings.for_scoring(sets, reward)
    finder = PromptFinder(prompt, Path(prompts).expanduser() if prompts else None)
    found = files.find_images(files.expand_names(paths))
    # 2. The rewards, which take seconds to load; then the images, in parallel.
    measures = run.build_measures(config.reward, config.loss, make_accelerator().device)
    wanted = run.Wanted(chosen, target, resume, top, page, as_json and target is None, workers)
    tally = run.run(found, measures, finder, wanted, console)
    report.finish(console, tally)
    if strict and tally.skipped:
        raise RunError(f"--strict: {len(tally.skipped)} of {len(found)} images were skipped")


def _page(target: Path | None, *, overwrite: bool) -> Path:
    """Return the file of the gallery: that of the rows with the ending .html."""
    from pathlib import Path

    from alignprop_cli.errors import ConfigError

    page = Path("gallery.html") if target is None else target.with_suffix(".html")
    if page == target:
        raise ConfigError(f"--gallery: its page would be {page}, where the rows go")
    check_output_file(page, overwrite=overwrite)
    return page


def _format(
    wanted: Format | None,
    target: Path | None,
    *,
    as_json: bool,
    overwrite: bool,
    resume: bool,
    top: int | None,
) -> Format:
    """Return the format of the rows, or refuse options that contradict each other."""
    from alignprop_cli.errors import ConfigError
    from alignprop_cli.scoring import rows

    # With --output all rows go there, and the table of the best is only shown.
    if target is None and top is not None and wanted not in (None, "table"):
        raise ConfigError(f"--top is a table, and --format {wanted} wants all rows")
    if target is not None:
        if resume and overwrite:
            raise ConfigError("--resume keeps what is there and --overwrite replaces it: give one")
        check_output_file(target, overwrite=overwrite or resume)
        make_parent(target)
        # Rows of a run that was cut short would be lost to somebody who forgot --resume.
        if not overwrite and not resume:
            rows.refuse_partial(target)
    return rows.choose_format(wanted, target, as_json=as_json, resume=resume)
