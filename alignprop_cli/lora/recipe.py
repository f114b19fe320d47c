"""What the command line asks of a soup: the method, and the share of every member."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignprop_cli.errors import ConfigError

Method = Literal["exact", "factor", "svd", "ties", "dare_linear"]

Format = Literal["diffusers", "comfyui"]

RANKED: tuple[Method, ...] = ("svd", "ties", "dare_linear")
"""The methods whose result has a rank to choose."""

PRUNING: tuple[Method, ...] = ("ties", "dare_linear")
"""The methods that keep only a share of every update, `density`."""


@dataclass(frozen=True)
class Recipe:
    """How members are mixed; see `alignprop_cli.lora.mixing.mix`.

    `format` is that of the file: diffusers' names, or those that ComfyUI reads.
    """

    method: Method = "exact"
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    allow_missing: bool = False
    format: Format = "diffusers"


# From 0 to 1 by 0.01. Each mix is sampled with, so more of them are a mistyped step.
_MOST_MIXES = 101


def check_recipe(recipe: Recipe) -> None:
    """Refuse options that do not go with the method.

    Raises:
        ConfigError: With the option and the methods that it goes with.
    """
    if recipe.rank is not None and recipe.method not in RANKED:
        raise ConfigError(
            f"--rank: method {recipe.method} has no choice of rank",
            hint=f"--rank goes with --method {', '.join(RANKED)}",
        )
    if recipe.density is None:
        return
    if recipe.method not in PRUNING:
        raise ConfigError(
            f"--density: method {recipe.method} prunes nothing",
            hint=f"--density goes with --method {', '.join(PRUNING)}",
        )
    if not 0.0 < recipe.density <= 1.0:
        raise ConfigError(f"--density: expected more than 0 and at most 1, got {recipe.density:g}")


def member_shares(members: list[str], coef: str | None) -> tuple[list[str], list[float]]:
    """Return the members' names and coefficients.

    Args:
        members: As typed: NAME or NAME=SHARE.
        coef: The text of `--coef`; None if it was not given.

    Raises:
        ConfigError: If names and shares do not go together, or a share is not a finite number.
    """
    # 1. NAME=SHARE: the shares that the members bring themselves.
    names: list[str] = []
    given: list[float | None] = []
    for member in members:
        name, sign, share = member.rpartition("=")
        # A path may contain an equals sign.
        plain = not sign or Path(member).expanduser().exists()
        names.append(member if plain else name)
        given.append(None if plain else _number(share, member))
    typed = [share for share in given if share is not None]
    if typed and len(typed) < len(names):
        raise ConfigError(
            f"soup: {len(typed)} of {len(names)} members have a share",
            hint="give every member one: A=0.7 B=0.3",
        )
    if typed and coef is not None:
        raise ConfigError("soup: shares are given twice, by --coef and by MEMBER=SHARE")
    if typed:
        return names, typed

    # 2. Otherwise those of --coef, where of two members the second gets the rest; or equal shares.
    if coef is None:
        return names, [1.0 / len(names)] * len(names)
    shares = [_number(text, f"--coef {coef}") for text in coef.split(",")]
    if len(shares) == 1 and len(names) == 2:
        shares.append(1.0 - shares[0])
    if len(shares) != len(names):
        raise ConfigError(
            f"--coef: {len(shares)} shares for {len(names)} members",
            hint="give one for each, such as --coef 0.2,0.3,0.5; one alone goes with two members",
        )
    return names, shares


def sweep_shares(sweep: str, members: list[str], coef: str | None) -> list[float]:
    """Return the shares of the first member along a sweep, both ends included.

    Raises:
        ConfigError: If the range is wrong, or there are not exactly two members without shares.
    """
    if len(members) != 2 or coef is not None:
        raise ConfigError("--sweep goes with two members and without --coef")
    parts = [_number(text, f"--sweep {sweep}") for text in sweep.split(":")]
    if len(parts) != 3 or parts[2] <= 0.0 or parts[1] <= parts[0]:
        raise ConfigError(f"--sweep {sweep}: expected FROM:TO:STEP, rising, such as 0:1:0.25")
    first, last, step = parts
    # Rounding must not lose the end of 0:1:0.1, nor show 0.30000000000000004 as a share.
    count = int((last - first) / step + 1e-9) + 1
    if not 2 <= count <= _MOST_MIXES:
        raise ConfigError(f"--sweep {sweep}: {count} mixes; expected 2 to {_MOST_MIXES}")
    return [round(first + number * step, 9) for number in range(count)]


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, got '{text}'")
    return number
