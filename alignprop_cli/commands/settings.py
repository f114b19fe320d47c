"""The configuration of `evaluate` and `score`, and of a run to go on with.

That of a run, a LoRA's header, a preset, or nothing but rewards. What comes with weights is held to
`trust.refuse_untyped` here, before anything that it names is imported, read or fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop_cli import presets, trust
from alignprop_cli.config import Config
from alignprop_cli.errors import ConfigError
from alignprop_cli.validation import parse


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
    run: Path | None = None,
    assignments: Iterable[str] = (),
    rewards: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    source: str = "command line",
) -> Config:
    """Return a complete configuration.

    Later wins: defaults < header or run < preset < config < assignments < rewards < flags.

    Args:
        preset: Name of a shipped preset.
        config: A YAML file that the user named.
        header: Values that a LoRA file carries.
        run: The folder of a run, whose config.yaml counts.
        assignments: `--set` texts.
        rewards: Names; replace those of the files, whose options stay where the name is the same.
            Without any name here or there it is `clip`.
        flags: For each dotted key the flag's name and its value; None was not given.
        source: What to call all this in a message.

    Raises:
        ConfigError, AssetError: As `presets.read`, `presets.override`, `config.parse` and
            `trust.refuse_untyped`.
    """
    given: dict[str, Any] = {
        "preset": preset,
        "config": config,
        "assignments": list(assignments),
        "rewards": dict.fromkeys(rewards),
        "flags": flags,
    }
    layers = presets.Layers(values=dict(header or {}))
    if run is not None:
        presets.read(run / "config.yaml", layers, complete=True)
    presets.stack(layers, **given)
    if not layers.values.get("reward"):
        layers.values["reward"] = {"clip": None}
    found = parse(layers.values, layers.origins, source=source)
    if header or run is not None:
        typed = presets.Layers()
        presets.stack(typed, **given)
        trust.refuse_untyped(found, typed.values, _shipped(), source=source)
    return found


def resume(
    run: Path,
    *,
    preset: str | None = None,
    config: Path | None = None,
    assignments: Sequence[str] = (),
    rewards: Mapping[str, float | None] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Return the complete configuration of a run to go on with.

    Args:
        run: Its folder.
        preset: What a new run would be made of, where that was given too: nothing of it counts, but
            what it names is named by the user.
        config: Likewise.
        assignments: `--set` texts.
        rewards: Those of `--reward`. Rewards of the run are confirmed by that; none is dropped.
        flags: Dotted key to value of the named flags; None was not given.

    Raises:
        ConfigError, AssetError: As `build`.
    """
    from alignprop_cli import checkpoint

    source = run / "config.yaml"
    layers, typed, named = presets.Layers(), presets.Layers(), presets.named(flags or {})
    presets.read(source, layers, complete=True)
    own, chosen = layers.values.get("reward"), dict(rewards or {})
    # A reward that the run does not have takes the place of the others, and is refused later.
    if chosen and isinstance(own, dict) and chosen.keys() <= own.keys():
        chosen = {**dict.fromkeys(own), **chosen}
    presets.stack(layers, assignments=assignments, rewards=chosen, flags=named)
    found = parse(layers.values, layers.origins, source=str(source))
    presets.stack(
        typed,
        preset=preset,
        config=config,
        assignments=assignments,
        rewards=rewards,
        flags=named,
    )
    # With a checkpoint nothing is read from where the run began.
    keys = trust.TO_TRAIN if checkpoint.checkpoints(run) else (*trust.TO_TRAIN, "lora.init")
    trust.refuse_untyped(found, typed.values, _shipped(), source=str(source), keys=keys)
    return found


def next_command(command: str, config: Config, keys: Sequence[str] = trust.TO_DRAW) -> str:
    """Return a command with the words that a recorded configuration needs to be typed with it."""
    words = trust.words_to_type(config, _shipped(), keys=keys)
    return f"{command} {words}" if words else command


def _shipped() -> trust.Shipped:
    """Return what may be named by a file that came with weights."""
    from alignprop_cli.models.registry import PUBLISHED
    from alignprop_cli.prompts import SETS
    from alignprop_cli.rewards.registry import SHIPPED

    return trust.Shipped(
        models=PUBLISHED,
        prompts=SETS,
        rewards={name: spec.places for name, spec in SHIPPED.items()},
    )


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
