"""What the configuration files of a Stable Diffusion say, and what of it is obeyed here.

The files come with the weights, and a setting may change what the network needs or computes. Each
one that would change the images and is not obeyed is refused, with its file and key, and so is a
value that the libraries would stumble over later. `--dry-run` looks at the same files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.models.rules import NOTHING as _NOTHING
from alignprop_cli.models.rules import SIZE as _SIZE
from alignprop_cli.models.rules import Rule
from alignprop_cli.models.rules import either as _either
from alignprop_cli.models.rules import list_of as _list_of
from alignprop_cli.models.rules import number as _number
from alignprop_cli.models.rules import one_of as _one_of
from alignprop_cli.models.rules import whole as _whole
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text

INDEX = "model_index.json"

FILES = {
    "scheduler": "scheduler/scheduler_config.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
}
"""The configuration of each part."""

SCHEDULERS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Schedulers that are ways through the noise of a diffusion with betas, as DDIM is, and may be
replaced by it. Not among them: rectified flows, EDM's own noise, few-step models (LCM, TCD)."""

# The classes that other parts may have; what model_index.json and the file of the part say.
_CLASSES = {
    "scheduler": SCHEDULERS,
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
}

# Settings that would change the images and are not obeyed, unless they are off. DDIM has no other
# that is its own; those of other schedulers (Karras' sigmas, orders) are ways to choose its steps.
_NOT_OBEYED = {
    "scheduler": {
        "thresholding": "dynamic thresholding",
        "use_flow_sigmas": "the noise of a rectified flow",
    },
    "unet": {
        "time_cond_proj_dim": "an embedding of the guidance scale, as in consistency models,",
        "class_embed_type": "a class embedding",
        "num_class_embeds": "a class embedding",
        "addition_embed_type": "an additional embedding, as in Stable Diffusion XL,",
    },
    "vae": {
        "shift_factor": "a shift of the latents",
        "latents_mean": "a mean of the latents",
        "latents_std": "a deviation of the latents",
    },
    "text_encoder": {"use_attention_mask": "an attention mask of the prompt"},
}

_MOST_TIMESTEPS = 100_000
# Bytes of a configuration, and of a vocabulary.
_MOST_CONFIG, _MOST_VOCABULARY = 2**20, 64 * 2**20

# What values must be where they are given. The libraries have defaults for the others.
_RULES: Mapping[str, Mapping[str, Rule]] = {
    "scheduler": {
        "num_train_timesteps": _whole(1, _MOST_TIMESTEPS),
        "beta_start": _number(0.0, 1.0),
        "beta_end": _number(0.0, 1.0),
        "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
        "trained_betas": _either(_list_of(_number(0.0, 1.0)), _NOTHING),
        "prediction_type": _one_of("epsilon", "v_prediction", "sample"),
        "timestep_spacing": _one_of("leading", "trailing", "linspace"),
        # The other kind gives the network the logarithm of the noise instead of a timestep.
        "timestep_type": _either(_one_of("discrete"), _NOTHING),
        "steps_offset": _whole(0, _MOST_TIMESTEPS),
        "rescale_betas_zero_snr": _one_of(True, False),
        "set_alpha_to_one": _one_of(True, False),
    },
    "unet": {
        "in_channels": _SIZE,
        "out_channels": _SIZE,
        "sample_size": _either(_SIZE, _list_of(_SIZE)),
        "block_out_channels": _list_of(_SIZE),
        "cross_attention_dim": _either(_SIZE, _list_of(_SIZE)),
        # Other kinds need more than the embeddings of the prompt.
        "encoder_hid_dim_type": _either(_one_of("text_proj"), _NOTHING),
    },
    "vae": {
        "latent_channels": _SIZE,
        "block_out_channels": _list_of(_SIZE),
        "scaling_factor": _number(0.0, math.inf),
    },
    "text_encoder": {
        "hidden_size": _SIZE,
        "max_position_embeddings": _SIZE,
        "vocab_size": _whole(1, 2**24),
    },
    "tokenizer": {"model_max_length": _SIZE},
}


def check(folder: Path) -> None:
    """Refuse a folder in diffusers format whose configurations are damaged or not obeyed.

    Files that are not there are passed over: the libraries say that they are missing.

    Args:
        folder: The model.

    Raises:
        AssetError: If a file cannot be read.
        ConfigError: If a part is of another class, a value is wrong or is not obeyed, or parts do
            not fit each other.
    """
    index = _read(folder / INDEX) or {}
    found = {part: _read(folder / file) for part, file in FILES.items()}
    for part, file in FILES.items():
        # [library, class], and null for a part that the model has not.
        named = index.get(part)
        if isinstance(named, list) and len(cast(list[Any], named)) == 2:
            _check_class(part, cast(list[Any], named)[1], f"{folder / INDEX}: {part}")
        values = found[part]
        if values is not None:
            check_part(part, values, str(folder / file))
    _check_together(folder, found)


