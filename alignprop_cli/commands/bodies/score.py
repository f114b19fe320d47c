"""What `alignprop score` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignprop_cli.commands import measuring
from alignprop_cli.console import Console
from alignprop_cli.errors import RunError
from alignprop_cli.paths import user_path

if TYPE_CHECKING:
    from alignprop_cli.scoring.rows import Format


def score(
    console: Console,
    paths: Sequence[str],
    *,
    reward: Sequence[str] | None = None,
    sets: Sequence[str] | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    output_format: Format | None = None,
    output: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    top: int | None = None,
    gallery: bool = False,
    strict: bool = False,
    workers: int | None = None,
) -> None:
    """Measure image files, and give the console the result.

    Args:
        console: For people and for the result.
        paths: Images, folders, patterns.
        reward: Names.
        sets: Texts of `--set`.
        prompt: Of all images.
        prompts: File of prompts.
        output_format: Of the rows.
        output: File of the rows.
        overwrite: Whether files may be replaced.
        resume: Whether rows that are there are kept.
        top: How many of the best are listed.
        gallery: Whether a page of thumbnails is written.
        strict: Whether a skipped image is an error.
        workers: Processes that decode.

    Raises:
        AlignPropError: Whatever is wrong with the options, the files or the rewards.
    """
    # Imports torch, so only now.
    from alignprop_cli.device import make_accelerator
    from alignprop_cli.scoring import files, report, run
    from alignprop_cli.scoring.captions import PromptFinder

    # 1. Options that contradict each other, and the images: quick, and most mistakes are here.
    with measuring.destination(
        output,
        output_format,
        gallery=gallery,
        top=top,
        as_json=console.as_json,
        overwrite=overwrite,
        resume=resume,
        workers=workers,
    ) as wanted:
        finder = PromptFinder(prompt, user_path(prompts, "--prompts") if prompts else None)
        found = files.find_images(files.expand_names(paths))
        config = measuring.rewards(sets, reward, found)
        # 2. The rewards, which take seconds to load; then the images, in parallel.
        measures = run.build_measures(config.reward, config.loss, make_accelerator().device)
        tally = run.run(found, measures, finder, wanted, console)
        report.finish(console, tally)
    # Last: what was measured is written and shown in any case.
    if strict and tally.skipped:
        raise RunError(f"--strict: {len(tally.skipped)} of {len(found)} images were skipped")
