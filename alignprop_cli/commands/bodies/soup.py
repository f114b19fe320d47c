"""What `alignprop soup` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignprop_cli.commands import settings
from alignprop_cli.commands.importing import large_imports
from alignprop_cli.commands.output import EVALUATION, claimed
from alignprop_cli.commands.sharing import of_soup
from alignprop_cli.console import Console
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora.recipe import Recipe, check_recipe, member_shares, sweep_shares
from alignprop_cli.publishing.request import FILES, Kind, Publish, read_kinds

if TYPE_CHECKING:
    from alignprop_cli.config.schema import Config
    from alignprop_cli.lora.soup import Soup


def soup(
    console: Console,
    members: Sequence[str],
    *,
    recipe: Recipe,
    coef: str | None = None,
    evaluate: bool = False,
    sweep: str | None = None,
    reward: Sequence[str] | None = None,
    model: str | None = None,
    sets: Sequence[str] | None = None,
    images: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    log_with: Sequence[str] | None = None,
    export: Sequence[str] | None = None,
    push_to_hub: str | None = None,
) -> Mapping[str, Any]:
    """Mix LoRAs into one, and give the console the result.

    Args:
        console: For people and for the result, which with `evaluate` or `sweep` is the evaluation.
        members: Runs, checkpoints, LoRA files or folders, or `base`; MEMBER=SHARE.
        recipe: How they are mixed.
        coef: Shares, separated by commas.
        evaluate: Whether the mix is compared with the base model.
        sweep: FROM:TO:STEP, one mix for each share of the first member.
        reward: Names, for the evaluation.
        model: Of `model.id`, for the evaluation.
        sets: Texts of `--set`, for the evaluation.
        images: Of `eval.images`.
        output: The folder of the result.
        overwrite: Whether it may be replaced.
        log_with: Names of trackers, for the evaluation.
        export: Formats to write the mix in.
        push_to_hub: Id on the hub to upload it to.

    Returns:
        What was made, for programs; of a sweep nothing.

    Raises:
        AlignPropError: Whatever is wrong with the options, the members or the evaluation.
    """
    # 1. Everything on the command line is checked before a file is read.
    check_recipe(recipe)
    shares = None if sweep is None else sweep_shares(sweep, list(members), coef)
    names, coefficients = member_shares(list(members), coef)
    asked = evaluate or shares is not None
    _refuse_unused(asked, read_kinds(export), reward=reward, images=images, model=model, set=sets)

    # Imports torch, so only now.
    with large_imports():
        from alignprop_cli.lora.soup import prepare

    # 2. The members are read and checked, and the configuration they record; nothing is written.
    made = prepare(names, coefficients, shares, output, recipe)
    publish = of_soup(made, export, push_to_hub, model, sets, is_evaluated=asked)
    with claimed(made.folder, overwrite=overwrite, ours=(*made.contents(EVALUATION), *FILES)):
        # Before a mix is written, so that one that cannot be evaluated leaves nothing behind.
        config = None
        if asked:
            flags = {"model.id": model, "eval.images": images, "tracking.log_with": log_with}
            config = settings.for_soup(made, sets=sets, reward=reward, flags=flags)
        return _make(console, made, config, publish, replace=overwrite)


def _refuse_unused(is_evaluated: bool, exports: Sequence[Kind], **given: object) -> None:
    """Refuse options that only an evaluation reads, or with `exports` the merging of a model.

    Raises:
        ConfigError: With the first of them.
    """
    for name, value in given.items():
        merges = name in ("model", "set")
        used = is_evaluated or (merges and any(kind != "comfyui" for kind in exports))
        if value and not used:
            others = ", or --export merged" if merges else ""
            raise ConfigError(
                f"--{name}: nothing is evaluated here, so that it would have no effect",
                hint=f"add --evaluate or --sweep{others}",
            )


def _make(
    console: Console, soup: Soup, config: Config | None, publish: Publish, *, replace: bool
) -> Mapping[str, Any]:
    """Make the mixes; print what was made or, with a `config`, evaluate them."""
    from alignprop_cli.lora.files import locate
    from alignprop_cli.publishing.soups import add_card

    for text in soup.left_out:
        console.warn(text)
    for text in soup.remarks:
        console.note(text)
    values, lines = soup.make(replace=replace, also=add_card)
    if config is None:
        published = publish()
        lines += [*published.lines]
        values = {**values, **published.values}
        lines.append(f"next: {settings.evaluate_command(soup.folder, soup.header)}")
        console.result("alignprop.soup/1", values, lines)
        published.check()
        return values
    for line in lines:  # with --evaluate the result is that of the evaluation
        console.note(line)
    from alignprop_cli.evaluation.run import Variant, run_evaluation

    mixes = [
        Variant("tuned" if m.share is None else m.folder.name, locate(str(m.folder)), at=m.share)
        for m in soup.mixes
    ]
    folder, axis = soup.folder / "evaluation", "share of the first member"
    run_evaluation(config, console, mixes, folder, replace=replace, axis=axis, publish=publish)
    return values
