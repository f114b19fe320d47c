"""A LoRA sampled with another checkpoint than it was trained on: which of its settings still hold.

LoRAs of a base model are mostly used with a distilled model of the same architecture, which has
its own steps, guidance and noise levels. So those that were recorded do not count there, but for
the size of the images, which the LoRA knows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config, ModelConfig
from alignprop_cli.errors import AssetError, ConfigError

_STEPS, _GUIDANCE = "sample.num_inference_steps", "sample.guidance_scale"
# What belongs to the model that a LoRA was trained on, and gets the schema's default.
_OF_THE_MODEL = {
    "model": ("revision", "variant", "config"),
    "sample": ("guidance_interval", "scheduler", "spacing", "eta"),
}


def own_settings(
    header: Mapping[str, Any] | None, run: Path | None, typed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the dotted keys of a recorded configuration that another model has its own values of.

    Args:
        header: The nested values in the header of a LoRA; may be somebody else's.
        run: The folder of a run, whose config.yaml counts instead; None for no run.
        typed: The nested values from the command line alone.

    Returns:
        Values to use instead, unless others are typed; empty where the model is the recorded one.

    Raises:
        AssetError, ConfigError: As `presets.read`; also if the model is of no family that is
            supported, or its steps or guidance are neither typed nor known.
    """
    recorded = header or {}
    if run is not None:
        layers = presets.Layers()
        presets.read(run / "config.yaml", layers, complete=True)
        recorded = layers.values
    trained_on, wanted = _at(recorded, "model", "id"), _at(typed, "model", "id")
    if not isinstance(wanted, str) or _place(wanted) == _place(trained_on):
        return {}
    # 1. All that is of the recorded model.
    own: dict[str, Any] = {}
    defaults = Config().model_dump(mode="json")
    if trained_on is not None:
        for section, keys in _OF_THE_MODEL.items():
            own |= {f"{section}.{key}": defaults[section][key] for key in keys}
    # 2. Steps and guidance, where they are not typed.
    missing = [key for key in (_STEPS, _GUIDANCE) if _at(typed, *key.split(".")) is None]
    if not missing:
        return own
    # Imports torch, so only now.
    from alignprop_cli.models.defaults import own_sampling

    try:
        model = ModelConfig(id=wanted, revision=_at(typed, "model", "revision"))
    except ValidationError:
        return {}  # told later, with everything else that is wrong
    try:
        known = own_sampling(model)
    except AssetError:
        return own  # told when it is opened, after what is wrong in the options
    if known is not None:
        return own | dict(zip((_STEPS, _GUIDANCE), known, strict=True))
    # Without a record nothing is known that could be wrong here: the schema's defaults stay.
    if trained_on is None:
        return own
    there = [_at(recorded, *key.split(".")) for key in missing]
    numbers = all(isinstance(value, int | float) for value in there)
    raise ConfigError(
        f"--model {wanted}: {' and '.join(missing)} of this model are not known, and those of "
        "the LoRA's own configuration are for the model it was trained on",
        hint="give them: "
        + " ".join(f"--set {key}=NUMBER" for key in missing)
        + (f" (the LoRA has {' and '.join(f'{value:g}' for value in there)})" if numbers else ""),
    )


def _place(model: object) -> object:
    """Return a model's name in one spelling: ./model and /data/model may be one folder."""
    # As texts alone: a recorded path is not looked at.
    named = model if isinstance(model, str) else ""
    local = named.startswith((".", "~", "/"))
    return os.path.abspath(os.path.expanduser(named)) if local else model  # noqa: PTH100, PTH111


def _at(tree: Mapping[str, Any], *path: str) -> Any:
    """Return the value at a path in nested mappings; None where there is none."""
    found: Any = tree
    for part in path:
        found = cast(Mapping[str, Any], found).get(part) if isinstance(found, Mapping) else None
    return found
