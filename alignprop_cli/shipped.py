"""What is shipped, and may be named by a configuration that came with weights.

The rule itself is in config/trust.py, which knows no model, prompt set or reward.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignprop_cli.config import trust
from alignprop_cli.config.schema import Config
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.prompts import SETS
from alignprop_cli.rewards.catalogue import SHIPPED


def shipped_names() -> trust.ShippedNames:
    """Return the hub ids, prompt sets and options of rewards that need no typing."""
    rewards = {name: shipped.places for name, shipped in SHIPPED.items()}
    return trust.ShippedNames(models=PUBLISHED, prompts=SETS, rewards=rewards)


def next_command(command: str, config: Config, keys: Sequence[str] = trust.TO_EVALUATE) -> str:
    """Return a command with the words that its configuration, once recorded, needs beside it."""
    words = trust.words_to_type(config, shipped_names(), keys=keys)
    return f"{command} {words}" if words else command
