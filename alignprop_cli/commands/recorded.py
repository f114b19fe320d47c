"""Configurations that come with weights: in the header of a LoRA, or in the folder of a run.

They may be somebody else's. `trust.refuse_untyped` checks them here, before anything that they name
is imported, read or downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli.commands.sibling import own_settings
from alignprop_cli.commands.typed import refuse_untyped, typed_values
from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import ConfigError
from alignprop_cli.rewards import registry

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located

DEFAULT_REWARD = "clip"
"""The reward if nothing names one: how well images match their prompts."""


def from_header(
    located: Located | None, header: Mapping[str, str] | None, model: str | None
) -> dict[str, Any]:
    """Return the configuration in the header of weights, or the base model that it names.

    Args:
        located: The weights; None is the base model.
        header: Used instead of the header of their file; None reads the file.
        model: The base model that the command line names.

    Raises:
        AssetError: If the configuration in the header is damaged.
        ConfigError: If there is no configuration and nothing says which base model to use.
    """
    if located is not None:
        from alignprop_cli.lora.files import read_header, recorded_config

        header = read_header(located.file) if header is None else header
        found = recorded_config(header, located.file)
        if found is not None:
            return found
    # A soup of LoRAs without a configuration still records their base model, if it is known.
    if header and "alignprop.base_model" in header:
        return {"model": {"id": header["alignprop.base_model"]}}
    if model is None:
        what = "base" if located is None else str(located.file)
        raise ConfigError(
            f"{what}: nothing says which base model to sample with",
            hint=f"give --preset, --config or --model: alignprop evaluate {what} --preset tiny",
        )
    return {}


def build(
    *,
    header: Mapping[str, Any] | None = None,
    run: Path | None = None,
    preset: str | None = None,
    config: presets.Source | None = None,
    assignments: Sequence[str] = (),
    rewards: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    source: str = "command line",
) -> Config:
    """Return the complete configuration to evaluate with.

    Later wins: defaults < header or run < preset < config < assignments < rewards < flags. Where
    the model is not the recorded one, its own settings replace recorded ones (sibling.py).

    Args:
        header: Values from the header of a LoRA file.
        run: The folder of a run, whose config.yaml is read.
        preset: Name of a shipped preset.
        config: A YAML file that the user named, or its values.
        assignments: Texts of `--set`.
        rewards: Names that replace the rewards of the files; a reward of the same name keeps its
            options.
        flags: Dotted key to value of the named flags; None values were not given.
        source: Name of the configuration in messages.

    Raises:
        ConfigError, AssetError: As `presets.resolve`, `own_settings` and `trust.refuse_untyped`.
    """
    given: dict[str, Any] = {"preset": preset, "config": config, "assignments": assignments}
    given |= {"rewards": dict.fromkeys(rewards), "flags": flags}
    given_once = {"default_reward": DEFAULT_REWARD, "source": source, "training": False}
    # A preset or a file that the user names is for the model that they name.
    own = {} if preset or config else own_settings(header, run, typed_values(given))
    found = presets.resolve(recorded=header, run=run, replaced=own, **given_once, **given)
    registry.check_given(found.reward, source)
    # Without recorded values everything was typed.
    if header or run is not None:
        refuse_untyped(found, given, source, trust.TO_EVALUATE)
    return found


def resume(
    run: Path,
    *,
    preset: str | None = None,
    config: presets.Source | None = None,
    assignments: Sequence[str] = (),
    rewards: Mapping[str, float | None] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Return the complete configuration of a run to resume.

    Args:
        run: Its folder.
        preset: Preset of a new run (with `--resume auto`). Its values are not used, but what it
            names counts as named by the user.
        config: Configuration file of a new run; used in the same way.
        assignments: Texts of `--set`.
        rewards: Those of `--reward`, which confirm rewards of the run; none is dropped.
        flags: Dotted key to value of the named flags; None values were not given.

    Raises:
        ConfigError, AssetError: As `build`.
    """
    from alignprop_cli.lora.files import checkpoints

    source = run / "config.yaml"
    recorded = presets.Layers()
    presets.read(source, recorded, complete=True)
    known, chosen = recorded.values.get("reward"), dict(rewards or {})
    # A reward that the run does not have replaces the others, which is refused later as a change.
    if chosen and isinstance(known, dict) and chosen.keys() <= known.keys():
        chosen = {**dict.fromkeys(known), **chosen}
    found = presets.resolve(
        run=run, assignments=assignments, rewards=chosen, flags=flags, source=str(source)
    )
    registry.check_given(found.reward, str(source))
    given: dict[str, Any] = {"preset": preset, "config": config, "assignments": assignments}
    given |= {"rewards": rewards, "flags": flags}
    # `lora.init` is only read until there is a checkpoint.
    keys = trust.TO_RESUME if checkpoints(run) else (*trust.TO_RESUME, "lora.init")
    refuse_untyped(found, given, str(source), keys)
    return found
