"""The options that export a result or upload it: `--export` and `--push-to-hub`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignprop_cli.commands.strengths import Chosen
from alignprop_cli.errors import ConfigError
from alignprop_cli.publishing.request import Publish, Published, Request, read_kinds

if TYPE_CHECKING:
    from alignprop_cli.config.schema import Config, ModelConfig
    from alignprop_cli.lora.files import Located
    from alignprop_cli.lora.soup import Soup

ExportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        help="write the LoRA for others too: comfyui, merged, merged-single-file; repeatable",
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", help="upload adapter and model card to this id of the hub"),
]


def of_training(config: Config, export: Sequence[str] | None, hub_id: str | None) -> Request:
    """Return what is asked for of a run; what cannot be done is refused.

    Raises:
        AlignPropError: As `results.check`.
    """
    request = Request(read_kinds(export), hub_id)
    # Now, since the run takes hours and its result would be there to no purpose.
    if not request.is_empty:
        from alignprop_cli.publishing.results import check

        check(request, dora=config.lora.dora, model=config.model)
    return request


def of_evaluation(
    export: Sequence[str] | None,
    located: Sequence[Located],
    chosen: Chosen,
    model: ModelConfig,
    folder: Path,
) -> Publish:
    """Return what writes the exports of an evaluated LoRA; what cannot be done is refused.

    Args:
        export: Values of `--export`.
        located: The LoRAs.
        chosen: Their strengths.
        model: The base model that samples.
        folder: Of the result.

    Raises:
        AlignPropError: As `results.check`; if there is more than one LoRA, or another strength.
    """
    request = Request(read_kinds(export))
    if request.is_empty:
        return Published
    # A curve of strengths is no one LoRA; and a strength would have to be in the weights.
    if len(located) != 1 or chosen != Chosen(None, None):
        raise ConfigError(
            "--export goes with one LoRA, as it was trained",
            hint="`alignprop soup LORA base --coef 0.7 --export ...` exports it weaker",
        )
    from alignprop_cli.lora import files
    from alignprop_cli.lora.factors import is_dora
    from alignprop_cli.publishing.results import check, publish

    (one,) = located
    check(request, dora=is_dora(files.read(one.file).layers), model=model)
    return lambda: publish(request, one.file, model, folder, one.label)


def of_soup(
    made: Soup,
    export: Sequence[str] | None,
    hub_id: str | None,
    model: str | None,
    sets: Sequence[str] | None,
    *,
    is_evaluated: bool,
) -> Publish:
    """Return what writes card and exports of a mix and uploads it.

    Args:
        made: The mix.
        export: Values of `--export`.
        hub_id: Value of `--push-to-hub`.
        model: The base model that the command line names.
        sets: Values of `--set`.
        is_evaluated: Whether the mix is evaluated before.

    Raises:
        AlignPropError: As `results.check`; if there are several mixes, or no base model is known.
    """
    request = Request(read_kinds(export), hub_id)
    # 1. What does not go together.
    if len(made.mixes) > 1:
        if not request.is_empty:
            raise ConfigError("--export and --push-to-hub go with one mix, not with --sweep")
        return Published
    if request.hub_id is not None and made.recipe.format != "diffusers":
        raise ConfigError(
            "--push-to-hub goes with --format diffusers",
            hint="--export comfyui writes the other file beside it",
        )
    from alignprop_cli.publishing.results import check
    from alignprop_cli.publishing.soups import publish_soup

    # 2. A merged model needs its base, which the members may record.
    base = None
    if any(kind != "comfyui" for kind in request.exports):
        base = _base_model(made, model, sets)
    check(request, model=base)
    return lambda: publish_soup(request, made, base, is_evaluated=is_evaluated)


def _base_model(made: Soup, model: str | None, sets: Sequence[str] | None) -> ModelConfig:
    """Return the base model that the command line names, or that the members record."""
    from alignprop_cli.commands import recorded

    # Of another model than the recorded one nothing that is recorded counts. Rewards and prompts
    # are not needed, so what they name need not be typed.
    found = {} if model else recorded.from_header(made.source, made.header, model)
    values = {"model": found["model"]} if "model" in found else {}
    own = [text for text in sets or () if text.strip().startswith("model.")]
    given: dict[str, Any] = {"assignments": own, "flags": {"model.id": model}}
    return recorded.build(header=values, **given, source=str(made.source.file)).model
