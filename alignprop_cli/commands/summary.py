"""What a run leaves when it is done: the before/after sheet, summary.json and the last table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from alignprop_cli import checkpoint, evaluator, report
from alignprop_cli.commands import settings
from alignprop_cli.commands.session import Session
from alignprop_cli.console import table
from alignprop_cli.evaluator import Drawn, Paired
from alignprop_cli.machine import peak_gib


def finish(session: Session, base: Drawn, tuned: Drawn, seconds: float) -> None:
    """Write the before/after sheet and the summary, and print where everything is."""
    run, config = session.run, session.config
    peak = peak_gib(session.model.device)
    paired = {
        name: evaluator.compare(base.pictures, base.rewards[name], tuned.rewards[name])
        for name in session.mixture.figures
    }
    checks = {
        part: evaluator.compare(base.pictures, right["base"], right["tuned"])
        for part, right in evaluator.checks({"base": base, "tuned": tuned}).items()
    }
    cells = [
        report.Cell(picture.prompt, (before, after), (base.caption(i), tuned.caption(i)))
        for i, (picture, before, after) in enumerate(
            zip(base.pictures, base.images, tuned.images, strict=True)
        )
    ]
    sheet = run / "before_after.png"
    report.contact_sheet(cells, sheet, titles=("base", "tuned"))
    last = checkpoint.latest(run)
    next_command = settings.next_command(f"alignprop evaluate {run}", config)
    values: dict[str, Any] = {
        "run": str(run.resolve()),
        "adapter": str((last / checkpoint.LORA_FILE).resolve()),
        "sheet": str(sheet.resolve()),
        "steps": session.trainer.step_number,
        "images_seen": session.trainer.images_seen,
        "seconds": seconds,
        "peak_memory_gib": peak,
        "held_out": {
            "prompts": config.eval.prompts,
            "images": len(base.pictures),
            "rewards": {name: asdict(result) for name, result in paired.items()},
            "checker": {part: asdict(result) for part, result in checks.items()},
        },
        "next": next_command,
    }
    checkpoint.write_text(run / "summary.json", json.dumps(values, indent=2) + "\n")
    console = session.console
    title = f"{len(base.pictures)} held-out pictures ({config.eval.prompts}), base and tuned"
    console.result(
        "alignprop.train/2",
        values,
        [
            table(
                title,
                ("", "base", "tuned", "difference", "95 % interval"),
                [
                    *map(_reward_row, paired, paired.values()),
                    *map(_check_row, checks, checks.values()),
                ],
            ),
            "",
            f"adapter  {last / checkpoint.LORA_FILE}",
            f"pictures {sheet}",
            f"{session.trainer.step_number} steps, {session.trainer.images_seen} images, "
            f"{seconds:.0f} s, at most {peak:.2f} GiB",
            f"next: {next_command}",
        ],
    )


def _reward_row(name: str, result: Paired) -> tuple[str, ...]:
    return (
        name,
        f"{result.base:.4f}",
        f"{result.tuned:.4f}",
        f"{result.difference:+.4f}",
        f"{result.low:+.4f} to {result.high:+.4f}",
    )


def _check_row(part: str, result: Paired) -> tuple[str, ...]:
    return (
        f"{part} right",
        f"{result.base:.0%}",
        f"{result.tuned:.0%}",
        f"{result.difference:+.1%}",
        f"{result.low:+.1%} to {result.high:+.1%}",
    )
