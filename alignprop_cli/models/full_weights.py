"""Refuse weights that were quantised before they came here.

What is quantised already was made for inference by one library: its layers need not pass a gradient
on, keep unpacked weights for backward, or need a GPU to be loaded. `model.quantize` makes layers
that do what training needs, from full weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from alignprop_cli.errors import ConfigError

KEY = "quantization_config"
"""What diffusers and transformers write into the config.json of a part that they quantised."""

# What quantisers put beside a packed weight or in its place: bitsandbytes (absmax, quant_state),
# ComfyUI's fp8 (scaled_fp8, scale_weight, comfy_quant), fp8 of vLLM and ModelOpt (weight_scale),
# GPTQ, AWQ and nunchaku (qweight, wscales).
_BESIDE = re.compile(
    r"(^|[._])(absmax|nested_absmax|quant_map|quant_state\.\w+|scaled_fp8|scale_weight|scale_input"
    r"|comfy_quant|weight_scale(_inv|_2)?|input_scale|qweight|qzeros|wscales|wcscales)$"
)

_HINT = (
    "set model.id to the full weights that it was made from, and model.quantize: nf4 or int8 to "
    "hold them in fewer bits; the LoRA belongs to both"
)


def check_config(values: Mapping[str, Any], place: str) -> None:
    """Refuse the configuration of a part whose weights are quantised.

    Args:
        values: The configuration.
        place: Its file, for messages.

    Raises:
        ConfigError: If it says so.
    """
    found = values.get(KEY)
    if found in (None, False, {}):
        return
    method = cast(Mapping[str, Any], found).get("quant_method") if isinstance(found, dict) else None
    raise quantised(f"{place}: {KEY}", str(method)[:40] if method else "by some method")


def check_names(names: Iterable[str], place: str) -> None:
    """Refuse a part or a file that has the tensors of a quantiser.

    Args:
        names: Of its tensors.
        place: Where they are, for messages.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if _BESIDE.search(name):
            raise quantised(place, f"it has a tensor {name}")


def quantised(place: str, how: str) -> ConfigError:
    """Return the error about weights that are quantised already."""
    return ConfigError(
        f"model.id: {place}: these weights are quantised already ({how}), and cannot be trained "
        "through",
        hint=_HINT,
    )
