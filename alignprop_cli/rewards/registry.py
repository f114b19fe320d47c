"""Rewards by name: the shipped ones, installed ones, and a user's own.

A name is one of
  clip, brightness, ...            shipped, listed below
  package.module:attribute         a function, or a class that is built with the given options
  path/to/file.py:attribute        the same from a file
  any name in the entry point group `alignprop.rewards` of an installed package.

The options of the shipped rewards are listed here so that they can be checked without loading
anything; a test keeps the list equal to the signatures.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from alignprop_cli.config import RewardConfig
from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.rewards import own
from alignprop_cli.rewards.base import Reward

GROUP = "alignprop.rewards"


@dataclass(frozen=True)
class Spec:
    """Where a shipped reward lives, what it measures, and the options it takes.

    Args:
        target: module:attribute.
        summary: One line for people.
        options: Name and type of each.
        reads_prompt: Whether the prompt matters.
        instead: Option that takes the prompt's place where it is given.
        trainable: Whether it has a gradient.
        places: Options that name a file, a hub id or a prompt set, with their defaults. What a
            foreign file says of these is not simply believed: see trust.py.
    """

    target: str
    summary: str
    options: Mapping[str, type] = field(default_factory=dict[str, type])
    reads_prompt: bool = True
    instead: str | None = None
    trainable: bool = True
    places: Mapping[str, str | None] = field(default_factory=dict[str, str | None])


def _pixel(name: str, summary: str) -> Spec:
    return Spec(f"alignprop_cli.rewards.pixel:{name}", summary, reads_prompt=False)


SHIPPED: Mapping[str, Spec] = {
    "clip": Spec(
        "alignprop_cli.rewards.clip:ClipReward",
        "agreement of picture and prompt, cosine of an open_clip model",
        {"model": str, "pretrained": str},
        places={"model": "tiny", "pretrained": None},
    ),
    "clip_count": Spec(
        "alignprop_cli.rewards.clip_count:ClipCount",
        "log-probability of the prompt's number of things, by an open_clip model, at most 0",
        {"model": str, "pretrained": str, "most": int},
        places={"model": "tiny", "pretrained": None},
    ),
    "clip_choice": Spec(
        "alignprop_cli.rewards.clip_choice:ClipChoice",
        "log-probability of the prompt among those of a set, by an open_clip model, at most 0",
        {"model": str, "pretrained": str, "prompts": str, "alike": list, "log": bool},
        places={"model": "tiny", "pretrained": None, "prompts": "shapes"},
    ),
    "aesthetic": Spec(
        "alignprop_cli.rewards.aesthetic:AestheticReward",
        "how people rate a picture without its prompt, about 1 to 10",
        {"head": str, "model": str},
        reads_prompt=False,
        places={
            "head": "trl-lib/ddpo-aesthetic-predictor",
            "model": "openai/clip-vit-large-patch14",
        },
    ),
    "hps": Spec(
        "alignprop_cli.rewards.hps:HpsReward",
        "human preference score v2.1 or v2.0, a cosine, about 0.2 to 0.35",
        {"version": str, "weights": str},
        places={"weights": "xswu/HPSv2"},
    ),
    "hps-official": Spec(
        "alignprop_cli.rewards.hps_official:OfficialHps",
        "the same by the hpsv2 package itself; measures, cannot be trained on",
        {"version": str, "weights": str},
        trainable=False,
        places={"weights": "xswu/HPSv2"},
    ),
    "pickscore": Spec(
        "alignprop_cli.rewards.pickscore:PickScore",
        "which picture people pick for a prompt, about 18 to 24",
        {"model": str, "tokenizer": str},
        places={
            "model": "yuvalkirstain/PickScore_v1",
            "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        },
    ),
    "imagereward": Spec(
        "alignprop_cli.rewards.imagereward:ImageReward",
        "how people rate picture and prompt, about -2 to 2",
        {"weights": str, "tokenizer": str},
        places={"weights": "THUDM/ImageReward", "tokenizer": "bert-base-uncased"},
    ),
    "compressibility": Spec(
        "alignprop_cli.rewards.jpeg:Compressibility",
        "minus the size as a JPEG file, estimated, in kB",
        {"measure": str, "quality": int},
        reads_prompt=False,
    ),
    "incompressibility": Spec(
        "alignprop_cli.rewards.jpeg:Incompressibility",
        "the size as a JPEG file, estimated, in kB",
        {"measure": str, "quality": int},
        reads_prompt=False,
    ),
    "count": Spec(
        "alignprop_cli.rewards.detect:Count",
        "log-probability of exactly N objects, at most 0",
        {"object": str, "number": int, "model": str},
        instead="number",
        places={"model": "hustvl/yolos-tiny"},
    ),
    "remove": Spec(
        "alignprop_cli.rewards.detect:Remove",
        "log-probability of no such object, at most 0",
        {"object": str, "model": str},
        reads_prompt=False,
        places={"model": "hustvl/yolos-tiny"},
    ),
    "brightness": _pixel("brightness", "mean luma, 0 to 1"),
    "redness": _pixel("redness", "red above green and blue, -1 to 1"),
    "contrast": _pixel("contrast", "deviation of luma, 0 to 0.5"),
    "colourfulness": _pixel("colourfulness", "spread of colours, 0 to 1"),
    "symmetry": _pixel("symmetry", "likeness to the mirror image, -1 to 0"),
}


def names() -> list[str]:
    """Return the names of all shipped and installed rewards, sorted."""
    return sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))})


def check(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown name or option, without loading anything.

    Raises:
        ConfigError: With the nearest known name or option.
    """
    if name in SHIPPED:
        spec = SHIPPED[name]
        for option, value in options.items():
            if option not in spec.options:
                known = (*RewardConfig.model_fields, *spec.options)
                raise ConfigError(
                    f"reward.{name}: unknown option '{option}'.{did_you_mean(option, known)}"
                )
            # Not isinstance: True would be an int.
            if value is not None and type(value) is not spec.options[option]:
                kind = spec.options[option].__name__
                raise ConfigError(f"reward.{name}.{option}: expected a {kind}, got {value!r}")
    elif ":" not in name and name not in names():
        raise ConfigError(
            f"reward: unknown reward '{name}'.{did_you_mean(name, names())}",
            hint="a reward of your own is named file.py:attribute or package.module:attribute",
        )


