"""What `alignprop evaluate` does once the configuration is known: draw, measure, compare.

Imported only when needed: it brings torch and diffusers with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.device import make_accelerator
from alignprop_cli.errors import ConfigError
from alignprop_cli.evaluation import draw as evaluator
from alignprop_cli.evaluation import results
from alignprop_cli.evaluation.draw import Drawn, Floats, Paired, Picture
from alignprop_cli.evaluation.drawing import draw
from alignprop_cli.lora import files as adapter
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import Located
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.models.families import load_model
from alignprop_cli.rewards.jpeg import true_size
from alignprop_cli.rewards.mixture import Mixture, build_mixture
from alignprop_cli.storage import sha256, write_whole

DIVERSITY = "diversity"
"""What `evaluator.diversity` is called among the rewards."""


@dataclass(frozen=True)
class Variant:
    """One LoRA at one strength.

    Args:
        name: Of its pictures' folder, and in tables.
        located: Its file.
        strength: Factor on its update; 1 is as trained.
        at: Its place on the curve of the rewards, where one is drawn.
    """

    name: str
    located: Located
    strength: float = 1.0
    at: float | None = None


@dataclass(frozen=True)
class Figure:
    """One reward of one model.

    Args:
        mean: Over all pictures.
        std: Over all pictures.
        paired: Against the base model on the same pictures; None for the base model itself.
    """

    mean: float
    std: float
    paired: Paired | None


Figures = Mapping[str, Mapping[str, Figure]]
"""By reward and by model."""


@dataclass(frozen=True)
class Evaluation:
    """What was drawn and measured.

    Args:
        config: The complete configuration.
        model: The base model's name and fingerprint.
        variants: By name the LoRA's file, hash and strength, and the rewards it was trained on.
        curve: Places of the variants on a curve; empty where none is drawn.
        axis: What those places are.
        drawn: Pictures by model: base, and each variant.
        figures: Over all pictures.
        groups: Likewise for the pictures of each group of prompts.
        group_of: Group of each prompt that has one.
        checker: Shares of pictures that are as their prompt says, by part of the prompt; empty
            where the checker does not know the prompts.
        seconds: Wall-clock time.
    """

    config: Config
    model: Mapping[str, str]
    variants: Mapping[str, Mapping[str, object]]
    curve: Sequence[float]
    axis: str
    drawn: Mapping[str, Drawn]
    figures: Figures
    groups: Mapping[str, Figures]
    group_of: Mapping[str, str]
    checker: Figures
    seconds: float

    @property
    def trained(self) -> set[str]:
        """Return the rewards that any of the LoRAs was trained on."""
        return {str(r) for v in self.variants.values() for r in v["trained_on"]}  # type: ignore[attr-defined]


def variants(located: Sequence[Located], strengths: Sequence[float] | None) -> list[Variant]:
    """Return what is drawn beside the base model, each under a name that can be a folder's."""
    if strengths is not None:
        return [Variant(f"strength {s:g}", located[0], s, at=s) for s in strengths]
    if len(located) == 1:
        return [Variant("tuned", located[0])]
    labels = [re.sub(r"[^\w.-]+", "-", found.label) for found in located]
    if len({"base", *labels}) <= len(labels):
        labels = [f"{number}-{label}" for number, label in enumerate(labels, start=1)]
    return [Variant(label, found) for label, found in zip(labels, located, strict=True)]


def run_evaluation(
    config: Config,
    console: Console,
    chosen: Sequence[Variant],
    prompts: list[str],
    group_of: Mapping[str, str],
    folder: Path,
    *,
    axis: str = "strength of the LoRA",
) -> None:
    """Draw, measure, compare, write the folder, and print the result.

    Args:
        config: The complete configuration.
        console: For people and for the result.
        chosen: The LoRAs; none draws the base model alone.
        prompts: The prompt set.
        group_of: Group of each prompt that has one.
        folder: Where the result goes; replaced where it exists.
        axis: What the places of the LoRAs on a curve are.

    Raises:
        AlignPropError: Whatever is wrong with the model, a LoRA, the rewards or the pictures.
    """
    started = time.perf_counter()
    accelerator = make_accelerator()
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    model = load_model(config.model, accelerator.device)
    for variant in chosen:
        # Before anything is drawn.
        _check(console, model, variant)
    mixture = build_mixture(config.reward, config.loss, accelerator.device)
    # Tells pictures that fill with detail or empty, whatever the rewards say.
    mixture.beside.setdefault("jpeg_kilobytes", true_size)
    pictures = evaluator.choose(prompts, config.eval.images, config.eval.images_per_prompt)
    drawn = _draw(config, console, model, mixture, pictures, chosen)
    if not accelerator.is_main_process:
        return
    names = [group_of.get(picture.prompt) for picture in pictures]
    result = Evaluation(
        config,
        {"id": model.id, "fingerprint": model.fingerprint},
        {variant.name: _identity(variant) for variant in chosen},
        [variant.at for variant in chosen if variant.at is not None],
        axis,
        drawn,
        _compare(drawn),
        {
            group: _compare({n: _part(d, names, group) for n, d in drawn.items()})
            for group in sorted({name for name in names if name is not None})
        },
        group_of,
        {
            part: {
                which: _figure(drawn["base"], right["base"], own) for which, own in right.items()
            }
            for part, right in evaluator.checks(drawn).items()
        },
        time.perf_counter() - started,
    )
    write_whole(folder, lambda made: results.write(result, made))
    results.show(console, result, folder)


