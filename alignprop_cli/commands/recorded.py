"""Configurations that came with weights: in the header of a LoRA, or in the folder of a run.

They may be somebody else's, and are held to `trust.refuse_untyped` here, before anything that they
name is imported, read or fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import ConfigError

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located

DEFAULT_REWARD = "clip"
"""Measured where nothing names a reward: how well images agree with their prompts."""


def from_header(
    located: Located | None, header: Mapping[str, str] | None, model: str | None
) -> dict[str, Any]:
    """Return the configuration in the header of weights, or the base model that it names.

    Args:
        located: The weights; None is the base model.
        header: Instead of that of their file.
        model: What the command line names as the base model.

    Raises:
        AssetError: If the configuration in the header is damaged.
        ConfigError: If there is none and nothing says what the base model is.
    """
    if located is not None:
        from alignprop_cli.lora.files import read_header, recorded_config

        header = read_header(located.file) if header is None else header
        found = recorded_config(header, located.file)
        if found is not None:
            return found
    # A LoRA of another trainer, or of an older version: at least its base model may be known.
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
    config: Path | None = None,
    assignments: Sequence[str] = (),
    rewards: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    source: str = "command line",
) -> Config:
    """Return the complete configuration to evaluate with.

    Later wins: defaults < header or run < preset < config < assignments < rewards < flags.

    Args:
        header: Values that a LoRA file carries.
        run: The folder of a run, whose config.yaml counts.
        preset: Name of a shipped preset.
        config: A YAML file that the user named.
        assignments: `--set` texts.
        rewards: Names; replace those of the files, whose options stay where the name is the same.
        flags: Dotted key to value of the named flags; None values were not given.
        source: What to call all this in a message.

    Raises:
        ConfigError, AssetError: As `presets.resolve` and `trust.refuse_untyped`.
    """
    given: dict[str, Any] = {"preset": preset, "config": config, "assignments": assignments}
    given |= {"rewards": dict.fromkeys(rewards), "flags": flags}
    found = presets.resolve(
        recorded=header, run=run, default_reward=DEFAULT_REWARD, source=source, **given
    )
    if header or run is not None:
        _refuse_untyped(found, given, source, trust.TO_EVALUATE)
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
    """Return the complete configuration of a run to resume.

    Args:
        run: Its folder.
        preset: What a new run would be made of, where that was given too: nothing of it counts, but
            what it names is named by the user.
        config: Likewise.
        assignments: `--set` texts.
        rewards: Those of `--reward`. Rewards of the run are confirmed by that; none is dropped.
        flags: Dotted key to value of the named flags; None values were not given.

    Raises:
        ConfigError, AssetError: As `build`.
    """
    from alignprop_cli.lora.files import checkpoints

    source = run / "config.yaml"
    recorded = presets.Layers()
    presets.read(source, recorded, complete=True)
    own, chosen = recorded.values.get("reward"), dict(rewards or {})
    # A reward that the run does not have replaces the others, and is refused later: another run.
    if chosen and isinstance(own, dict) and chosen.keys() <= own.keys():
        chosen = {**dict.fromkeys(own), **chosen}
    found = presets.resolve(
        run=run, assignments=assignments, rewards=chosen, flags=flags, source=str(source)
    )
    given: dict[str, Any] = {"preset": preset, "config": config, "assignments": assignments}
    given |= {"rewards": rewards, "flags": flags}
    # With a checkpoint nothing is read from where the run began.
    keys = trust.TO_RESUME if checkpoints(run) else (*trust.TO_RESUME, "lora.init")
    _refuse_untyped(found, given, str(source), keys)
    return found


def _refuse_untyped(
    found: Config, given: Mapping[str, Any], source: str, keys: Sequence[str]
) -> None:
    """Refuse a configuration that names what neither is shipped nor was given."""
    # After the configuration is complete: this loads torch, and mistakes are told without.
    from alignprop_cli.shipped import shipped_names

    # What the command line says alone, so that nothing recorded can pass for it.
    typed = presets.Layers()
    presets.stack(typed, **given)
    trust.refuse_untyped(found, typed.values, shipped_names(), source=source, keys=keys)
