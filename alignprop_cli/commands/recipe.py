"""How a soup is made: its method and the share of every member, from the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignprop_cli.errors import ConfigError

Method = Literal["exact", "factor", "svd", "ties", "dare_linear"]


@dataclass(frozen=True)
class Recipe:
    """How members are mixed; see `alignprop_cli.soup.mix`."""

    method: Method = "exact"
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    allow_missing: bool = False


_MOST_MIXES = 101


def check_recipe(recipe: Recipe) -> None:
    """Refuse options that the method does not have.

    Raises:
        ConfigError: Names the option and the methods that have it.
    """
    ranked = ("svd", "ties", "dare_linear")
    if recipe.rank is not None and recipe.method not in ranked:
        raise ConfigError(
            f"--rank: method {recipe.method} has no choice of rank",
            hint=f"--rank goes with --method {', '.join(ranked)}",
        )
    if recipe.density is None:
        return
    if recipe.method not in ranked[1:]:
        raise ConfigError(
            f"--density: method {recipe.method} prunes nothing",
            hint=f"--density goes with --method {', '.join(ranked[1:])}",
        )
    if not 0.0 < recipe.density <= 1.0:
        raise ConfigError(f"--density: expected more than 0 and at most 1, got {recipe.density:g}")


def member_shares(members: list[str], coef: str | None) -> tuple[list[str], list[float]]:
    """Return the members' names and coefficients.

    Raises:
        ConfigError: If they do not go together, or one is not a finite number.
    """
    names: list[str] = []
    given: list[float | None] = []
    for member in members:
        name, sign, share = member.rpartition("=")
        # A path may have an equals sign of its own.
        plain = not sign or Path(member).expanduser().exists()
        names.append(member if plain else name)
        given.append(None if plain else _number(share, member))
    own = [share for share in given if share is not None]
    if own and len(own) < len(names):
        raise ConfigError(
            f"soup: {len(own)} of {len(names)} members have a share",
            hint="give every member one: A=0.7 B=0.3",
        )
    if own and coef is not None:
        raise ConfigError("soup: shares are given twice, by --coef and by MEMBER=SHARE")
    if own:
        return names, own
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
        ConfigError: If it is no such range, or goes with something else than two plain members.
    """
    if len(members) != 2 or coef is not None:
        raise ConfigError("--sweep goes with two members and without --coef")
    parts = [_number(text, f"--sweep {sweep}") for text in sweep.split(":")]
    if len(parts) != 3 or parts[2] <= 0.0 or parts[1] <= parts[0]:
        raise ConfigError(f"--sweep {sweep}: expected FROM:TO:STEP, rising, such as 0:1:0.25")
    first, last, step = parts
    count = int((last - first) / step + 1e-9) + 1
    if not 2 <= count <= _MOST_MIXES:
        raise ConfigError(f"--sweep {sweep}: {count} mixes; expected 2 to {_MOST_MIXES}")
    return [round(first + number * step, 9) for number in range(count)]


def share_name(share: float) -> str:
    """Return the name of a mix's folder along a sweep."""
    return f"share-{share:g}"


def default_name(labels: list[str], coefficients: list[float], suffix: list[str]) -> str:
    """Return soup-<label>-<share>-... for the folder; of two members only the first's share."""
    if suffix:
        return "-".join(["soup", *labels, *suffix])[:200]
    if len(labels) == 2 and abs(sum(coefficients) - 1.0) < 1e-9:
        return f"soup-{labels[0]}-{labels[1]}-{coefficients[0]:g}"
    pairs = zip(labels, coefficients, strict=True)
    return "-".join(["soup", *(f"{label}-{share:g}" for label, share in pairs)])[:200]


def _number(text: str, where: str) -> float:

    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, got '{text}'")
    return number
