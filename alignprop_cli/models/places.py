"""Which options of the model section mean something for which kind of place a model is in."""

from __future__ import annotations

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError

# What kinds of `model.id` an option of the section is for.
_KINDS = {
    "revision": ("a hub id",),
    # A single file is what it is, but presets name a variant for the hub's model.
    "variant": ("a hub id", "a folder", "a single file"),
    "config": ("a single file",),
}


def check(config: ModelConfig, kind: str) -> None:
    """Refuse an option that is for another kind of `model.id`, where it would have no effect.

    Args:
        config: The section.
        kind: `a hub id`, `a folder`, `a single file` or `an embedded model`.

    Raises:
        ConfigError: With the first such option.
    """
    for key, kinds in _KINDS.items():
        value = getattr(config, key)
        if value is not None and kind not in kinds:
            raise ConfigError(
                f"model.{key}: {value[:100]}: it is for {' or '.join(kinds)}, and model.id "
                f"{config.id} is {kind}",
                hint=f"leave it out, or set model.{key}=null where a preset or a file gives it",
            )