def build(name: str, options: Mapping[str, Any]) -> Reward:
    """Load a reward and build it with its options.

    Raises:
        ConfigError: If the name or an option is unknown, or the attribute is no reward.
        AssetError: If its module, file or weights are missing.
    """
    check(name, options)
    target = _import(name)
    if not callable(target):
        raise ConfigError(f"reward '{name}': {target!r} is not a function or a class")
    if not inspect.isclass(target):
        if options:
            raise ConfigError(
                f"reward '{name}' is a function and takes no options, got {dict(options)}"
            )
        return cast(Reward, target)
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        raise ConfigError(f"reward '{name}': {error}") from error
    make = cast(Callable[..., Reward], target)
    if name in SHIPPED:
        return make(**options)
    with own.faults(AssetError, f"reward '{name}': cannot be built"):
        return make(**options)


def _import(name: str) -> Any:
    """Return the object that a name stands for."""
    if name in SHIPPED:
        name = SHIPPED[name].target
    elif ":" not in name:
        point = next(p for p in entry_points(group=GROUP) if p.name == name)
        name = point.value
    place, _, attribute = name.rpartition(":")
    with own.faults(AssetError, f"reward '{name}': cannot import {place}"):
        try:
            module = (
                _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
            )
        except SyntaxError as error:
            raise ConfigError(
                f"reward '{name}': {error.filename}:{error.lineno}: {error.msg}"
            ) from error
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(
            f"reward '{name}': {place} has no '{attribute}'.{did_you_mean(attribute, public)}"
        )
    return getattr(module, attribute)


def _from_file(path: Path) -> Any:
    """Run a Python file as a module of its own."""
    if not path.is_file():
        raise AssetError(f"reward: no such file: {path}")
    name = f"alignprop_user_reward_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AssetError(f"reward: cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
