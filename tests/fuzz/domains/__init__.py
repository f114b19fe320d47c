"""The kinds of inputs: each function writes one into an empty folder, and returns a command.

An input is a function of the numbers that its generator of random numbers gives, so a number is all
that has to be kept to make it again. Most commands are cheap: they read the input and do little.
"""

from tests.fuzz.domains.adapters import loras, runs
from tests.fuzz.domains.base import Domain
from tests.fuzz.domains.configuration import assignments, configs, prompts
from tests.fuzz.domains.flags import flags
from tests.fuzz.domains.pictures import images, rows, texts
from tests.fuzz.domains.sharing import sharing

DOMAINS: dict[str, tuple[Domain, float]] = {
    "configs": (configs, 0.16),
    "assignments": (assignments, 0.16),
    "prompts": (prompts, 0.07),
    "loras": (loras, 0.16),
    "images": (images, 0.10),
    "texts": (texts, 0.10),
    "rows": (rows, 0.08),
    "runs": (runs, 0.05),
    "flags": (flags, 0.07),
    "sharing": (sharing, 0.05),
}
"""Each domain with its share of all inputs."""
