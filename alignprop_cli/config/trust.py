"""What a configuration that came with weights may ask for: what is shipped, and what was typed.

The header of a LoRA and the config.yaml of a run may be somebody else's. They may set numbers, up
to a bound, and choose among what is shipped. Code to import, files to read and hub ids to download
are allowed only if the command line names them too, or a preset or file that the command line
names.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from alignprop_cli.config import presets
from alignprop_cli.config.schema import EMBEDDED_ALIGNERS, PYTHON, Config
from alignprop_cli.errors import ConfigError, Problem

_TRACKING = ("tracking.log_with", "tracking.project", "tracking.run_name", "tracking.tags")
TO_EVALUATE = (
    *("model.id", "model.revision", "model.variant", "model.config", "eval.prompts"),
    # They say whom to send images to, with the user's own key.
    *_TRACKING,
)
"""Keys that name a file, a hub id or a part of one, or a tracker, of those an evaluation reads."""

TO_RESUME = (*TO_EVALUATE, "model.decoder", "train.prompts", "eval.rewards")
"""Such keys that a resumed run reads; also `lora.init` if the run has no checkpoint yet."""

LARGEST = {
    "sample.num_inference_steps": 1000,
    "sample.height": 2048,
    "sample.width": 2048,
    "eval.images": 10_000,
    "eval.images_per_prompt": 1000,
    "eval.batch_size": 256,
}
"""The largest numbers that are taken untyped: with larger ones an evaluation may take days."""

# Characters of a foreign text that a message shows.
_LONGEST = 200

_MISSING = object()
# Sections of rewards by name: those trained on, and those that are only measured.
_REWARDS = (("reward",), ("eval", "rewards"))


@dataclass(frozen=True)
class ShippedNames:
    """What a foreign configuration may name, besides the values of the shipped presets.

    Args:
        models: Hub ids of the published base models.
        prompts: Names of the built-in prompt sets.
        rewards: For each shipped reward the options that name a file, a hub id or a prompt set,
            with their defaults.
    """

    models: Collection[str]
    prompts: Collection[str]
    rewards: Mapping[str, Mapping[str, str | None]]


@dataclass(frozen=True)
class _Named:
    """One thing that a configuration names: where, what, and why it matters."""

    path: tuple[str, ...]
    value: Any
    why: str

    @property
    def section(self) -> tuple[str, ...]:
        """The section of rewards that it is in; empty where it is in none."""
        return next((s for s in _REWARDS if self.path[: len(s)] == s), ())

    @property
    def is_code(self) -> bool:
        return bool(self.section) and len(self.path) == len(self.section) + 1


def refuse_untyped(
    config: Config,
    typed: Mapping[str, Any],
    shipped: ShippedNames,
    *,
    source: str,
    keys: Sequence[str] = TO_EVALUATE,
) -> None:
    """Refuse a configuration that names code, files or hub ids which the user did not type.

    Nothing is imported, opened or fetched here, and nothing may have been before.

    Args:
        config: The complete configuration, of recorded and typed values.
        typed: The nested values from the command line alone, and from the presets and files that it
            names.
        shipped: What needs not be typed.
        source: Where the recorded values come from, for the message.
        keys: The keys to check, which are those that will be read; `reward` is always checked.

    Raises:
        ConfigError: With everything that is refused, and the options to type that allow it.
    """
    found = _untyped(config, typed, shipped, keys)
    if not found:
        return
    problems = [Problem(_shown(".".join(one.path)), one.why) for one in found]
    raise ConfigError(
        f"{source}: this configuration came with the weights, and asks for what you did not name",
        problems,
        hint=f"if you know and trust it, name it yourself: {line}"
        if (line := _line(config, found)) is not None
        else "it cannot be typed: write what you trust of it into a file of your own for --config",
    )


def words_to_type(
    config: Config, shipped: ShippedNames, *, keys: Sequence[str] = TO_EVALUATE
) -> str | None:
    """Return the options that a recorded configuration needs on the command line; None for none."""
    found = _untyped(config, {}, shipped, keys)
    return _line(config, found) if found else None


def values_to_type(
    config: Config, shipped: ShippedNames, *, keys: Sequence[str] = TO_EVALUATE
) -> dict[str, Any]:
    """Return by dotted key what a recorded configuration needs of a caller in Python.

    The rewards that are trained on are not among it: a caller gives those in any case.
    """
    found = _untyped(config, {}, shipped, keys)
    return {".".join(one.path): one.value for one in found if not one.is_code}


def _untyped(
    config: Config, typed: Mapping[str, Any], shipped: ShippedNames, keys: Sequence[str]
) -> list[_Named]:
    """Return what is neither shipped nor typed."""
    # Allowed are: the very value that was typed; a reward that is code and whose name was typed, as
    # its options are checked one by one; a value that some shipped preset has in the same place.
    return [
        one
        for one in (*_places(config, shipped, keys), *_rewards(config, shipped, keys))
        if _at(typed, one.path) != one.value
        and not (one.is_code and _at(typed, one.path) is not _MISSING)
        and not any(_at(tree, one.path) == one.value for tree in _presets())
    ]


def _places(config: Config, shipped: ShippedNames, keys: Sequence[str]) -> Iterator[_Named]:
    """Yield the paths and hub ids that a configuration names outside its rewards."""
    # A default is shipped, and so are the names of published models and prompt sets.
    # As JSON: what is typed is lists, not tuples.
    defaults, values = Config().model_dump(mode="json"), config.model_dump(mode="json")
    free = {"model.id": shipped.models, "model.decoder": ("taesd",)}
    for key in keys:
        path = tuple(key.split("."))
        if path in _REWARDS:
            continue
        value = _at(values, path)
        allowed = free.get(key, shipped.prompts if path[-1] == "prompts" else ())
        if value != _at(defaults, path) and value not in allowed:
            why = "is for trackers" if key in _TRACKING else "is not shipped with alignprop"
            yield _Named(path, value, f"{_shown(value)} {why}")
    for key, largest in LARGEST.items():
        path = tuple(key.split("."))
        value = _at(values, path)
        if value is not None and value > largest:
            yield _Named(path, value, f"{value} is more than {largest}, the most that goes untyped")


def _rewards(config: Config, shipped: ShippedNames, keys: Collection[str]) -> Iterator[_Named]:
    """Yield the rewards that are code, and the options that may name a file or a hub id."""
    members: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [
        (("reward", name), member.options) for name, member in config.reward.items()
    ]
    # Only a run measures with these.
    if "eval.rewards" in keys:
        found = config.eval.rewards.items()
        members += [(("eval", "rewards", name), member.options) for name, member in found]
    for path, options in members:
        name = path[-1]
        if ":" in name:
            yield _Named(path, None, "this reward is code, which would be run")
        places = shipped.rewards.get(name)
        for option, value in options.items():
            if places is None:
                # Code of others could do anything with a text; a number is no path and no command.
                if not isinstance(value, bool | int | float | None):
                    why = f"{_shown(value)} would be given to code that is not alignprop's"
                    yield _Named((*path, option), value, why)
            elif option in places:
                allowed = shipped.prompts if option == "prompts" else ()
                if option == "model" and places[option] in EMBEDDED_ALIGNERS:
                    allowed = EMBEDDED_ALIGNERS
                if value not in (None, places[option], *allowed):
                    why = f"{_shown(value)} is not shipped with alignprop"
                    yield _Named((*path, option), value, why)


def _at(tree: object, path: Sequence[str]) -> Any:
    """Return the value at a path in nested mappings, `_MISSING` where there is none."""
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return _MISSING
        tree = cast(Mapping[str, object], tree)[part]
    return tree


@functools.cache
def _presets() -> tuple[Mapping[str, Any], ...]:
    """Return the values of all shipped presets."""
    found: list[Mapping[str, Any]] = []
    for name in presets.names():
        layers = presets.Layers()
        presets.read(presets.preset_path(name), layers)
        found.append(layers.values)
    return tuple(found)


def _line(config: Config, found: Sequence[_Named]) -> str | None:
    """Return the shell options that name all this; None if they could not be typed or read back."""
    words: list[str] = []
    # An object in the memory of another process.
    if any(one.path[-1].startswith(PYTHON) for one in found):
        return None
    if any(one.is_code and one.section == ("reward",) for one in found):
        # All rewards, since those of --reward replace the recorded ones.
        if not all(map(_is_plain, config.reward)):
            return None
        words += ["--reward", ",".join(config.reward)]
    for one in found:
        key = ".".join(one.path)
        if key == "model.id":
            words += ["--model", one.value]
        elif not one.is_code:
            words += ["--set", presets.assignment(key, one.value)]
        elif one.section != ("reward",):
            # This sets its options back; those that need no typing are repeated here.
            words += ["--set", f"{key}=null"]
            for name, value in config.eval.rewards[one.path[-1]].options.items():
                if all(other.path != (*one.path, name) for other in found):
                    words += ["--set", presets.assignment(f"{key}.{name}", value)]
        # `--set` would split such a name at its comma, equals sign or dot.
        if one.section and not all(map(_is_plain, one.path)):
            return None
        if any("." in option for option in one.path[len(one.section) + 1 :] if one.section):
            return None
    # An unprintable text could hide a command in what the user is asked to copy.
    return shlex.join(words) if all(map(str.isprintable, words)) else None


def _is_plain(name: str) -> bool:
    """Return whether `--reward` and `--set` read a name back unchanged."""
    return name.isprintable() and name.strip() == name and not set(name) & set(",=")


def _shown(value: object) -> str:
    """Return a foreign text in a form that is safe to print."""
    # It could flood the terminal, or control it by escape sequences.
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
