"""What the official scorers of published benchmarks are given: which set, how many images.

No torch, since the command line reads it. The folders themselves are in layouts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["geneval", "geneval2", "hpsv2"]
"""A folder that such a scorer reads, by the name of the benchmark."""


@dataclass(frozen=True)
class Scorer:
    """What one of them expects.

    Args:
        title: Its benchmark's own name.
        prompts: The prompt set that it is for.
        images_per_prompt: As in the published figures.
        takes_several: Whether it reads more than one image of a prompt.
    """

    title: str
    prompts: str
    images_per_prompt: int = 1
    takes_several: bool = False


SCORERS: Mapping[Layout, Scorer] = {
    # arXiv:2310.11513, section 4: four images of each prompt.
    "geneval": Scorer("GenEval", "geneval", images_per_prompt=4, takes_several=True),
    # Its scorer is given one file by prompt.
    "geneval2": Scorer("GenEval 2", "geneval2"),
    # hpsv2's `evaluate` reads one file by the number of the prompt in its style.
    "hpsv2": Scorer("HPSv2", "hpd"),
}