def _draw(
    config: Config,
    console: Console,
    model: DiffusionModel,
    mixture: Mixture,
    pictures: Sequence[Picture],
    chosen: Sequence[Variant],
) -> dict[str, Drawn]:
    """Draw the same pictures with every model, the base model first."""
    repeated = len({picture.prompt_index for picture in pictures}) < len(pictures)
    features = mixture.features if repeated else None
    drawn = {"base": draw(config, console, model, mixture, pictures, "base", features=features)}
    loaded: Path | None = None
    for variant in chosen:
        if loaded != variant.located.file:
            if loaded is not None:
                model.unload_lora()
            model.load_lora(variant.located.file)
            loaded = variant.located.file
        lora.set_strength(model.network, variant.strength)
        drawn[variant.name] = draw(
            config, console, model, mixture, pictures, variant.name, features=features
        )
    return drawn


def _identity(variant: Variant) -> dict[str, object]:
    header = adapter.read_header(variant.located.file)
    trained_on = [name for name in header.get("alignprop.rewards", "").split(",") if name]
    return {
        "file": str(variant.located.file.resolve()),
        "sha256": sha256(variant.located.file),
        "strength": variant.strength,
        "trained_on": trained_on,
    }


def _check(console: Console, model: DiffusionModel, variant: Variant) -> None:
    """Refuse a LoRA that says that it belongs to another model, or does not fit."""
    file = variant.located.file
    header = adapter.read_header(file)
    recorded = header.get("alignprop.base_fingerprint")
    trained_on = header.get("alignprop.base_model")
    if recorded and recorded != model.fingerprint:
        raise ConfigError(
            f"{file}: this LoRA was trained on {trained_on}, whose layers are not those "
            f"of {model.id}",
            hint="give the model it was trained on with --model",
        )
    if trained_on and trained_on != model.id:
        console.warn(f"{file} was trained on {trained_on}, and is drawn with {model.id}")
    if adapter.changes_text_encoder(file):
        console.warn(f"{file}: its layers of the text encoder are left out")


def _compare(drawn: Mapping[str, Drawn]) -> dict[str, dict[str, Figure]]:
    """Return the figures of every reward, and of diversity where prompts repeat."""
    base = drawn["base"]
    figures = {
        name: {which: _figure(base, values, one.rewards[name]) for which, one in drawn.items()}
        for name, values in base.rewards.items()
    }
    if base.features is None:
        return figures
    spread = {which: evaluator.diversity(one) for which, one in drawn.items()}
    prompts, values = spread["base"]
    if prompts:
        figures[DIVERSITY] = {
            which: Figure(
                float(own.mean()),
                float(own.std()),
                None if which == "base" else evaluator.compare(prompts, values, own),
            )
            for which, (_, own) in spread.items()
        }
    return figures


def _figure(base: Drawn, before: Floats, values: Floats) -> Figure:
    """Return mean and spread of a model's values, and their comparison unless it is the base."""
    paired = None if values is before else evaluator.compare(base.pictures, before, values)
    return Figure(float(values.mean()), float(values.std()), paired)


def _part(drawn: Drawn, names: Sequence[str | None], group: str) -> Drawn:
    """Return the pictures of one group."""
    inside = np.array([name == group for name in names])
    return replace(
        drawn,
        pictures=tuple(p for p, name in zip(drawn.pictures, names, strict=True) if name == group),
        images=drawn.images[inside],
        rewards={name: values[inside] for name, values in drawn.rewards.items()},
        features=None if drawn.features is None else drawn.features[inside],
    )
