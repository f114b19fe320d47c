"""What the configuration files of a model say, and what of it is obeyed here.

The files come with the weights, and a setting may change what the network needs or computes. Each
one that would change the images and is not obeyed is refused, with its file and key, and so is a
value that the libraries would stumble over later. `--dry-run` looks at the same files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.models import full_weights
from alignprop_cli.models.rules import NOTHING, SIZE, Rule, either, list_of, number, one_of, whole
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
        "LCMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Schedulers that are ways through the noise of a diffusion with betas, as DDIM is. They are
followed (`schedulers.SCHEDULERS`) or may be replaced by DDIM. Not among them: rectified flows,
EDM's own noise, TCD."""

# What to do instead of what is not supported.
_INSTEAD = {
    "TCDScheduler": "Hyper-SD's models for one number of steps are sampled by DDIM: name "
    "DDIMScheduler there, and set sample.spacing: trailing"
}

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
        "num_train_timesteps": whole(1, _MOST_TIMESTEPS),
        "beta_start": number(0.0, 1.0),
        "beta_end": number(0.0, 1.0),
        "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
        "trained_betas": either(list_of(number(0.0, 1.0)), NOTHING),
        "prediction_type": one_of("epsilon", "v_prediction", "sample"),
        "timestep_spacing": one_of("leading", "trailing", "linspace"),
        # The other kind gives the network the logarithm of the noise instead of a timestep.
        "timestep_type": either(one_of("discrete"), NOTHING),
        "steps_offset": whole(0, _MOST_TIMESTEPS),
        "original_inference_steps": whole(1, _MOST_TIMESTEPS),
        "timestep_scaling": number(0.0, math.inf),
        "rescale_betas_zero_snr": one_of(True, False),
        "set_alpha_to_one": one_of(True, False),
        "final_sigmas_type": one_of("zero", "sigma_min"),
        # The other one of Euler's has a level more than steps, at which diffusers' chain ends.
        "interpolation_type": one_of("linear"),
        # The ends of Karras' and other spacings of the levels.
        "sigma_min": either(number(0.0, math.inf), NOTHING),
        "sigma_max": either(number(0.0, math.inf), NOTHING),
    },
    "unet": {
        "in_channels": SIZE,
        "out_channels": SIZE,
        "sample_size": either(SIZE, list_of(SIZE)),
        "block_out_channels": list_of(SIZE),
        "cross_attention_dim": either(SIZE, list_of(SIZE)),
        "time_cond_proj_dim": either(whole(2, 65_536), NOTHING),
        # Other kinds need more than the embeddings of the prompt.
        "encoder_hid_dim_type": either(one_of("text_proj"), NOTHING),
    },
    "vae": {
        "latent_channels": SIZE,
        "block_out_channels": list_of(SIZE),
        "scaling_factor": number(0.0, math.inf),
    },
    "text_encoder": {
        "hidden_size": SIZE,
        "max_position_embeddings": SIZE,
        "vocab_size": whole(1, 2**24),
    },
    "tokenizer": {"model_max_length": SIZE},
}


@dataclass(frozen=True)
class Layout:
    """The parts of a kind of pipeline, and what their configurations may say.

    Args:
        files: The configuration of each part.
        classes: The classes that each part may have.
        not_obeyed: Settings that are refused unless they are off, by part, with what they are.
        rules: What values must be where they are given, by part.
        check_together: (folder, configurations by part) refuses parts that do not fit each other.
        needed: Parts that the kind may lack and its models here may not.
    """

    files: Mapping[str, str]
    classes: Mapping[str, Collection[str]]
    not_obeyed: Mapping[str, Mapping[str, str]]
    rules: Mapping[str, Mapping[str, Rule]]
    check_together: Callable[[Path, Mapping[str, Mapping[str, Any] | None]], None]
    needed: tuple[str, ...] = ()


def check(folder: Path, layout: Layout | None = None) -> None:
    """Refuse a folder in diffusers format whose configurations are damaged or not obeyed.

    Files that are not there are passed over: the libraries say that they are missing.

    Args:
        folder: The model.
        layout: Its kind; None is Stable Diffusion.

    Raises:
        AssetError: If a file cannot be read.
        ConfigError: If a part is of another class, a value is wrong or is not obeyed, or parts do
            not fit each other.
    """
    layout = layout or STABLE_DIFFUSION
    index = _read(folder / INDEX) or {}
    found = {part: _read(folder / file) for part, file in layout.files.items()}
    for part, file in layout.files.items():
        # [library, class], and null for a part that the model has not.
        named = index.get(part)
        if isinstance(named, list) and len(cast(list[Any], named)) == 2:
            name = cast(list[Any], named)[1]
            if name is None and part in layout.needed:
                raise ConfigError(
                    f"model.id: {folder / INDEX}: {part}: the model comes without it, as refiners "
                    "do, and cannot be sampled by itself"
                )
            _check_class(part, name, f"{folder / INDEX}: {part}", layout)
        values = found[part]
        if values is not None:
            check_part(part, values, str(folder / file), layout)
    layout.check_together(folder, found)


