"""The configuration of each command, from flags, presets, files, runs and LoRA files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli.commands import recorded
from alignprop_cli.commands.options import reward_weights, split_names
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import AlignPropError, ConfigError
from alignprop_cli.paths import user_path

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located
    from alignprop_cli.lora.soup import Soup


def for_training(
    run: Path | None,
    preset: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    *,
    sets: Sequence[str] | None,
    reward: Sequence[str] | None,
    flags: Mapping[str, Any],
) -> Config:
    """Return the complete configuration of a run: the one to resume, or a new one.

    Args:
        run: The folder of the run to resume; None starts a new one.
        preset: As in `for_evaluation`, and so are the others.
        config: File, or its values.
        sets: Texts.
        reward: Names or NAME:WEIGHT.
        flags: None values were not given.

    Raises:
        AssetError, ConfigError: If something cannot be read, or the configuration is incomplete.
    """
    rewards = reward_weights(reward)  # no default: what a model is trained on must be said
    own = _source(config)
    given: dict[str, Any] = {"preset": preset, "config": own, "assignments": sets or ()}
    if run is not None:
        # A run keeps its folder, wherever that has been moved to.
        return recorded.resume(run, **given, rewards=rewards, flags={**flags, "output.dir": None})
    if preset is None and config is None and not (flags["model.id"] and rewards):
        raise ConfigError(
            "train: nothing to do: give --preset or --config, or --model and --reward",
            hint="try `alignprop train --preset tiny`; --list-presets lists the others",
        )
    return presets.resolve(**given, rewards=rewards, flags=flags)


def for_evaluation(
    target: str,
    located: Located | None,
    preset: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    *,
    header: Mapping[str, str] | None = None,
    sets: Sequence[str] | None = None,
    reward: Sequence[str] | None = None,
    flags: Mapping[str, Any],
) -> Config:
    """Return the complete configuration of an evaluation, its rewards' options checked.

    Args:
        target: The target as typed, for messages.
        located: Its LoRA; None is the base model.
        preset: Name of a preset, used instead of what comes with the LoRA.
        config: File of the user's own or its values, used instead of what comes with the LoRA.
        header: Used instead of the header of the LoRA's file; None reads the file.
        sets: Texts of `--set`.
        reward: Values of `--reward`.
        flags: Dotted key to value of the other flags; None values were not given.

    Raises:
        AssetError, ConfigError: As `recorded.build`; if nothing says what the base model is.
    """
    from alignprop_cli.rewards import registry

    run, values = None, {}
    # A preset or a file of the user replaces what comes with the weights; the two never mix.
    if preset is None and config is None:
        run = None if located is None else located.run
        values = {} if run else recorded.from_header(located, header, flags.get("model.id"))
    resolved = recorded.build(
        header=values,
        run=run,
        preset=preset,
        config=_source(config),
        assignments=sets or (),
        rewards=split_names(reward, "--reward"),
        flags=flags,
        source=target if run is None else str(run / "config.yaml"),
    )
    # Wrong names and options are reported now, before anything is loaded.
    for name, member in resolved.reward.items():
        registry.check(name, member.options)
    registry.check_embedded(resolved.reward, resolved.model.id)
    return resolved


def _source(config: str | Mapping[str, Any] | None) -> presets.Source | None:
    """Return a configuration of the user's own, as `presets` takes it."""
    return user_path(config, "--config") if isinstance(config, str) else config


def for_soup(made: Soup, **given: Any) -> Config:
    """Return the configuration to evaluate mixes with, from their members; see `for_evaluation`."""
    first = made.source
    return for_evaluation(str(first.file), first, header=made.header, **given)


def evaluate_command(folder: Path, header: Mapping[str, str]) -> str:
    """Return the command that evaluates a mix of LoRAs, complete with the options that it needs.

    Args:
        folder: Folder of the mix.
        header: Header of its file.
    """
    from alignprop_cli.lora.files import Located
    from alignprop_cli.shipped import next_command, python_call

    command = f"alignprop evaluate {shlex.quote(str(folder))}"
    try:
        values = recorded.from_header(Located(folder), header, None)
        reward = recorded.DEFAULT_REWARD
        config = presets.resolve(recorded=values, default_reward=reward, training=False)
    except AlignPropError:
        return command  # which will say what is missing
    return python_call("evaluate", config, target=str(folder)) or next_command(command, config)
