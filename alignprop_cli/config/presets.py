"""Find, list, read, extend and override presets, and remember which source set each key.

Later sources win: defaults < what a LoRA file or a run records < preset (after what it extends)
< --config file < --set < --reward < named flags. A `reward` section of a file (and `eval.rewards`)
replaces the section that it inherits; `--set reward.NAME.KEY=VALUE` changes one option.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError, Problem, did_you_mean
from alignprop_cli.parsing import ParseError, read_yaml, read_yaml_lines, write_yaml
from alignprop_cli.paths import read_text, user_path

Tree = dict[str, Any]

# Bytes of a configuration file.
_MOST_TEXT = 2**20
# Sections of rewards by name.
_REWARDS = ("reward", "eval.rewards")
# Files that may extend one another; real ones are two or three.
_MOST_PARENTS = 20


Source = Path | Mapping[str, Any]
"""A configuration of the user's own: a file or, from Python, its nested values."""


@dataclass
class Layers:
    """The values merged so far, and the source that set each dotted key."""

    values: Tree = field(default_factory=dict[str, Any])
    origins: dict[str, str] = field(default_factory=dict[str, str])

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set one dotted key.

        Raises:
            ConfigError: If the key passes through a value that is not a section.
        """
        *parents, last = _parts(key)
        node = self.values
        for parent in parents:
            child = node.get(parent)
            if child is None:
                # Missing, or a bare name without options, such as `reward: {clip: }`.
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{origin}: {key}: '{parent}' is a value, not a section")
            node = cast(Tree, child)
        node[last] = value
        self.origins[key] = origin


def _parts(key: str) -> list[str]:
    """Split a dotted key at its dots, but not those in a reward's name `file.py:attribute`."""
    place, colon, rest = key.partition(":")
    section = next((s for s in _REWARDS if place.startswith(f"{s}.")), None)
    if not colon or section is None:
        return key.split(".")
    attribute, *options = rest.split(".")
    return [*section.split("."), f"{place.removeprefix(f'{section}.')}:{attribute}", *options]


def directory() -> Path:
    """Return the folder of the shipped presets."""
    # The wheel has them inside the package; a clone has them at its root, where people look.
    package = Path(__file__).parent.parent
    installed = package / "_presets"
    return installed if installed.is_dir() else package.parent / "presets"


def names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    return sorted(path.stem for path in directory().glob("*.yaml"))


def summary(name: str) -> str:
    """Return the first comment line of a shipped preset."""
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


