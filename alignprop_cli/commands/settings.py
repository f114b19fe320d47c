"""The configuration of `evaluate` and `score`: that of a run, a preset, or nothing but rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError


def reward_names(values: Sequence[str] | None) -> list[str]:
    """Return the names given by a repeatable option, each with commas; each name once."""
    parts = [part.strip() for value in values or () for part in value.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def reward_weights(values: Sequence[str] | None) -> dict[str, float | None]:
    """Return the weight of each reward named as NAME or NAME:WEIGHT; None where none is given.

    Raises:
        ConfigError: If a name comes twice.
    """
    found: dict[str, float | None] = {}
    for text in reward_names(values):
        name, _, last = text.rpartition(":")
        try:
            # file.py:attribute, even where the attribute is called nan
            weight = float(last) if name and not last.isidentifier() else None
        except ValueError:
            weight = None
        name = name if weight is not None else text
        if name in found:
            raise ConfigError(f"--reward: {name} is given twice")
        found[name] = weight
    return found


def build(
    *,
    preset: str | None = None,
    config: Path | None = None,
    header: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    rewards: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    source: str = "command line",
) -> Config:
    """Return a complete configuration.

    Later wins: defaults < header < preset < config < assignments < rewards < flags.

    Args:
        preset: Name of a shipped preset.
        config: A YAML file, such as that of a run.
        header: Values that a LoRA file carries.
        assignments: `--set` texts.
        rewards: Names; replace those of the files, whose options stay where the name is the same.
            Without any name here or there it is `clip`.
        flags: For each dotted key the flag's name and its value; None was not given.
        source: What to call all this in a message.

    Raises:
        ConfigError, AssetError: As `presets.read`, `presets.override` and `config.parse`.
    """
    layers = presets.Layers(values=dict(header or {}))
    if preset is not None:
        presets.read(presets.preset_path(preset), layers)
    if config is not None:
        presets.read(config, layers)
    presets.override(layers, assignments)
    if rewards:
        presets.choose_rewards(layers, dict.fromkeys(rewards))
    elif not layers.values.get("reward"):
        layers.values["reward"] = {"clip": None}
    for key, (flag, value) in (flags or {}).items():
        if value is not None:
            layers.set(key, value, flag)
    return parse(layers.values, layers.origins, source=source)


def only_rewards(assignments: Sequence[str]) -> None:
    """Refuse `--set` keys that a command which only measures would ignore.

    Raises:
        ConfigError: If a key is not below `reward`.
    """
    for text in assignments:
        if not text.strip().startswith("reward."):
            raise ConfigError(
                f"--set: {text}: only reward.NAME.OPTION can be set here",
                hint="for instance --set reward.clip.model=ViT-B-32",
            )