def check_part(
    part: str, values: Mapping[str, Any], place: str, layout: Layout | None = None
) -> None:
    """Refuse the configuration of one part; see `check`.

    Args:
        part: One of the layout's.
        values: The configuration.
        place: The file, for messages.
        layout: As in `check`.

    Raises:
        ConfigError: As `check`.
    """
    layout = layout or STABLE_DIFFUSION
    _check_class(part, values.get("_class_name"), f"{place}: _class_name", layout)
    full_weights.check_config(values, place)
    for key, what in layout.not_obeyed.get(part, {}).items():
        if values.get(key) not in (None, False, 0):
            raise ConfigError(
                f"model.id: {place}: {key}: {what} is not supported, so images would be others "
                "than the model's"
            )
    for key, (holds, expected) in layout.rules[part].items():
        if (key in values or key in _REQUIRED.get(part, ())) and not holds(values.get(key)):
            raise wrong(place, key, expected, values.get(key))
    betas, steps = values.get("trained_betas"), values.get("num_train_timesteps", 1000)
    if betas is not None and len(betas) != steps:
        raise wrong(place, "trained_betas", f"{steps} numbers", f"{len(betas)} of them")


# What the libraries have no default for.
_REQUIRED = {"unet": ("sample_size",)}


def scheduler_class(folder: Path) -> str:
    """Return the class of a checked model's scheduler; DDIM's where nothing names one."""
    named = (_read(folder / INDEX) or {}).get("scheduler")
    if isinstance(named, list) and len(cast(list[Any], named)) == 2:
        return str(cast(list[Any], named)[1])
    return str((_read(folder / FILES["scheduler"]) or {}).get("_class_name", "DDIMScheduler"))


def _check_class(part: str, name: object, place: str, layout: Layout) -> None:
    if name is not None and not (isinstance(name, str) and name in layout.classes[part]):
        supported = ", ".join(sorted(layout.classes[part]))
        raise ConfigError(
            f"model.id: {place}: {_shown(name)} is not supported; it is: {supported}",
            hint=_INSTEAD.get(str(name)),
        )


def _check_together(folder: Path, found: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse parts that do not fit each other; the libraries would index past the end of one."""
    check_words(folder, found)
    # The text encoder's width is what the network attends to, unless it projects it first.
    network, text = found["unet"] or {}, found["text_encoder"] or {}
    width, wanted = text.get("hidden_size"), network.get("cross_attention_dim")
    widths = cast(list[Any], wanted) if isinstance(wanted, list) else [wanted]
    if network.get("encoder_hid_dim") is not None:
        widths = [network["encoder_hid_dim"]]
    if width is not None and any(w not in (None, width) for w in widths):
        raise ConfigError(
            f"model.id: {folder / FILES['unet']}: cross_attention_dim: the network reads text "
            f"embeddings of width {_shown(widths[0])}, the text encoder's have {width}"
        )


def check_words(
    folder: Path, found: Mapping[str, Mapping[str, Any] | None], suffix: str = ""
) -> None:
    """Refuse a tokenizer whose length and numbers have no place in the text encoder's tables.

    Args:
        folder: The model.
        found: The configurations by part.
        suffix: Of the names of both parts, such as `_2`.

    Raises:
        ConfigError: If they do not fit.
    """
    tokenizer, text = found[f"tokenizer{suffix}"], found[f"text_encoder{suffix}"]
    words = folder / f"tokenizer{suffix}" / "tokenizer_config.json"
    if tokenizer is not None and "model_max_length" not in tokenizer:
        raise wrong(str(words), "model_max_length", SIZE[1], None)
    if text is None:
        return
    positions, rows = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    if tokenizer is not None and tokenizer["model_max_length"] > positions:
        raise wrong(
            str(words),
            "model_max_length",
            f"at most {positions}, the max_position_embeddings of the text encoder",
            tokenizer["model_max_length"],
        )
    file = folder / f"tokenizer{suffix}" / "vocab.json"
    numbers = [n for n in (_read(file, _MOST_VOCABULARY) or {}).values() if isinstance(n, int)]
    if numbers and max(numbers) >= rows:
        raise ConfigError(
            f"model.id: {folder / f'text_encoder{suffix}' / 'config.json'}: vocab_size: {rows} is "
            f"less than the {max(numbers) + 1} tokens of {file}"
        )


STABLE_DIFFUSION = Layout(FILES, _CLASSES, _NOT_OBEYED, _RULES, _check_together)
"""What StableDiffusionPipeline is made of."""


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


def wrong(place: str, key: str, expected: str, value: object) -> ConfigError:
    """Return the error about a value that is not what it must be."""
    got = "nothing" if value is None else _shown(value)
    return ConfigError(f"model.id: {place}: {key}: expected {expected}, got {got}")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
