"""What a file that is given away says: nothing about the machine that it was made on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignprop_cli.config.schema import EMBEDDED_MODELS, SampleConfig
from alignprop_cli.parsing import ParseError, read_json

_KEPT = ("version", "base_fingerprint", "step", "seed", "ema_decay")
_OF_A_MEMBER = ("sha256", "coefficient")
_WEIGHTS = ("revision", "variant")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def base_model(name: str | None, *, is_local: bool = False) -> str | None:
    """Return a base model's name as others may know it; None for a path of this machine.

    Args:
        name: As on this machine.
        is_local: Whether it is known to be a path, such as a folder that looks like a hub id.
    """
    if name is None or name in EMBEDDED_MODELS:
        return name
    # A hub id can be a folder here as well; then it was that folder.
    return name if _HUB_ID.fullmatch(name) and not is_local and not Path(name).exists() else None


def is_local(header: Mapping[str, str]) -> bool:
    """Return whether a LoRA's header says that its base model is a path of that machine."""
    # Whoever mixes it need not be in the folder that the path is relative to.
    return header.get("alignprop.base_is_local") == "true"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return what each of several names is called without its folders, no two alike."""
    found: dict[str, str] = {}
    for name in names:
        short, number = last_part(name), 1
        called = short
        while called in found.values() and name not in found:
            number += 1
            called = f"{short} ({number})"
        found.setdefault(name, called)
    return found


def last_part(name: str) -> str:
    """Return a name without the folders before it, such as that of a reward in a file."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def sample(found: object) -> dict[str, Any]:
    """Return the `sample` section that a header records; empty if it is none."""
    # It may be somebody else's, who need not keep to the schema.
    try:
        return SampleConfig.model_validate(found).model_dump(mode="json", exclude_unset=True)
    except ValueError:
        return {}


def named_weights(model: Mapping[str, Any]) -> dict[str, str]:
    """Return `revision` and `variant` of a `model` section, where they are named and count.

    Args:
        model: The section, which may be somebody else's.
    """
    # A single file is what it is, whatever variant a preset names for the hub's model.
    names = ("revision",) if str(model.get("id")).endswith(".safetensors") else _WEIGHTS
    return {name: model[name] for name in names if isinstance(model.get(name), str)}


def header(found: Mapping[str, str]) -> dict[str, str]:
    """Return what a LoRA's header may tell others.

    The configuration of the run is not among it, as that names files and folders.

    Args:
        found: The header of the file on this machine.
    """
    # A list of what is kept, not of what is left out: a new key stays here until somebody decides.
    kept = {key: found[key] for part in _KEPT if (key := f"alignprop.{part}") in found}
    known = base_model(found.get("alignprop.base_model"), is_local=is_local(found))
    if known is not None:
        kept["alignprop.base_model"] = known
    if rewards := found.get("alignprop.rewards"):
        kept["alignprop.rewards"] = ",".join(short_names(rewards.split(",")).values())
    if members := _members(found.get("alignprop.merged_from", "[]")):
        kept["alignprop.merged_from"] = members
    return kept


def _members(text: str) -> str | None:
    """Return what a soup is made of, the members without their folders."""
    try:
        members = [
            {"name": last_part(str(one["name"]))} | {k: one[k] for k in _OF_A_MEMBER if k in one}
            for one in read_json(text)
        ]
    except (ParseError, LookupError, TypeError):
        return None  # somebody else's
    return json.dumps(members) if members else None
