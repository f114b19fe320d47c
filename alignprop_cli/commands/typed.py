"""What the command line names by itself, held against a configuration that came with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config


def typed_values(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nested values of the command line alone, as no recorded value can pass for typed.

    Args:
        given: The arguments of `presets.stack`.
    """
    typed = presets.Layers()
    presets.stack(typed, **given)
    return typed.values


def refuse_untyped(
    found: Config, given: Mapping[str, Any], source: str, keys: Sequence[str]
) -> None:
    """Refuse a configuration that names anything that is neither shipped nor typed."""
    # Imports torch, so only now: mistakes in the configuration are reported without it.
    from alignprop_cli.shipped import shipped_names

    trust.refuse_untyped(found, typed_values(given), shipped_names(), source=source, keys=keys)
