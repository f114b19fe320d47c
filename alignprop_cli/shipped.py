"""What is shipped, and may be named by a configuration that came with weights.

The rule itself is in config/trust.py, which knows no model, prompt set or reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignprop_cli.config import trust
from alignprop_cli.config.schema import PYTHON, Config
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.prompts import SETS
from alignprop_cli.rewards.catalogue import SHIPPED


def shipped_names() -> trust.ShippedNames:
    """Return the hub ids, prompt sets and options of rewards that need no typing."""
    rewards = {name: shipped.places for name, shipped in SHIPPED.items()}
    return trust.ShippedNames(models=PUBLISHED, prompts=SETS, rewards=rewards)


def python_call(
    function: str, config: Config, keys: Sequence[str] = trust.TO_EVALUATE, /, **given: Any
) -> str | None:
    """Return a call of the Python API for a run whose reward is a Python object.

    No command line can name one, so a command would be refused whatever was typed.

    Args:
        function: `train` or `evaluate`.
        config: The configuration that the run or the LoRA records.
        keys: Those that are read; what they name is given again. Empty where nothing need be.
        **given: Further arguments; those that are None or empty are left out. `target` goes first
            and without its name.

    Returns:
        None if no reward is such an object.
    """
    if not any(name.startswith(PYTHON) for name in config.reward):
        return None
    # The object by the name that its own function or class has.
    rewards = [
        name.removeprefix(PYTHON) if name.startswith(PYTHON) else repr(name)
        for name in config.reward
    ]
    overrides = trust.values_to_type(config, shipped_names(), keys=keys) if keys else {}
    arguments = {name: value for name, value in given.items() if value}
    arguments |= {"model": model} if (model := overrides.pop("model.id", None)) else {}
    first = [repr(arguments.pop("target"))] if "target" in arguments else []
    words = [*first, *(f"{name}={value!r}" for name, value in arguments.items())]
    several = ", ".join(rewards)
    words.append(f"reward={several}" if len(rewards) == 1 else f"reward=[{several}]")
    words += [f"overrides={overrides!r}"] if overrides else []
    return f"alignprop_cli.{function}({', '.join(words)})"


def next_command(command: str, config: Config, keys: Sequence[str] = trust.TO_EVALUATE) -> str:
    """Return a command with the words that its configuration, once recorded, needs beside it."""
    words = trust.words_to_type(config, shipped_names(), keys=keys)
    return f"{command} {words}" if words else command