def preset_path(name: str) -> Path:
    """Return the file of a shipped preset.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name not in names():
        raise ConfigError(
            f"--preset: unknown preset '{name}'.{did_you_mean(name, names())}",
            hint="`alignprop train --list-presets` lists them; a file of your own goes to --config",
        )
    return directory() / f"{name}.yaml"


def read(
    path: Path, layers: Layers, seen: tuple[Path, ...] = (), *, complete: bool = False
) -> None:
    """Read a YAML file, and first what it extends, into the layers.

    Args:
        path: The file. Its `extends:` names a shipped preset or a file in the same folder.
        layers: Changed in place.
        seen: The files that led here through `extends`, to find a circle.
        complete: Whether `extends` is refused, as in the configuration of a run.

    Raises:
        AssetError: If the file cannot be read.
        ConfigError: If it is not a YAML mapping, repeats a key, or extends itself.
    """
    # 1. Text, then values and their lines.
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    if len(seen) > _MOST_PARENTS:
        raise ConfigError(f"{path}: extends more than {_MOST_PARENTS} files, one after the other")
    tree, lines = _parse(read_text(path, "configuration", most=_MOST_TEXT), path)
    # 2. What it extends goes into the layers first, so that this file wins.
    parent = tree.pop("extends", None)
    if parent is not None and complete:
        raise ConfigError(
            f"{path}: extends: the configuration of a run is complete and extends nothing",
            hint="a file of your own goes to --config",
        )
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends: expected the name of a preset, got {parent!r}")
        # A file in the same folder comes before a shipped preset of the same name.
        sibling = user_path(str(path.parent / parent), f"{path}: extends")
        read(sibling if sibling.is_file() else preset_path(parent), layers, (*seen, path.resolve()))
    # 3. This file.
    _put(tree, layers)
    layers.origins |= {key: f"{path.name}:{line}" for key, line in lines.items()}


def add(values: Mapping[str, Any], layers: Layers) -> None:
    """Put nested values into the layers as `read` puts those of a file, and first what they extend.

    Args:
        values: `extends` among them names a shipped preset or a file.
        layers: Changed in place.

    Raises:
        AssetError, ConfigError: As `read`.
    """
    tree = copy.deepcopy(dict(values))
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"config: extends: expected the name of a preset, got {parent!r}")
        file = user_path(parent, "config: extends")
        read(file if file.is_file() else preset_path(parent), layers)
    _put(tree, layers)


def _put(tree: Tree, layers: Layers) -> None:
    """Merge one source into the layers; its sections of rewards replace those before it."""
    if "reward" in tree:
        # Not merged: the rewards of the parent would stay in the mixture.
        layers.values.pop("reward", None)
    own, inherited = tree.get("eval"), layers.values.get("eval")
    if isinstance(own, dict) and isinstance(inherited, dict) and "rewards" in own:
        cast(Tree, inherited).pop("rewards", None)
    _merge(layers.values, tree)


def override(layers: Layers, assignments: Iterable[str]) -> None:
    """Apply `--set key=value` texts; values are read as YAML.

    Raises:
        ConfigError: If one is not of the form key=value, or its value is not YAML.
    """
    problems: list[Problem] = []
    # All unreadable texts go into one message.
    for text in assignments:
        # Arguments that are not UTF-8 reach Python as halves of surrogate pairs.
        if any("\ud800" <= c <= "\udfff" for c in text):
            problems.append(Problem(text[:100], "is not UTF-8"))
            continue
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(text, "expected key=value, for instance train.steps=40"))
            continue
        try:
            value = read_yaml(raw)
            if isinstance(value, dict) and "." not in key:
                # A whole section, as in a file: what it does not name stays.
                section = cast(Tree, value)
                _put({key.strip(): section}, layers)
                layers.origins |= {f"{key.strip()}.{name}": "--set" for name in section}
            else:
                layers.set(key.strip(), value, "--set")
        except ValueError as error:
            problems.append(Problem(key, f"cannot read the value {raw[:100]!r}: {error}; quote it"))
    if problems:
        raise ConfigError("--set: cannot be read", problems)


def assignment(key: str, value: Any) -> str:
    """Return the text of a `--set` that sets a key to this value, on one line and printable."""
    # YAML in one line. A list around the value, since YAML adds lines to a bare scalar.
    flow = write_yaml([value], flow=True)
    # The simplest text that is read back as the same value: a bare `no`, for instance, is false.
    bare = [value] if isinstance(value, str) else []
    for text in (*bare, flow.strip()[1:-1]):
        try:
            if text.isprintable() and read_yaml(text) == value:
                return f"{key}={text}"
        except ValueError:
            continue
    # Unprintable texts: JSON, which is YAML except for surrogate pairs, escaped the way YAML wants.
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{key}=" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def choose_rewards(layers: Layers, rewards: Mapping[str, float | None]) -> None:
    """Keep the options of the named rewards, and drop all other rewards.

    Args:
        layers: Changed in place.
        rewards: Weight of each reward; None leaves it as it is.

    Raises:
        ConfigError: If `--set` changes a reward that is not named.
    """
    found = layers.values.get("reward")
    known = cast(Tree, found) if isinstance(found, dict) else {}
    # An option of a dropped reward would be ignored silently.
    for key, origin in layers.origins.items():
        section, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if origin == "--set" and section == "reward" and name in known and name not in rewards:
            raise ConfigError(f"--set: {key}: {name} is not among those of --reward")
    # Not by `Layers.set`: a name may contain dots, as file.py:attribute does.
    chosen: Tree = {name: known.get(name) for name in rewards}
    for name, weight in rewards.items():
        if weight is not None:
            options = chosen[name]
            before = cast(Tree, options) if isinstance(options, dict) else {}
            chosen[name] = {**before, "weight": weight}
    layers.values["reward"] = chosen
    layers.origins["reward"] = "--reward"


def resolve(
    *,
    preset: str | None = None,
    config: Source | None = None,
    recorded: Mapping[str, Any] | None = None,
    run: Path | None = None,
    replaced: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    rewards: Mapping[str, float | None] | None = None,
    default_reward: str | None = None,
    flags: Mapping[str, Any] | None = None,
    source: str | None = None,
    training: bool = True,
) -> Config:
    """Return the complete configuration from everything the command line was given.

    Args:
        preset: Name of a shipped preset.
        config: Of the user's own; counts after the preset.
        recorded: Values from the header of a LoRA file.
        run: The folder of a run, whose configuration must be complete.
        replaced: Dotted key to the value that counts instead of the recorded one.
        assignments: Texts of `--set`.
        rewards: Those of `--reward`, with their weights; see `choose_rewards`.
        default_reward: Used if nothing names a reward.
        flags: Dotted key to value of the named flags; None values were not given.
        source: Name of the configuration in messages; None is the preset or the file.
        training: As in `validation.parse`.

    Raises:
        ConfigError, AssetError: As `read`, `override` and `validation.parse`.
    """
    layers = Layers(values=copy.deepcopy(dict(recorded or {})))
    # Later wins, so what came with the weights goes first.
    if run is not None:
        read(run / "config.yaml", layers, complete=True)
    for key, value in (replaced or {}).items():
        layers.set(key, value, "the model's own")
    stack(
        layers,
        preset=preset,
        config=config,
        assignments=assignments,
        rewards=rewards,
        flags=flags,
    )
    if default_reward is not None and not layers.values.get("reward"):
        layers.values["reward"] = {default_reward: None}
    if source is None:
        own = str(config) if isinstance(config, Path) else "config" if config else "command line"
        source = f"preset {preset}" if config is None and preset else own
    return parse(layers.values, layers.origins, source=source, training=training)


def stack(
    layers: Layers,
    *,
    preset: str | None = None,
    config: Source | None = None,
    assignments: Iterable[str] = (),
    rewards: Mapping[str, float | None] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> None:
    """Apply everything that the command line names to the layers.

    Args:
        layers: Changed in place.
        preset: As in `resolve`, and so are the others.
        config: File of the user's own.
        assignments: Texts of `--set`.
        rewards: Those of `--reward`, with their weights.
        flags: Dotted key to value of the named flags; None values were not given.

    Raises:
        ConfigError, AssetError: As `read` and `override`.
    """
    if preset is not None:
        read(preset_path(preset), layers)
    if isinstance(config, Path):
        read(config, layers)
    elif config is not None:
        add(config, layers)
    override(layers, assignments)
    if rewards:
        choose_rewards(layers, rewards)
    for key, value in (flags or {}).items():
        if value is not None:
            layers.set(key, value, flag_name(key))


def flag_name(key: str) -> str:
    """Return the flag that sets a dotted key, for messages."""
    # All other flags are named after the last part of their key.
    odd = {"model.id": "--model", "output.dir": "--output", "train.memory_limit": "--gpu-memory"}
    return odd.get(key, f"--{key.rpartition('.')[2].replace('_', '-')}")


def _merge(base: Tree, other: Mapping[str, Any]) -> None:
    """Merge nested mappings; lists and other values are replaced."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(cast(Tree, base[key]), cast(Tree, value))
        else:
            base[key] = value


def _parse(text: str, path: Path) -> tuple[Tree, dict[str, int]]:
    """Return the values of a configuration file, and the line of every dotted key."""
    tree, lines = _parse_once(text, path)
    return copy.deepcopy(tree), dict(lines)


# A run compares itself with every preset, many of which extend the same one.
@functools.lru_cache(maxsize=64)
def _parse_once(text: str, path: Path) -> tuple[Tree, dict[str, int]]:
    """Return what `_parse` does; not to be changed."""
    try:
        tree, lines = read_yaml_lines(text)
    except ParseError as error:
        place = f"{path}:{error.line}" if error.line else str(path)
        raise ConfigError(f"{place}: {error}") from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top")
    return cast(Tree, tree), lines
