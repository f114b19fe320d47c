"""What the kinds of inputs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.assets import Assets

# With these a mutated configuration is still sampled in little time.
SMALL = (
    "--images=1",
    "--batch-size=1",
    "--set=sample.num_inference_steps=2",
    "--set=gradient.k_max=1",
    "--set=sample.height=null",
    "--set=sample.width=null",
)

Domain = Callable[[Random, Path, Assets], list[str]]


def argument(text: str) -> str:
    """Return a text as an argument that the operating system can pass on."""
    return (
        text.replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    )
