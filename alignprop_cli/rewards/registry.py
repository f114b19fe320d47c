"""Rewards by name: the shipped ones, those of installed packages, and a user's own.

A name is one of
  clip, brightness, ...            shipped, listed in catalogue.py
  package.module:attribute         a function, or a class, constructed with the given options
  path/to/file.py:attribute        the same from a file
  any name in the entry point group `alignprop.rewards` of an installed package
  python:blueness                  an object that a Python caller has given; see `given`.

Names and options of shipped rewards are in catalogue.py. They are checked before torch or a model
library is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from alignprop_cli.config.guard import HeldOutConfig
from alignprop_cli.config.schema import EMBEDDED_MODELS, PYTHON, RewardConfig
from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.paths import user_path
from alignprop_cli.rewards.catalogue import SHIPPED

if TYPE_CHECKING:
    from types import CodeType

    import torch

    from alignprop_cli.rewards.base import Reward
    from alignprop_cli.rewards.frozen import MetaReward

GROUP = "alignprop.rewards"


def names() -> list[str]:
    """Return the names of all shipped and installed rewards, sorted."""
    return sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))})


def check(name: str, options: Mapping[str, Any], section: str = "reward") -> None:
    """Refuse an unknown name or option, without loading anything.

    The options of a user's own reward are not known here; `build` checks them.

    Args:
        name: Of the reward.
        options: As in the configuration.
        section: Where it is named there, for messages.

    Raises:
        ConfigError: With the nearest known name or option.
    """
    if name in SHIPPED:
        known = SHIPPED[name].options
        for option, value in options.items():
            if option not in known:
                told = did_you_mean(option, (*RewardConfig.model_fields, *known))
                raise ConfigError(f"{section}.{name}: unknown option '{option}'.{told}")
            # Not isinstance, which takes True for an int.
            if value is not None and type(value) is not known[option]:
                kind = known[option].__name__
                raise ConfigError(f"{section}.{name}.{option}: expected a {kind}, got {value!r}")
    elif name.startswith(PYTHON):
        check_given([name], section)
    elif ":" not in name and name not in names():
        raise ConfigError(
            f"{section}: unknown reward '{name}'.{did_you_mean(name, names())}",
            hint="a reward of your own is named file.py:attribute or package.module:attribute",
        )
    # Such as clip:0.5, of which a module `clip` would be looked for.
    elif (attribute := name.rpartition(":")[2]) and not attribute.isidentifier() and ":" in name:
        raise ConfigError(
            f"{section}: '{name}': expected the name of a function or a class after the colon, "
            f"got '{attribute}'",
            hint="weights are for training: train --reward NAME:WEIGHT",
        )


@contextmanager
def given(rewards: Mapping[str, object]) -> Iterator[None]:
    """Let these names mean these objects while the block runs, in this thread alone.

    Args:
        rewards: The rewards by name; the names begin with `schema.PYTHON`.
    """
    token = _GIVEN.set({**_GIVEN.get({}), **rewards})
    try:
        yield
    finally:
        _GIVEN.reset(token)


_GIVEN: ContextVar[Mapping[str, object]] = ContextVar("given")


def check_given(rewards: Collection[str], source: str) -> None:
    """Refuse the name of a Python object that is not there: only its own process knows it.

    Args:
        rewards: Names of rewards of any kind.
        source: Where they are named, for the message.

    Raises:
        ConfigError: With the first such name.
    """
    for name in rewards:
        if name.startswith(PYTHON) and name not in _GIVEN.get({}):
            raise ConfigError(
                f"{source}: the reward {name} was a Python object, which a file cannot name",
                hint=f"from Python, give it again: reward={name.removeprefix(PYTHON)}; or name "
                "other rewards to evaluate with, by --reward or reward=",
            )


def is_embedded(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a shipped reward measures with the embedded model because none is named."""
    spec = SHIPPED.get(name)
    return spec is not None and spec.places.get("model") == "tiny" and options.get("model") is None


def check_embedded(
    rewards: Mapping[str, RewardConfig] | Mapping[str, HeldOutConfig],
    model: str,
    section: str = "reward",
) -> None:
    """Refuse to measure with the embedded image-text model unasked what it has never seen.

    Args:
        rewards: The rewards by name.
        model: Id of the model that draws the images.
        section: Where the rewards are named, for messages.

    Raises:
        ConfigError: If the model is not an embedded one, and a reward names no model.
    """
    for name, reward in rewards.items():
        if model not in EMBEDDED_MODELS and is_embedded(name, reward.options):
            option = f"{section}.{name}.model"
            raise ConfigError(
                f"{option}: no model is named, and the embedded one knows nothing but the coloured "
                "shapes of the embedded models",
                hint=f"--set {option}=ViT-L-14 --set {section}.{name}.pretrained=openai; "
                f"or --set {option}=tiny, if the embedded one is meant",
            )


def build(name: str, options: Mapping[str, Any]) -> Reward:
    """Load a reward and construct it with its options.

    Raises:
        ConfigError: If the name or an option is unknown, or the attribute is not a reward.
        AssetError: If its module, file or weights are missing.
    """
    from alignprop_cli.rewards import user  # loads torch

    check(name, options)
    options = _chosen(name, options)
    target = _import(name)
    if not callable(target):
        kind = type(target).__name__
        raise ConfigError(f"reward '{name}': its {kind} is not a function or a class")
    if not inspect.isclass(target):
        if options:
            kind = "a function" if inspect.isroutine(target) else "an object"
            raise ConfigError(
                f"reward '{name}' is {kind} and takes no options, got {dict(options)}"
            )
        return cast("Reward", target)
    # Bound before the call: a TypeError from inside the constructor is not a wrong option.
    try:
        inspect.signature(target).bind(**options)
    # ValueError: a class of a library in C, which tells no signature.
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward '{name}': {error}") from error
    make = cast("Callable[..., Reward]", target)
    if name in SHIPPED:
        return make(**options)
    with user.faults(AssetError, f"reward '{name}': cannot be built"):
        return make(**options)


