"""Cards, exports and upload of mixes of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.lora import files
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.lora.soup import Mix, Soup
from alignprop_cli.parsing import read_json
from alignprop_cli.paths import read_text
from alignprop_cli.publishing import card
from alignprop_cli.publishing.request import Published, Request
from alignprop_cli.publishing.results import publish, write_card


def add_card(made: Soup, mix: Mix, folder: Path) -> None:
    """Write the card of a mix into the folder that it is written in, before that has its name."""
    write_card(folder, _card(made, mix, folder, None))


def publish_soup(
    request: Request, made: Soup, model: ModelConfig | None, *, is_evaluated: bool
) -> Published:
    """Export and upload a mix that is on the disk; its card gets what was measured.

    Args:
        request: What is asked for.
        made: The mix.
        model: The base model, for merged models.
        is_evaluated: Whether an evaluation is in its folder.
    """
    (mix,) = made.mixes
    folder, measured, images = mix.folder, None, None
    # 1. The figures, where there are any, as they stand in the evaluation's own file.
    if is_evaluated:
        evaluation = folder / "evaluation"
        measured = read_json(read_text(evaluation / "results.json", "soup"))
        images = evaluation / "sheet.png"
    about = _card(made, mix, folder, measured)
    # 2. The card was written before the mix was evaluated: it is replaced.
    if is_evaluated:
        write_card(folder, about, images)
    title = folder.resolve().name
    return publish(request, folder / LORA_FILE, model, folder, title, about, images)


def _card(made: Soup, mix: Mix, folder: Path, measured: Mapping[str, Any] | None) -> card.Card:
    # From the file, which says what its own members and their configuration were.
    header = files.read_header(folder / LORA_FILE)
    return card.of_soup(
        # `folder` may be a temporary one.
        mix.folder.resolve().name,
        header,
        [(one.label, share) for one, share in zip(made.members, mix.coefficients, strict=True)],
        made.rewards,
        made.recipe.method,
        files.recorded_config(header, folder / LORA_FILE) or {},
        measured,
    )
