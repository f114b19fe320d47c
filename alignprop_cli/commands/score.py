"""`alignprop score`: measure images from files."""

from __future__ import annotations

from typing import Annotated

import typer

from alignprop_cli.commands.importing import large_imports
from alignprop_cli.commands.options import (
    DebugOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RewardOption,
    SetOption,
)
from alignprop_cli.scoring.rows import Format

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
    """Measure images with rewards; those of the embedded model need no --reward.

    The prompt of an image is taken from the first of these that has one: --prompt, --prompts,
    metadata.jsonl or metadata.csv in its folder or above, a .txt or .caption file next to it, what
    this program, A1111 or ComfyUI wrote into it, its place in the folders of GenEval or HPSv2.
    What cannot be read is listed and counted; the exit code is 4 if nothing could be measured.

    Examples:

      alignprop score images/ --reward brightness,contrast

      alignprop score "out/**/*.png" --reward hps --prompt "a cat" --output scores.csv --resume
    """
    # Only now, so that --help is quick.
    with large_imports():
        from alignprop_cli.commands.bodies import score as body
    from alignprop_cli.console import Console

    body.score(
        Console(as_json=as_json, quiet=quiet),
        paths,
        reward=reward,
        sets=sets,
        prompt=prompt,
        prompts=prompts,
        output_format=output_format,
        output=output,
        overwrite=overwrite,
        resume=resume,
        top=top,
        gallery=gallery,
        strict=strict,
        workers=workers,
    )
