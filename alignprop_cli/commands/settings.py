"""The configuration of each command: from flags, presets, files, runs and LoRA files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli.commands.options import reward_names, reward_weights
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import ConfigError

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located

_DEFAULT_REWARD = "clip"
"""Measured where nothing names a reward: how well images agree with their prompts."""


def for_training(
    run: Path | None,
    preset: str | None = None,
    config: str | None = None,
    *,
    sets: Sequence[str] | None,
    reward: Sequence[str] | None,
    flags: Mapping[str, Any],
) -> Config:
    """Return the complete configuration of a run: of the one to resume, or of a new one.

    The other arguments are those of `for_evaluation`.

    Raises:
        AssetError, ConfigError: If something cannot be read, or is no complete configuration.
    """
    # There is no default reward to train on: what it raises, and for how long, must be meant.
    rewards = reward_weights(reward)
    if run is not None:
        # A run keeps its folder, wherever that has been moved to.
        preset, config, flags = None, str(run / "config.yaml"), {**flags, "output.dir": None}
    elif preset is None and config is None and not (flags["model.id"] and rewards):
        raise ConfigError(
            "train: nothing to do: give --preset or --config, or --model and --reward",
            hint="`alignprop train --preset tiny` works at once; --list-presets lists the others",
        )
    file = Path(config).expanduser() if config else None
    return presets.resolve(
        preset=preset, config=file, assignments=sets or (), rewards=rewards, flags=flags
    )


def for_scoring(sets: Sequence[str] | None, reward: Sequence[str] | None) -> Config:
    """Return a configuration of which only the rewards matter.

    Raises:
        ConfigError: If a key of `sets` is not below `reward`, which would be ignored.
    """
    # The rest of a configuration is about models and training.
    for text in sets or ():
        if not text.strip().startswith("reward."):
            raise ConfigError(
                f"--set: {text}: only reward.NAME.OPTION can be set here",
                hint="for instance --set reward.clip.model=ViT-B-32",
            )
    return presets.resolve(
        assignments=sets or (),
        rewards=dict.fromkeys(reward_names(reward)),
        default_reward=_DEFAULT_REWARD,
        source="command line",
    )


def for_evaluation(
    target: str,
    located: Located | None,
    preset: str | None = None,
    config: str | None = None,
    *,
    sets: Sequence[str] | None = None,
    reward: Sequence[str] | None = None,
    flags: Mapping[str, Any],
) -> Config:
    """Return the complete configuration of an evaluation, its rewards' options checked.

    Args:
        target: What the user named, for messages.
        located: Its LoRA; None is the base model.
        preset: Name of a preset, instead of what comes with the LoRA.
        config: File of the user's own, likewise.
        sets: `--set` texts.
        reward: Those of `--reward`.
        flags: Dotted key to value of the other flags; None values were not given.

    Raises:
        AssetError, ConfigError: If something cannot be read, or is no complete configuration.
    """
    from alignprop_cli.rewards import registry

    # What the user names replaces what comes with the weights; the two are never mixed.
    own, recorded = None, {}
    if preset is None and config is None:
        own, recorded = _own_settings(located, flags.get("model.id"))
    resolved = presets.resolve(
        preset=preset,
        config=Path(config).expanduser() if config else own,
        recorded=recorded,
        assignments=sets or (),
        rewards=dict.fromkeys(reward_names(reward)),
        default_reward=_DEFAULT_REWARD,
        flags=flags,
        source=str(own or target),
    )
    # Names and options, before anything is loaded.
    for name, member in resolved.reward.items():
        registry.check(name, member.options)
    return resolved


def _own_settings(located: Located | None, model: str | None) -> tuple[Path | None, dict[str, Any]]:
    """Return the configuration that comes with the weights: a run's file, or a header's values.

    Args:
        located: The weights; None is the base model.
        model: What the command line names as the base model.

    Raises:
        AssetError: If the configuration in the header is damaged.
        ConfigError: If there is no configuration and nothing says what the base model is.
    """
    header: Mapping[str, str] = {}
    if located is not None:
        from alignprop_cli.lora.files import read_header, recorded_config

        if located.run is not None:
            return located.run / "config.yaml", {}
        header = read_header(located.file)
        recorded = recorded_config(header, located.file)
        if recorded is not None:
            return None, recorded
    # A LoRA of another trainer, or of an older version: at least its base model may be known.
    if "alignprop.base_model" in header:
        return None, {"model": {"id": header["alignprop.base_model"]}}
    if model is None:
        what = "base" if located is None else str(located.file)
        raise ConfigError(
            f"{what}: nothing says which base model to sample with",
            hint=f"give --preset, --config or --model: alignprop evaluate {what} --preset tiny",
        )
    return None, {}
