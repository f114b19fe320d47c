"""Values that programs do not expect, and ways to damage bytes and data."""

from __future__ import annotations

import copy
import sys
from random import Random
from typing import Any

# To build what is nested more deeply than programs read.
sys.setrecursionlimit(20_000)

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**63, -(2**63) - 1, 10**30, 10**300,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip

TEXTS = (
    "", " ", "x", "\0", "a\0b", "\x1b[2J\x1b]0;title\x07", "\x9b31m", "\u202egnp.exe", "\u2028",
    "\ud800", "\udcff", "a" * 300, "word " * 3000, "\r", "a\nb", "\t", "~nosuchuser/x", ".",
    "/nosuch", "/dev/zero/x", "no", "010", "1:30", "null", "true", "1e5", "NaN", "[red]", "[/]",
    "{}", "{x}", "%s%n", "${HOME}", "😀" * 40, "é\u0301", "<script>x()</script>", "mine.py:f",
    "os:system", "base", "tiny", "clip", "shapes", "=", ":", ",", "-", "--", "*", "**/*", "[", "(",
    "a=b=c", "0:1:0.5", "hpd:photo", "hpd:nosuch", "file.txt/below", "nosuch/folder/x.txt",
)  # fmt: skip


def nested(depth: int, rng: Random) -> Any:
    """Return lists or mappings inside each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def value(rng: Random) -> Any:
    """Return any plain value."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.choice((None, True, False))
    if kind == 8:
        return nested(rng.choice((1, 3, 40, 150, 600)), rng)
    return rng.choice(([], {}, [None], {"": ""}, [1, "a"], {"weight": 1}, [[1, 2], [3]]))


def mutate(data: Any, rng: Random, times: int = 1) -> Any:
    """Return a copy of plain data with some of it replaced, removed, repeated or renamed."""
    data = copy.deepcopy(data)
    for _ in range(times):
        data = _mutate_once(data, rng)
    return data


def _mutate_once(data: Any, rng: Random) -> Any:
    places = list(_places(data))
    if not places or rng.random() < 0.03:
        return value(rng)
    owner, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind < 3:
        owner[key] = value(rng)
    elif kind == 3:
        del owner[key]
    elif kind == 4 and isinstance(owner, dict):
        name = rng.choice((rng.choice(TEXTS), str(key) + "x", str(key).upper(), str(key)[1:]))
        owner[name] = owner.pop(key)
    else:
        # Something from elsewhere in the same data.
        other, place = rng.choice(places)
        owner[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else value(rng))
    return data


def _places(data: Any) -> Any:
    waiting = [data]
    while waiting:
        owner = waiting.pop()
        items = (
            owner.items()
            if isinstance(owner, dict)
            else enumerate(owner)
            if isinstance(owner, list)
            else ()
        )
        for key, inner in items:
            yield owner, key
            waiting.append(inner)


def damage(data: bytes, rng: Random, times: int = 1) -> bytes:
    """Return bytes with some changed, removed, added or cut off."""
    found = bytearray(data)
    for _ in range(times):
        size = len(found)
        at = rng.randrange(size + 1)
        # Headers, where most of the meaning is, come first.
        if rng.random() < 0.4:
            at = min(at, rng.randrange(200))
        kind = rng.randrange(9)
        length = rng.choice((1, 1, 2, 4, 8, 100, 5000))
        if kind == 0 and at < size:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + length] = rng.randbytes(min(length, size - at))
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            found[at:at] = rng.randbytes(length)
        elif kind == 5:
            found[at : at + length] = bytes(min(length, size - at))
        elif kind == 6:
            found[at : at + length] = b"\xff" * min(length, size - at)
        elif kind == 7:
            found[at:at] = found[at : at + length]
        else:
            text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
            found[at : at + rng.choice((0, len(text)))] = text
    return bytes(found)
