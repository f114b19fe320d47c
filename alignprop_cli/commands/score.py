"""`alignprop score`: measure pictures from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alignprop_cli.commands import (
    DebugOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RewardOption,
    SetOption,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from alignprop_cli.config import Config
    from alignprop_cli.console import Console
    from alignprop_cli.scorer import Found, PromptFinder, Scored, Skipped

_BATCH_SIZE = 16

Format = Literal["table", "csv", "jsonl"]


def score(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="pictures, or folders of them")
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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure pictures with rewards; without --reward it is their agreement with their prompt.

    The prompt of a picture is, in this order, that of --prompt, --prompts, metadata.jsonl or
    metadata.csv in its folder or above, a .txt file beside it, or the text `prompt` inside a PNG.
    What cannot be read is listed and counted; the exit code is 4 when nothing could be measured.

    Examples:

      alignprop score pictures/ --reward clip,brightness

      alignprop score cat.png dog.png --prompt "an animal" --format csv

      alignprop score pictures/ --output scores.jsonl
    """
    from pathlib import Path

    from alignprop_cli.commands import settings
    from alignprop_cli.console import Console
    from alignprop_cli.scorer import PromptFinder, find_pictures

    console = Console(as_json=as_json, quiet=quiet)
    target = Path(output).expanduser() if output else None
    chosen = _format(output_format, target, as_json=as_json, overwrite=overwrite)
    settings.only_rewards(sets or [])
    config = settings.build(assignments=sets or [], rewards=settings.reward_names(reward))
    finder = PromptFinder(prompt, Path(prompts).expanduser() if prompts else None)
    found = find_pictures(paths)
    _run(console, config, found, finder, chosen, target)


def _format(
    wanted: Format | None, target: Path | None, *, as_json: bool, overwrite: bool
) -> Format:
    """Return the format of the rows, or refuse what cannot be written."""
    from alignprop_cli.commands.outputs import check_output_file
    from alignprop_cli.errors import ConfigError

    if target is None:
        if as_json and wanted not in (None, "table"):
            raise ConfigError(
                f"--json and --format {wanted} both write to standard output",
                hint="write the rows to a file with --output",
            )
        return wanted or "table"
    check_output_file(target, overwrite=overwrite)
    by_suffix: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl"}
    chosen = wanted or by_suffix.get(target.suffix.lower())
    if chosen is None or chosen == "table":
        raise ConfigError(
            f"--output: {target}: rows are written as csv or jsonl",
            hint="end the name in .csv or .jsonl, or give --format csv or jsonl",
        )
    return chosen


def _run(
    console: Console,
    config: Config,
    found: list[Found],
    finder: PromptFinder,
    chosen: Format,
    target: Path | None,
) -> None:
    """Measure everything, writing rows as they come, and print the summary."""
    from alignprop_cli import scorer
    from alignprop_cli.errors import RunError
    from alignprop_cli.rewards.composite import build_mixture
    from alignprop_cli.trainer import make_accelerator

    if not found:
        raise RunError(
            "nothing was measured: no pictures were found",
            hint=f"folders are searched for {', '.join(scorer.SUFFIXES)}",
        )
    device = make_accelerator().device
    mixture = build_mixture(config.reward, config.loss, device)
    values: dict[str, list[float]] = {name: [] for name in mixture.figures}
    shown: list[Scored] = []
    skipped: list[Skipped] = []
    asking = [n for n, own in config.reward.items() if scorer.needs_prompt(n, own.options)]
    results = scorer.score(
        found, mixture, finder, asking=asking, device=device, batch_size=_BATCH_SIZE
    )
    with _rows(chosen, target, mixture.figures) as write, console.bar(len(found), "scoring") as bar:
        for result in results:
            bar.advance()
            if isinstance(result, scorer.Skipped):
                skipped.append(result)
                console.warn(f"skipped {result.path}: {result.reason}")
                continue
            for name, value in result.rewards.items():
                values[name].append(value)
            if target is None and chosen == "table":
                shown.append(result)
            write(result)
        if len(skipped) == len(found):
            raise RunError(f"nothing was measured: all {len(found)} pictures were skipped")
    _report(console, values, shown, skipped, chosen, target)


@contextmanager
def _rows(
    chosen: Format, target: Path | None, names: tuple[str, ...]
) -> Iterator[Callable[[Scored], None]]:
    """Give a function that writes one row, to the file or to standard output.

    The file appears when all rows are in it.
    """
    import csv
    import io
    import json
    import os

    columns = ("file", *names, "prompt", "prompt_source")

    def line(cells: Mapping[str, Any] | None) -> str:
        if chosen == "jsonl":
            return json.dumps(cells, ensure_ascii=False) + "\n" if cells else ""
        text = io.StringIO()
        row = columns if cells is None else [cells[column] for column in columns]
        csv.writer(text, lineterminator="\n").writerow(row)
        return text.getvalue()

    if target is None:
        if chosen == "table":
            yield lambda result: None
            return
        typer.echo(line(None), nl=False)
        yield lambda result: typer.echo(line(_row(result)), nl=False)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(line(None))

            def write(result: Scored) -> None:
                file.write(line(_row(result)))

            yield write
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _row(result: Scored) -> dict[str, Any]:
    return {
        "file": str(result.path),
        **result.rewards,
        "prompt": result.prompt,
        "prompt_source": result.prompt_source,
    }


def _report(
    console: Console,
    values: Mapping[str, list[float]],
    shown: list[Scored],
    skipped: list[Skipped],
    chosen: Format,
    target: Path | None,
) -> None:
    """Print the rows that were kept for people, and the summary."""
    from statistics import fmean, pstdev

    from alignprop_cli.console import table

    summary = {
        name: {"mean": fmean(v), "std": pstdev(v), "min": min(v), "max": max(v)}
        for name, v in values.items()
    }
    count = len(next(iter(values.values())))
    where = f", rows in {target}" if target else ""
    said = f"{count} pictures measured, {len(skipped)} skipped{where}"
    if target is None and chosen != "table":
        # Standard output belongs to the rows.
        for name, s in summary.items():
            console.note(f"{name}: mean {s['mean']:.4f}, std {s['std']:.4f}")
        console.note(said)
        return
    parts: list[Any] = [*_listing(shown, tuple(summary)), ""] if shown else []
    figures = [(name, *(f"{v:.4f}" for v in s.values())) for name, s in summary.items()]
    parts += [table("Rewards", ("", "mean", "std", "min", "max"), figures), said]
    result: dict[str, Any] = {
        "scored": count,
        "skipped": [{"file": str(s.path), "reason": s.reason} for s in skipped],
        "rewards": summary,
        "output": str(target.resolve()) if target else None,
    }
    if target is None:
        result["pictures"] = [_row(r) for r in shown]
    console.result("alignprop.score/1", result, parts)


def _listing(shown: list[Scored], names: tuple[str, ...]) -> list[Any]:
    """Return the rows as a table, with files named from the folder that holds them all."""
    from os.path import commonpath
    from pathlib import Path

    from alignprop_cli.console import table

    folder = Path(commonpath([result.path.absolute().parent for result in shown]))
    rows = [
        (
            result.path.absolute().relative_to(folder).as_posix(),
            *(f"{result.rewards[name]:.4f}" for name in names),
            result.prompt_source,
        )
        for result in shown
    ]
    return [table(f"Pictures in {folder}", ("file", *names, "prompt from"), rows)]
