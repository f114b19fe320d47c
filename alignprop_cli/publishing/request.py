"""What a command is asked to give away besides its result. No torch: options are checked first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from alignprop_cli.errors import AlignPropError, ConfigError, did_you_mean

Kind = Literal["comfyui", "merged", "merged-single-file"]
"""A format that a LoRA is exported in; see export.py."""

KINDS: tuple[Kind, ...] = get_args(Kind)

# One folder for each, so that --overwrite knows what is its own.
EXPORT, HUB = "export", "hub"
"""The folders with exports and with what is uploaded, in that of the result."""

UPLOAD = "hub.json"
"""The file beside them that says for which id `HUB` was made, and whether it has arrived there."""

CARD, IMAGES = "README.md", "before_after.png"
"""Names of the model card and of its images in a repository."""

FILES = (
    rf"{EXPORT}/(comfyui|merged-single-file)/[^/]+\.safetensors",
    rf"{EXPORT}/merged/([^/]+/){{0,2}}[^/]+",
    rf"({HUB}/)?README\.md|{HUB}/[^/]+\.(safetensors|png)|hub\.json",
)
"""What is written into the folder of a result, as regular expressions."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        exports: Formats to write the adapter in.
        hub_id: Where on the hub it is uploaded to; None uploads nothing.
    """

    exports: tuple[Kind, ...] = ()
    hub_id: str | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is asked for."""
        return not self.exports and self.hub_id is None

    @property
    def words(self) -> str:
        """The options that ask for this on a command line, with a blank before each."""
        words = ["--export", ",".join(self.exports)] if self.exports else []
        words += ["--push-to-hub", self.hub_id] if self.hub_id is not None else []
        return f" {shlex.join(words)}" if words else ""


NOTHING = Request()
"""The result alone."""


@dataclass(frozen=True)
class Published:
    """What was done.

    Args:
        values: For programs.
        lines: For people.
        failure: What went wrong, to be raised once the result is shown; None if nothing did.
    """

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lines: Sequence[str] = ()
    failure: AlignPropError | None = None

    def check(self) -> None:
        """Raise the failure, where there is one."""
        if self.failure is not None:
            raise self.failure


Publish = Callable[[], Published]
"""Called when a result is on the disk, before it is shown."""


def read_kinds(values: Sequence[str] | None) -> tuple[Kind, ...]:
    """Return the kinds of a repeatable option, split at commas, each once.

    Raises:
        ConfigError: If there is no such kind.
    """
    # In the order of KINDS, whatever order they were typed in.
    names = [part.strip() for value in values or () for part in value.split(",")]
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--export: unknown format {name[:40]!r}.{did_you_mean(name, KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)
