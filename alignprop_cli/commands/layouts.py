"""`--layout`: the option, and what it says about prompts and images where nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from alignprop_cli.evaluation.scorers import SCORERS, Layout

LayoutOption = Annotated[
    Layout | None,
    typer.Option(
        "--layout",
        help="write the folders of this benchmark's own scorer too, with all its prompts",
    ),
]


def with_layout(
    layout: Layout | None, flags: Mapping[str, Any], sets: Sequence[str] | None
) -> dict[str, Any]:
    """Return the flags with the benchmark's prompts, all of them, with as many images as published.

    Args:
        layout: Value of `--layout`; None changes nothing.
        flags: Dotted key to value of the named flags; None values were not given.
        sets: Texts of `--set`, which win like flags.

    Raises:
        ConfigError, AssetError: As `prompts.load_entries`, for the set that is meant.
    """
    if layout is None:
        return dict(flags)
    # Only now, so that --help is quick.
    from alignprop_cli.commands.typed import typed_values

    # What a run, a preset or a file has is for looking at it while it trains.
    given = {"assignments": sets or (), "flags": flags}
    typed: dict[str, Any] = dict(typed_values(given).get("eval") or {})
    scorer = SCORERS[layout]
    prompts = typed.get("prompts", scorer.prompts)
    each = typed.get("images_per_prompt", scorer.images_per_prompt)
    found = {"eval.prompts": prompts, "eval.images_per_prompt": each}
    # What is no name and no number is refused with the whole configuration.
    if "images" not in typed and isinstance(prompts, str) and isinstance(each, int):
        from alignprop_cli.prompts import load_entries

        found["eval.images"] = len(load_entries(prompts)) * max(each, 1)
    return {**flags, **{key: value for key, value in found.items() if flags.get(key) is None}}
