"""Python values as the commands take them: texts of options, and rewards by name."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from alignprop_cli.config import presets
from alignprop_cli.config.schema import PYTHON
from alignprop_cli.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]
"""A path."""

if TYPE_CHECKING:
    RewardLike = str | Callable[[Tensor, list[str]], Tensor] | type
    """A reward: its name, or a function, an object or a class with the contract of a reward."""

    Rewards = RewardLike | Sequence[RewardLike] | Mapping[RewardLike, float]
    """One reward, several, or several with their weights."""


@dataclass(frozen=True)
class Named:
    """Rewards as the commands take them.

    Args:
        texts: NAME or NAME:WEIGHT; None where no reward was given.
        objects: Those that are Python objects, by name.
    """

    texts: list[str] | None = None
    objects: Mapping[str, object] = field(default_factory=dict[str, object])


def rewards(given: Rewards | None, *, weighted: bool = False) -> Named:
    """Give every reward a name: its own, or that of a Python object after `python:`.

    Args:
        given: As in `Rewards`; None for none.
        weighted: Whether weights mean something, as they do in training.

    Raises:
        ConfigError: If a reward is none, two objects have the same name, or a weight is no finite
            number or means nothing.
    """
    if given is None:
        return Named()
    # Pairs, since an object need not be hashable.
    pairs: list[tuple[object, float | None]]
    if isinstance(given, Mapping):
        if not weighted:
            raise ConfigError("reward: weights are for training: give the rewards alone")
        pairs = list(cast(Mapping[Any, float], given).items())
    elif isinstance(given, list | tuple):
        pairs = [(each, None) for each in cast(Sequence[object], given)]
    else:
        pairs = [(given, None)]
    texts: list[str] = []
    objects: dict[str, object] = {}
    for reward, weight in pairs:
        name = reward if isinstance(reward, str) else _name(reward)
        if not isinstance(reward, str):
            if name in objects:
                raise ConfigError(
                    f"reward: two objects have the name {name}", hint="give one another __name__"
                )
            objects[name] = reward
        # As the option has it: the weight after a colon.
        texts.append(name if weight is None else f"{name}:{_weight(name, weight)}")
    return Named(texts, objects)


def _name(reward: object) -> str:
    """Return the name of a Python object, such as python:blueness."""
    if not callable(reward):
        raise ConfigError(
            f"reward: expected a name or something that can be called, got {reward!r:.100}"
        )
    own = getattr(reward, "__name__", None) or type(reward).__name__
    # It becomes a key of the configuration, where a dot, for one, would be read as something else.
    word = re.sub(r"\W+", "_", str(own)).strip("_")
    return f"{PYTHON}{word if word.isidentifier() else 'reward'}"


def _weight(name: str, weight: object) -> str:
    """Return the text of a weight."""
    # True is a number to Python, and a slip here.
    finite = isinstance(weight, numbers.Real) and math.isfinite(weight)
    if isinstance(weight, bool) or not finite:
        raise ConfigError(f"reward: {name}: expected a finite number as its weight, got {weight!r}")
    return repr(float(cast(Any, weight)))


def assignments(overrides: Mapping[str, Any] | None) -> list[str]:
    """Return the texts of `--set` that set dotted keys to these values.

    Raises:
        ConfigError: If a value can be in no configuration.
    """
    return [presets.assignment(k, plain(v, k)) for k, v in (overrides or {}).items()]


def plain(value: Any, where: str) -> Any:
    """Return a value as YAML would have it: numbers and texts, lists and mappings of them.

    Raises:
        ConfigError: If it holds anything else.
    """
    if value is None or isinstance(value, str | bool):
        return value
    # NumPy's numbers are of neither type, but of these kinds.
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(k): plain(v, f"{where}.{k}") for k, v in items}
    if isinstance(value, list | tuple):
        return [plain(v, where) for v in cast(Sequence[Any], value)]
    kind = value if isinstance(value, float) else f"an object of {type(value).__name__}"
    raise ConfigError(f"{where}: {kind} can be in no configuration")


def config(given: PathLike | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """Return a configuration of the user's own as the commands take it."""
    # Values that YAML would not have, such as paths, become what it would have.
    if isinstance(given, Mapping):
        return cast(Mapping[str, Any], plain(given, "config"))
    return path(given)


def path(given: PathLike | None) -> str | None:
    """Return the text of a path; None stays None."""
    return None if given is None else os.fspath(given)


def several(given: PathLike | Sequence[PathLike]) -> list[str]:
    """Return the texts of one path or of several.

    Raises:
        ConfigError: If there is none.
    """
    # A text is a sequence too, of its letters.
    one = isinstance(given, str | os.PathLike)
    found = [os.fspath(cast(Any, each)) for each in ([given] if one else cast(Any, given))]
    if not found:
        raise ConfigError("expected at least one path, got an empty list")
    return found


def listed(given: float | Sequence[float] | None) -> str | None:
    """Return numbers separated by commas, as an option has them; None stays None."""
    if given is None:
        return None
    # repr: the shortest text that is read back as the same number.
    values = [given] if isinstance(given, numbers.Real) else cast(Sequence[Any], given)
    return ",".join(repr(float(value)) for value in values)


def words(name: str, given: str | Sequence[str] | None) -> list[str] | None:
    """Return one word or several as a list; None stays None, which an empty list is not.

    Raises:
        ConfigError: If one of them is no text.
    """
    if given is None:
        return None
    found = [given] if isinstance(given, str) else list(cast(Sequence[object], given))
    for word in found:
        if not isinstance(word, str):
            raise ConfigError(f"{name}: expected a name, got {word!r:.100}")
    return cast("list[str]", found)


def members(
    given: Sequence[PathLike] | Mapping[PathLike, float], coef: float | Sequence[float] | None
) -> tuple[list[str], str | None]:
    """Return the members of a soup and the text of `--coef`.

    Raises:
        ConfigError: If shares are given twice.
    """
    if not isinstance(given, Mapping):
        return several(given), listed(coef)
    if coef is not None:
        raise ConfigError("soup: shares are given twice, by coef and by the mapping of members")
    # By --coef rather than as MEMBER=SHARE, since a path may contain an equals sign.
    shares = cast(Mapping[Any, float], given)
    return several(list(shares)), listed(list(shares.values()))


def at_least(name: str, value: int | None, least: int) -> int | None:
    """Return a number, or None.

    Raises:
        ConfigError: If it is less than the least.
    """
    if value is not None and value < least:
        raise ConfigError(f"{name}: expected at least {least}, got {value}")
    return value


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is not among those known.

    Raises:
        ConfigError: With the nearest one.
    """
    if value not in known:
        raise ConfigError(f"{name}: unknown '{value}'.{did_you_mean(value, known)}")
