"""The configuration of an adapter, as peft's `LoraConfig`: what is used of it, and what is refused.

formats.py reads it from where a file has it; it may be somebody else's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from alignprop_cli.errors import AssetError, ConfigError

# Kinds of adapter that are not a plain LoRA, by the option that makes them.
_OTHER_SETTINGS = {
    "lora_bias": "a LoRA with biases",
    "use_qalora": "a QALoRA",
    "use_bdlora": "a BD-LoRA",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "a mixture of LoRAs (Arrow)",
    "kasa_config": "a KaSA",
    "monteclora_config": "a MonteCLoRA",
    "layer_replication": "a LoRA of repeated layers",
    "target_parameters": "a LoRA of parameters instead of layers",
    "modules_to_save": "a LoRA with whole layers beside it",
    "trainable_token_indices": "a LoRA with trained tokens",
}
# The options of peft's `LoraConfig` (0.21) that change nothing once the factors are trained: what
# they are for has happened, or the tensors themselves say it.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type", "velora_config"),
}
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
# peft's initialisations that change the base weights as well.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# Bounds on what is somebody else's: of a text in a message, and of patterns, as Python's matcher
# may try every way to divide a name among the parts of one that repeat.
_LONGEST = 100
_MOST_PATTERNS, _LONGEST_PATTERN = 4096, 500
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9]")


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration whose update of a weight is more than a product of two factors.

    Args:
        settings: By the names of `LoraConfig`.
        where: File and place in it, for messages.

    Raises:
        AssetError: If an option is unknown, or `target_modules` is damaged.
        ConfigError: If it belongs to another kind of adapter.
    """
    # Anything that makes the update more than alpha / rank B A is refused, and named.
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        refuse(where, f"a {shown(kind)}")
    for option, what in _OTHER_SETTINGS.items():
        if settings.get(option):
            refuse(where, f"{what} ({option})")
    if settings.get("bias") not in (None, "none"):
        refuse(where, "a LoRA with biases (bias)")
    for option, value in settings.items():
        # What a later version adds and leaves off is no reason to refuse its files.
        if value and option not in {*_WITHOUT_EFFECT, *_OTHER_SETTINGS, *_READ}:
            raise AssetError(
                f"{where}: unknown option {shown(option)}, which may change what the LoRA does",
                hint="it is none of peft's LoraConfig",
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        raise ConfigError(
            f"{where}: init_lora_weights {shown(start)} changes the base model's weights too, "
            "which are not in the file",
            hint="save it with PEFT's path_initial_model_for_weight_conversion",
        )
    _check_targets(settings.get("target_modules"), where)


def number(settings: Mapping[str, Any], default: str, patterns: str, layer: str) -> float | None:
    """Return the number that a configuration has for a layer; patterns match the end of its name.

    Raises:
        TypeError, ValueError, re.error, AttributeError: If patterns or number are none.

    Source: `peft.utils.other.get_pattern_key`.
    """
    value = settings.get(default)
    known: Mapping[str, Any] = settings.get(patterns) or {}
    if len(known) > _MOST_PATTERNS:
        raise ValueError(f"{patterns} has {len(known)} entries")
    for pattern, number in known.items():
        if _ending(pattern).match(layer):
            value = number
            break
    if value is None:
        return None
    # In Python True is an int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {shown(value)}")
    return float(value)


@functools.lru_cache(maxsize=_MOST_PATTERNS)
def _ending(pattern: str) -> re.Pattern[str]:
    if not is_quick(pattern):
        raise ValueError(f"the pattern {shown(pattern)} is too complex")
    return re.compile(rf"(.*\.)?({pattern})$")


def flag(settings: Mapping[str, Any], name: str) -> bool:
    """Return an option that is true or false, and false where it is not given.

    Raises:
        TypeError: If it is anything else.
    """
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {shown(value)}")
    return value


def is_quick(pattern: str) -> bool:
    """Return whether matching a pattern of somebody else's against a layer's name ends soon."""
    repeats = len(re.findall(r"[*+{]", pattern))
    options = pattern.count("?") - pattern.count("(?")
    return (
        len(pattern) <= _LONGEST_PATTERN
        and not _REPEATED_GROUP.search(pattern)
        and repeats <= 2
        and options <= 2
    )


def shown(value: object) -> str:
    """Return a text or value of somebody else's, short enough for a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def refuse(where: str, what: str) -> NoReturn:
    """Refuse another kind of adapter.

    Raises:
        ConfigError: Always, with its name.
    """
    raise ConfigError(
        f"{where}: is {what}: its update of a weight is not alpha / rank B A",
        hint="LoRAs and rsLoRAs can be sampled with, trained further and mixed; DoRAs as PEFT and "
        "diffusers write them can be sampled with and trained further",
    )


def _check_targets(targets: object, where: str) -> None:
    """Refuse target modules that are neither a list of names nor one regular expression."""
    if targets is None or (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        return
    if isinstance(targets, str):
        try:
            re.compile(targets)
            return
        except re.error:
            pass
    raise AssetError(
        f"{where}: target_modules: expected names or a regular expression, got {shown(targets)}"
    )