def on_meta(name: str, options: Mapping[str, Any], dtype: torch.dtype) -> MetaReward | None:
    """Return a reward on the meta device, where its memory can be measured without its weights.

    Args:
        name: Of the reward.
        options: As in the configuration.
        dtype: Precision of its networks.

    Returns:
        A new object in every call, so that the caller may change its networks. None where the sizes
        are unknown until the reward is loaded, as for a user's own reward without `on_meta`.

    Raises:
        ConfigError: If the name or an option is unknown, or `on_meta` returns something else.
        AssetError: If its module or file, or a folder's configuration, is missing or damaged.
    """
    from alignprop_cli.rewards import user
    from alignprop_cli.rewards.frozen import MetaReward

    check(name, options)
    # Looked up on the class: constructing an object would load its weights.
    target = _import(name)
    # An object that is there already: its class does not know how it was built.
    if name.startswith(PYTHON) and not inspect.isclass(target):
        return None
    with user.faults(AssetError, f"reward '{name}': on_meta failed"):
        make: Callable[..., object] | None = getattr(target, "on_meta", None)
    if make is None:
        return None
    if name in SHIPPED:
        found = make(dtype, **_chosen(name, options))
    else:
        with user.faults(AssetError, f"reward '{name}': on_meta failed"):
            found = make(dtype, **options)
    if found is None or isinstance(found, MetaReward):
        return found
    raise ConfigError(
        f"reward '{name}': on_meta must return a MetaReward or None, got {type(found).__name__}"
    )


def _chosen(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options that a reward is built with: null is the default of a shipped one's."""
    if name not in SHIPPED:
        return options
    return {option: value for option, value in options.items() if value is not None}


def takes_latents(name: str) -> bool:
    """Return whether a reward measures latents instead of images; see `base.Reward`.

    Args:
        name: Of the reward. One that is not shipped is imported, but not constructed.

    Raises:
        ConfigError, AssetError: If the name is unknown, or its module or file is missing or fails.
    """
    from alignprop_cli.rewards import base, user

    check(name, {})
    if name in SHIPPED:
        return False
    with user.faults(AssetError, f"reward '{name}': takes_latents cannot be read"):
        return base.takes_latents(_import(name))


def has_network(name: str) -> bool:
    """Return whether a reward holds a network whose precision can be chosen.

    Args:
        name: Of the reward, as for `takes_latents`.

    Raises:
        ConfigError, AssetError: As `takes_latents`.
    """
    from alignprop_cli.rewards.frozen import FrozenReward

    check(name, {})
    target = _import(name)
    kind = target if inspect.isclass(target) else type(target)
    return issubclass(kind, FrozenReward)


def no_network(name: str, dtype: str, section: str = "reward") -> ConfigError:
    """Return the error of a precision that is given for a reward without a network."""
    return ConfigError(f"{section}.{name}.dtype: it holds no network that could be {dtype}")


def parameters(name: str, options: Mapping[str, Any]) -> int:
    """Return the number of weights of a reward; 0 where it has none or the number is unknown.

    Raises:
        ConfigError, AssetError: As `on_meta`.
    """
    import torch

    found = on_meta(name, options, torch.float32)
    return 0 if found is None else found.parameters


def _import(name: str) -> Any:
    """Return the object that a name stands for."""
    from alignprop_cli.rewards import user

    # 1. Every kind of name becomes PLACE:ATTRIBUTE, but those that stand for an object.
    if name.startswith(PYTHON):
        return _GIVEN.get()[name]
    if name in SHIPPED:
        name = f"alignprop_cli.rewards.{SHIPPED[name].target}"
    elif ":" not in name:
        name = next(point for point in entry_points(group=GROUP) if point.name == name).value
    place, _, attribute = name.rpartition(":")
    # 2. Importing runs the user's code, so all of its errors are the user's. A syntax error also
    # gets its file and line, which the general message would hide.
    with user.faults(AssetError, f"reward '{name}': cannot import {place}"):
        try:
            module = (
                _from_file(user_path(place, "reward"))
                if place.endswith(".py")
                else importlib.import_module(place)
            )
        except SyntaxError as error:
            raise ConfigError(
                f"reward '{name}': {error.filename}:{error.lineno}: {error.msg}"
            ) from error
        # A module may have a __getattr__ of its own.
        found = getattr(module, attribute, module)
    if found is module:
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(
            f"reward '{name}': {place} has no '{attribute}'.{did_you_mean(attribute, public)}"
        )
    return found


def _from_file(path: Path) -> Any:
    """Import a Python file as a module that no package contains."""
    if not path.is_file():
        what = "a folder, a pipe or a device" if path.exists() else "no such file"
        raise AssetError(f"reward: {what}: {path}")
    return _run(path.resolve(), path.stat().st_mtime_ns)


@cache
def _run(path: Path, _changed: int) -> Any:
    """Run a Python file, and again only after it has changed (its time is part of the cache key).

    A run looks the reward up several times: to check it, to estimate its memory and to build it.
    """
    name = f"alignprop_user_reward_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AssetError(f"reward: cannot import {path}")
    if isinstance(spec.loader, SourceFileLoader):
        spec.loader = _Source(name, str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


class _Source(SourceFileLoader):
    """Runs a file as it is now, and writes nothing beside it.

    Bytecode that Python has kept of it is taken for the file if seconds and size agree.
    """

    def get_code(self, fullname: str) -> CodeType:
        """Return the compiled source."""
        return self.source_to_code(self.get_data(self.path), self.path)
