"""How strongly `alignprop evaluate` uses a LoRA, and from when on: `--scale`, `--base-until`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from alignprop_cli.errors import ConfigError

if TYPE_CHECKING:
    from alignprop_cli.lora.files import Located

ScaleOption = Annotated[
    str | None, typer.Option("--scale", help="strengths of the LoRA: 0,0.5,1; 1 is as trained")
]
BaseUntilOption = Annotated[
    str | None,
    typer.Option(
        "--base-until",
        help="shares of the chain's calls, from the noise on, that run without the LoRA: 0,0.3,0.6",
    ),
]


@dataclass(frozen=True)
class Chosen:
    """What is compared: a LoRA at several strengths, or after several shares of the base model.

    Args:
        strengths: The strengths, rising; None where none were given.
        base_until: The shares, rising; None where none were given.
    """

    strengths: Sequence[float] | None
    base_until: Sequence[float] | None

    @property
    def axis(self) -> str:
        """Return the title of the curve's x axis."""
        varied = self.base_until is not None and len(self.base_until) > 1
        return "share of calls without the LoRA" if varied else "strength of the LoRA"


def choose(scale: str | None, base_until: str | None, located: Sequence[Located]) -> Chosen:
    """Read both options; rising, since they are the x values of a curve.

    Raises:
        ConfigError: If one is no list of numbers or goes with no single LoRA, if a share is outside
            [0, 1], or if both have several values.
    """
    strengths = _numbers("--scale", scale, located)
    shares = _numbers("--base-until", base_until, located)
    if shares is not None and not all(0.0 <= share <= 1.0 for share in shares):
        raise ConfigError(f"--base-until {base_until}: expected shares from 0 to 1")
    if strengths and shares and min(len(strengths), len(shares)) > 1:
        raise ConfigError("--scale and --base-until: only one of them may have several values")
    return Chosen(strengths, shares)


def _numbers(option: str, text: str | None, located: Sequence[Located]) -> list[float] | None:
    """Return the numbers of an option, each once, rising; None if it is not given."""
    if text is None:
        return None
    if len(located) != 1:
        raise ConfigError(f"{option} goes with one LoRA, got {len(located)}")
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"{option} {text}: expected numbers such as 0,0.5,1") from error
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"{option} {text}: expected finite numbers")
    return found
