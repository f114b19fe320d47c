"""`train`, `evaluate`, `soup` and `score` for Python: each calls what the command of its name does.

Arguments mean what the options of the same name mean (docs/commands.md), and what is different from
Python is in docs/python.md. Nothing here imports torch before it is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from alignprop_cli.api import given
from alignprop_cli.api.given import PathLike
from alignprop_cli.config.tracking import Tracker
from alignprop_cli.evaluation.scorers import Layout
from alignprop_cli.lora.recipe import Format, Method, Recipe
from alignprop_cli.publishing.request import Kind

RowFormat = Literal["csv", "jsonl", "parquet"]

if TYPE_CHECKING:
    from alignprop_cli.api.given import Rewards
    from alignprop_cli.api.process import KeptConsole, Progress
    from alignprop_cli.api.results import EvaluateResult, ScoreResult, SoupResult, TrainResult


def train(
    preset: str | None = None,
    *,
    config: PathLike | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    reward: Rewards | None = None,
    model: PathLike | None = None,
    output: PathLike | None = None,
    steps: int | None = None,
    seed: int | None = None,
    on_nonfinite: Literal["stop", "skip"] | None = None,
    resume: PathLike | None = None,
    checkpoint: str | int | None = None,
    gpu_memory: str | None = None,
    log_with: Tracker | Sequence[Tracker] | None = None,
    export: Kind | Sequence[Kind] | None = None,
    push_to_hub: str | None = None,
    progress: Callable[[Progress], object] | None = None,
    verbose: bool = False,
) -> TrainResult:
    """Fine-tune a model with a LoRA to raise a reward.

    Args:
        preset: Name of a shipped preset.
        config: YAML file of your own, or its content as nested values.
        overrides: Dotted key to value, such as `{"train.learning_rate": 1e-4}`.
        reward: A name, a function, an object or a class; several in a list, or with their weights
            in a mapping.
        model: tiny, a folder or file, or a hub id.
        output: The run folder.
        steps: Optimiser steps.
        seed: Of all random numbers.
        on_nonfinite: What to do at NaN or infinity.
        resume: The run folder to resume, or `auto`. Python objects among its rewards have to be
            given again.
        checkpoint: With `resume`: `best` or a step to go back to.
        gpu_memory: Use at most this, such as 12GB.
        log_with: Experiment trackers that are told; an empty list is none.
        export: Formats to write the adapter in for other programs.
        push_to_hub: Id on the hub to upload adapter and card to.
        progress: Called after every step and every batch of samples; what it raises ends the run.
        verbose: Whether to print as the command does.

    Raises:
        AlignPropError: Of the class that says whose mistake it is (errors.py).
        InterruptedRun: After Ctrl+C or a signal, when everything is saved; in the main thread.
    """
    from alignprop_cli.commands.bodies import train as body
    from alignprop_cli.commands.trackers import tracker_names

    with _command(reward, progress, verbose, weighted=True) as (console, rewards):
        body.train(
            console,
            # What is trained; later ones win.
            preset=preset,
            config=given.config(config),
            sets=given.assignments(overrides),
            reward=rewards,
            model=given.path(model),
            output=given.path(output),
            # Keys of the configuration with an option of their own.
            steps=steps,
            seed=seed,
            on_nonfinite=on_nonfinite,
            # Or which run is resumed, from where.
            resume=given.path(resume),
            checkpoint=None if checkpoint is None else str(checkpoint),
            # The machine. Plans for other machines are the command line's.
            gpu_memory=gpu_memory,
            # Who else gets it.
            log_with=tracker_names(given.words("log_with", log_with)),
            export=given.words("export", export),
            push_to_hub=push_to_hub,
        )

    from alignprop_cli.api.results import of_training

    return of_training(console.values, console.warnings)


def evaluate(
    targets: PathLike | Sequence[PathLike],
    *,
    preset: str | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: str | int | None = None,
    model: PathLike | None = None,
    reward: Rewards | None = None,
    prompts: PathLike | None = None,
    images: int | None = None,
    images_per_prompt: int | None = None,
    scale: float | Sequence[float] | None = None,
    base_until: float | Sequence[float] | None = None,
    ema: bool = False,
    seed: int | None = None,
    batch_size: int | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    log_with: Tracker | Sequence[Tracker] | None = None,
    export: Kind | Sequence[Kind] | None = None,
    layout: Layout | None = None,
    progress: Callable[[Progress], object] | None = None,
    verbose: bool = False,
) -> EvaluateResult:
    """Sample the same images with the base model and with LoRAs, and compare their rewards.

    Args:
        targets: Runs, checkpoints, LoRA files or folders; or `base` alone.
        preset: Used instead of the configuration that comes with the first target.
        config: As in `train`; used in the same way.
        overrides: As in `train`.
        checkpoint: Of the runs: `best` or a step.
        model: As in `train`.
        reward: As in `train`, without weights.
        prompts: Prompt set or file.
        images: Images of each model.
        images_per_prompt: Of these, images of each prompt.
        scale: Strengths of the LoRA.
        base_until: Shares of the chain's calls that run without the LoRA.
        ema: Whether the average of the weights is taken.
        seed: Of the noise.
        batch_size: Images sampled together; changes no image.
        output: The folder of the result.
        overwrite: Whether it may be replaced.
        log_with: As in `train`.
        export: As in `train`, of one LoRA as it was trained.
        layout: Folders of a benchmark's own scorer to write too: `geneval`, `geneval2`, `hpsv2`;
            with its prompts, all of them, where nothing else is named.
        progress: Called after every batch of images; what it raises ends the evaluation.
        verbose: Whether to print as the command does.

    Raises:
        AlignPropError: Of the class that says whose mistake it is (errors.py).
    """
    if layout is not None:
        given.one_of("layout", layout, get_args(Layout))
    from alignprop_cli.commands.bodies import evaluate as body
    from alignprop_cli.commands.trackers import tracker_names

    with _command(reward, progress, verbose) as (console, rewards):
        body.evaluate(
            console,
            # What is compared, instead of which configuration.
            given.several(targets),
            preset=preset,
            config=given.config(config),
            checkpoint=None if checkpoint is None else str(checkpoint),
            sets=given.assignments(overrides),
            model=given.path(model),
            reward=rewards,
            # What is sampled: keys of `eval`, checked with the others.
            prompts=given.path(prompts),
            images=images,
            images_per_prompt=images_per_prompt,
            # How the LoRA is used.
            scale=given.listed(scale),
            base_until=given.listed(base_until),
            ema=ema,
            # The noise, and how it is worked through.
            seed=seed,
            batch_size=batch_size,
            output=given.path(output),
            overwrite=overwrite,
            log_with=tracker_names(given.words("log_with", log_with)),
            export=given.words("export", export),
            layout=layout,
        )

    from alignprop_cli.api.results import of_evaluation

    return of_evaluation(console.values, console.warnings)


def soup(
    members: Sequence[PathLike] | Mapping[PathLike, float],
    *,
    coef: float | Sequence[float] | None = None,
    method: Method = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_missing: bool = False,
    file_format: Format = "diffusers",
    evaluate: bool = False,
    sweep: tuple[float, float, float] | None = None,
    reward: Rewards | None = None,
    model: PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
    images: int | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    log_with: Tracker | Sequence[Tracker] | None = None,
    export: Kind | Sequence[Kind] | None = None,
    push_to_hub: str | None = None,
    progress: Callable[[Progress], object] | None = None,
    verbose: bool = False,
) -> SoupResult:
    """Mix LoRAs into one: each weight changes by the members' changes, each times its share.

    Args:
        members: Runs, checkpoints, LoRA files or folders, or `base`; a mapping gives their shares.
        coef: Share of the first of two members, or one share for each.
        method: How they are mixed.
        rank: Of svd, ties and dare_linear.
        density: Share of values that ties and dare_linear keep.
        seed: Of dare_linear.
        allow_missing: Whether members may change different layers.
        file_format: Names in the file: diffusers' or ComfyUI's.
        evaluate: Whether the mix is compared with the base model.
        sweep: First and last share of the first of two members, and the step: one mix for each.
        reward: For the evaluation, as there.
        model: For the evaluation.
        overrides: For the evaluation.
        images: For the evaluation.
        output: The folder of the result.
        overwrite: Whether it may be replaced.
        log_with: As in `train`, for the evaluation.
        export: As in `train`, of one mix.
        push_to_hub: As in `train`, of one mix.
        progress: As in `evaluate`.
        verbose: Whether to print as the command does.

    Raises:
        AlignPropError: Of the class that says whose mistake it is (errors.py).
    """
    from alignprop_cli.commands.bodies import soup as body
    from alignprop_cli.commands.trackers import tracker_names

    names, shares = given.members(members, coef)
    # Checked by the options of the command, which are not in the way here.
    given.one_of("method", method, get_args(Method))
    given.one_of("file_format", file_format, get_args(Format))
    recipe = Recipe(
        method,
        given.at_least("rank", rank, 1),
        density,
        given.at_least("seed", seed, 0) or 0,
        allow_missing,
        file_format,
    )

    with _command(reward, progress, verbose) as (console, rewards):
        made = body.soup(
            console,
            # The mix.
            names,
            recipe=recipe,
            coef=shares,
            # Its evaluation.
            evaluate=evaluate,
            sweep=None if sweep is None else ":".join(repr(float(part)) for part in sweep),
            reward=rewards,
            model=given.path(model),
            sets=given.assignments(overrides),
            images=images,
            output=given.path(output),
            overwrite=overwrite,
            log_with=tracker_names(
                given.words("log_with", log_with), used=evaluate or sweep is not None
            ),
            export=given.words("export", export),
            push_to_hub=push_to_hub,
        )

    from alignprop_cli.api.results import of_soup

    # With an evaluation the console has its result, and what was made is returned.
    compared = console.values if evaluate or sweep is not None else None
    return of_soup(made, compared, console.warnings)


def score(
    paths: PathLike | Sequence[PathLike],
    *,
    reward: Rewards | None = None,
    overrides: Mapping[str, Any] | None = None,
    prompt: str | None = None,
    prompts: PathLike | None = None,
    output: PathLike | None = None,
    output_format: RowFormat | None = None,
    overwrite: bool = False,
    resume: bool = False,
    top: int | None = None,
    gallery: bool = False,
    strict: bool = False,
    workers: int | None = None,
    progress: Callable[[Progress], object] | None = None,
    verbose: bool = False,
) -> ScoreResult:
    """Measure image files with rewards.

    Args:
        paths: Images, folders, patterns.
        reward: As in `train`, without weights; images of the embedded models need none.
        overrides: Dotted key to value of the rewards' options: `{"reward.clip.model": "tiny"}`.
        prompt: Of all images.
        prompts: File of prompts.
        output: File of the rows; without it they are in the result.
        output_format: Of that file; else its ending says it.
        overwrite: Whether files may be replaced.
        resume: Whether rows that are in the file are kept.
        top: List only so many of the best, by the first reward.
        gallery: Whether a page of thumbnails is written.
        strict: Whether a skipped image is an error.
        workers: Processes that decode; None chooses it.
        progress: Called after every image; what it raises ends the call.
        verbose: Whether to print as the command does.

    Raises:
        AlignPropError: Of the class that says whose mistake it is (errors.py).
    """
    from alignprop_cli.commands.bodies import score as body

    if output_format is not None:
        given.one_of("output_format", output_format, get_args(RowFormat))
    with _command(reward, progress, verbose) as (console, rewards):
        body.score(
            console,
            # What is measured, by what.
            given.several(paths),
            reward=rewards,
            sets=given.assignments(overrides),
            prompt=prompt,
            prompts=given.path(prompts),
            # Where the rows go; else all of them are in the result.
            output_format=output_format,
            output=given.path(output),
            overwrite=overwrite,
            resume=resume,
            # What is shown of them.
            top=given.at_least("top", top, 1),
            gallery=gallery,
            strict=strict,
            workers=given.at_least("workers", workers, 0),
        )

    from alignprop_cli.api.results import of_scoring

    return of_scoring(console.values, console.warnings)


@contextmanager
def _command(
    reward: Rewards | None,
    progress: Callable[[Progress], object] | None,
    verbose: bool,
    *,
    weighted: bool = False,
) -> Iterator[tuple[KeptConsole, list[str] | None]]:
    """Yield the console and the rewards of a command, which runs in the block."""
    # Imports torch, so only now. Libraries warn then, for one of widgets that a notebook lacks.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from alignprop_cli.api.process import KeptConsole, guest
        from alignprop_cli.api.together import Ending

    named = given.rewards(reward, weighted=weighted)
    console = KeptConsole(verbose=verbose, progress=progress)
    with guest(named.objects):
        ending = Ending()
        try:
            # Whatever the block raises passes: nothing here ends the process.
            yield console, named.texts
        except BaseException as error:
            ending.tell(error)
            raise
        # Inside, since it needs the processes that the command has joined.
        ending.tell(None)
        ending.wait()
        console.share()
