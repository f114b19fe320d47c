"""Card, exports and upload of a mix of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.lora import files
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.lora.soup import Soup
from alignprop_cli.parsing import read_json
from alignprop_cli.paths import read_text
from alignprop_cli.publishing import card
from alignprop_cli.publishing.request import Published, Request
from alignprop_cli.publishing.results import publish

_EVALUATION = "evaluation"


def publish_soup(
    request: Request, made: Soup, model: ModelConfig | None, *, is_evaluated: bool
) -> Published:
    """Write the card of a mix that is on the disk, and export and upload what is asked for.

    Args:
        request: What is asked for.
        made: The mix.
        model: The base model, for merged models.
        is_evaluated: Whether an evaluation is in its folder.
    """
    (mix,) = made.mixes
    folder, title = mix.folder, mix.folder.resolve().name
    adapter, found, images = folder / LORA_FILE, None, None
    if is_evaluated:
        found = read_json(read_text(folder / _EVALUATION / "results.json", "soup"))
        images = folder / _EVALUATION / "sheet.png"
    header = files.read_header(adapter)
    config: Mapping[str, Any] = files.recorded_config(header, adapter) or {}
    about = card.of_soup(
        title,
        header,
        [(one.label, share) for one, share in zip(made.members, mix.coefficients, strict=True)],
        made.rewards,
        made.recipe.method,
        config,
        found,
    )
    return publish(request, adapter, model, folder, title, about, images)