def check_part(part: str, values: Mapping[str, Any], place: str) -> None:
    """Refuse the configuration of one part; see `check`.

    Args:
        part: One of `FILES`.
        values: The configuration.
        place: The file, for messages.

    Raises:
        ConfigError: As `check`.
    """
    _check_class(part, values.get("_class_name"), f"{place}: _class_name")
    for key, what in _NOT_OBEYED.get(part, {}).items():
        if values.get(key) not in (None, False, 0):
            raise ConfigError(
                f"model.id: {place}: {key}: {what} is not supported, so images would be others "
                "than the model's"
            )
    for key, (holds, expected) in _RULES[part].items():
        if key in values and not holds(values[key]):
            raise _wrong(place, key, expected, values[key])
    betas, steps = values.get("trained_betas"), values.get("num_train_timesteps", 1000)
    if betas is not None and len(betas) != steps:
        raise _wrong(place, "trained_betas", f"{steps} numbers", f"{len(betas)} of them")


def scheduler_class(folder: Path) -> str:
    """Return the class of a checked model's scheduler; DDIM's where nothing names one."""
    named = (_read(folder / INDEX) or {}).get("scheduler")
    if isinstance(named, list) and len(cast(list[Any], named)) == 2:
        return str(cast(list[Any], named)[1])
    return str((_read(folder / FILES["scheduler"]) or {}).get("_class_name", "DDIMScheduler"))


def _check_class(part: str, name: object, place: str) -> None:
    if name is not None and not (isinstance(name, str) and name in _CLASSES[part]):
        supported = ", ".join(sorted(_CLASSES[part]))
        raise ConfigError(f"model.id: {place}: {_shown(name)} is not supported; it is: {supported}")


def _check_together(folder: Path, found: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse parts that do not fit each other; the libraries would index past the end of one."""
    network, text = found["unet"] or {}, found["text_encoder"]
    words = folder / FILES["tokenizer"]
    tokenizer = found["tokenizer"]
    if tokenizer is not None and "model_max_length" not in tokenizer:
        raise _wrong(str(words), "model_max_length", _SIZE[1], None)
    if text is None:
        return
    # 1. The tokenizer's length and numbers are places and rows in the text encoder's tables.
    positions, rows = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    if tokenizer is not None and tokenizer["model_max_length"] > positions:
        raise _wrong(
            str(words),
            "model_max_length",
            f"at most {positions}, the max_position_embeddings of the text encoder",
            tokenizer["model_max_length"],
        )
    vocabulary = _read(folder / "tokenizer" / "vocab.json", _MOST_VOCABULARY)
    numbers = [n for n in (vocabulary or {}).values() if isinstance(n, int)]
    if numbers and max(numbers) >= rows:
        raise ConfigError(
            f"model.id: {folder / FILES['text_encoder']}: vocab_size: {rows} is less than the "
            f"{max(numbers) + 1} tokens of {folder / 'tokenizer' / 'vocab.json'}"
        )
    # 2. Its width is what the network attends to, unless it projects it first.
    width, wanted = text.get("hidden_size"), network.get("cross_attention_dim")
    widths = cast(list[Any], wanted) if isinstance(wanted, list) else [wanted]
    if network.get("encoder_hid_dim") is not None:
        widths = [network["encoder_hid_dim"]]
    if width is not None and any(w not in (None, width) for w in widths):
        raise ConfigError(
            f"model.id: {folder / FILES['unet']}: cross_attention_dim: the network reads text "
            f"embeddings of width {_shown(widths[0])}, the text encoder's have {width}"
        )


def _read(file: Path, most: int = _MOST_CONFIG) -> dict[str, Any] | None:
    """Return the object in a file; None if there is no such file."""
    if not file.exists():
        return None
    try:
        # diffusers itself writes -Infinity, for lambda_min_clipped of a DPM solver.
        found = read_json(read_text(file, "model.id", most=most), strict=False)
    except ParseError as error:
        raise AssetError(f"model.id: cannot load {file}: {error}") from error
    if not isinstance(found, dict):
        raise AssetError(f"model.id: cannot load {file}: expected an object")
    return cast(dict[str, Any], found)


def _wrong(place: str, key: str, expected: str, value: object) -> ConfigError:
    got = "nothing" if value is None else _shown(value)
    return ConfigError(f"model.id: {place}: {key}: expected {expected}, got {got}")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
