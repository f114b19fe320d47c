"""What a single file holds, as the names and shapes of its tensors show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor

from alignprop_cli.errors import ConfigError
from alignprop_cli.models import full_weights
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text

STABLE_DIFFUSION = "StableDiffusionPipeline"
STABLE_DIFFUSION_XL = "StableDiffusionXLPipeline"

# The first layer of the network, as the original code of Stable Diffusion names it.
_NETWORK = "model.diffusion_model.input_blocks.0.0.weight"
# What diffusers' `infer_diffusers_model_type` calls models that can be sampled here. Their text
# encoders say which one it is, as diffusers asks for the tenth layer of theirs.
_SAMPLED = ("v1", "v2", "xl_base", "xl_refiner", None)

# Files of Stable Diffusion XL have no place for a scheduler. ComfyUI and Forge look for empty
# tensors of these names: the network predicts v, and the noise ends without any signal.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
# CosXL: EDM's own noise, of which this is the largest level.
_EDM = "edm_vpred.sigma_max"
# ModelSpec's key for the same and ComfyUI's, and their word for v.
_MODELSPEC, _MODELSPEC_V = ("modelspec.prediction_type", "modelspec.predict_key"), "v"
# What schedulers of diffusers do where their configuration does not say it.
_UNSAID = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def pipeline_class(file: Path) -> str:
    """Return the class in diffusers of the pipeline that a single file holds.

    A file that cannot be read counts as Stable Diffusion: loading tells what is wrong with it.

    Raises:
        ConfigError: If it is quantised, is of a family or kind of which no single files are loaded,
            or is no model.
    """
    if file.suffix == ".gguf":
        raise full_weights.quantised(str(file), "GGUF")
    tensors = _tensors(file)
    if not tensors:
        return STABLE_DIFFUSION
    full_weights.check_names(tensors, str(file))
    for name, tensor in tensors.items():
        # Values of 8 bits, also where no scale is beside them.
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise full_weights.quantised(str(file), f"{name} is {kind}")
    kind = _diffusers_type(tensors)
    if _NETWORK not in tensors or kind not in _SAMPLED:
        raise _refusal(file, tensors, kind)
    if _EDM in tensors:
        raise ConfigError(
            f"model.id: {file} has a tensor {_EDM}: it was trained with EDM's own noise, as CosXL "
            "was, which is not supported"
        )
    # The original code numbers the text encoders of Stable Diffusion XL; its refiner has one.
    if any(name.startswith("conditioner.embedders.1.") for name in tensors):
        return STABLE_DIFFUSION_XL
    if any(name.startswith("conditioner.embedders.0.") for name in tensors):
        raise ConfigError(
            f"model.id: {file} is a refiner of Stable Diffusion XL, which cannot be sampled by "
            "itself"
        )
    return STABLE_DIFFUSION


def noise_marks(file: Path) -> dict[str, Any]:
    """Return what a single file says of its noise, by the keys of a scheduler's configuration.

    Most say nothing, which means nothing: {} then.
    """
    tensors, header = _tensors(file), _header(file)
    said = {header.get(key) for key in _MODELSPEC}
    if _V_PREDICTION not in tensors and _MODELSPEC_V not in said:
        return {}
    marks: dict[str, Any] = {"prediction_type": "v_prediction"}
    return marks | ({"rescale_betas_zero_snr": True} if _ZERO_SNR in tensors else {})


def marks_of(scheduler_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that mark a file of Stable Diffusion XL, for `noise_marks`.

    Args:
        scheduler_config: The configuration of the model's scheduler.
        dtype: Of the tensors, which are empty.
    """
    if scheduler_config.get("prediction_type") != "v_prediction":
        return {}
    zero_snr = scheduler_config.get("rescale_betas_zero_snr") is True
    names = (_V_PREDICTION, _ZERO_SNR) if zero_snr else (_V_PREDICTION,)
    return {name: torch.empty(0, dtype=dtype) for name in names}


def check_marks(file: Path, folder: Path) -> None:
    """Refuse the configurations of a folder where a single file says that its noise is another.

    Raises:
        AssetError: If the scheduler's cannot be read.
        ConfigError: With the key and what both say.
    """
    place = folder / "scheduler" / "scheduler_config.json"
    marks = noise_marks(file)
    if not marks or not place.is_file():
        return
    try:
        values = read_json(read_text(place, "model.config"), strict=False)
    except ParseError:
        return  # loading says what is wrong with it
    for key, value in marks.items():
        have = values.get(key, _UNSAID[key]) if isinstance(values, dict) else value
        if have != value:
            raise ConfigError(
                f"model.config: {place}: {key}: {str(have)[:100]}, but {file} says that it is "
                f"{value}",
                hint=f"copy the folder, and set {key} to {json.dumps(value)} there",
            )


def not_loaded(file: Path, why: str, folder: str) -> ConfigError:
    """Return the error about a single file of a family of which none are loaded."""
    return ConfigError(
        f"model.id: {file}: {why}, of whose family no single files are loaded",
        hint="give the hub id, or the folder in diffusers format with all parts: --model "
        f"{folder} (diffusers' from_single_file and save_pretrained make it)",
    )


def _refusal(file: Path, tensors: Mapping[str, Tensor], kind: str | None) -> ConfigError:
    """Return what to say of a file that holds no Stable Diffusion model."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    if any(".lora_" in name or name.startswith("lora_") for name in tensors):
        return ConfigError(
            f"model.id: {file} is a LoRA, not a base model",
            hint="set lora.init to it, and model.id to the model that it was trained on",
        )
    # diffusers' answer where it recognises nothing is v1 too.
    known = cast(Any, DIFFUSERS_DEFAULT_PIPELINE_PATHS).get(kind)
    if known is not None and kind not in _SAMPLED:
        like = known["pretrained_model_name_or_path"]
        return not_loaded(file, f"its tensors are those of a model like {like}", "FOLDER")
    return ConfigError(
        f"model.id: {file}: no single file of Stable Diffusion or SDXL: it has no tensor "
        f"{_NETWORK}, but {sorted(tensors)[0][:100]}",
        hint="a file with one part of a model is not enough: give the folder in diffusers format "
        "with all parts, or a hub id",
    )


def _diffusers_type(tensors: Mapping[str, Tensor]) -> str | None:
    """Return diffusers' name for the kind of model; None where it does not understand the file."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        return cast(Any, infer_diffusers_model_type)(tensors)
    # It takes tensors for granted that usually come together.
    except (LookupError, UnboundLocalError):
        return None


def _header(file: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file, {} if there are none."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file without their values, {} if it cannot be read."""
    if file.suffix == ".safetensors":
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    name: torch.empty(
                        part.get_shape(), dtype=_DTYPES.get(part.get_dtype()), device="meta"
                    )
                    for name, part in slices.items()
                }
        except (OSError, safetensors.SafetensorError):
            return {}
    from diffusers.models.model_loading_utils import load_state_dict

    try:
        # Mapped into memory, not read; only tensors are unpickled.
        found: Any = load_state_dict(str(file))
    except OSError:
        return {}
    # As diffusers looks for them; a pickled dictionary can hold itself.
    for _ in range(_MOST_NESTED):
        if not isinstance(found, dict) or "state_dict" not in found:
            break
        found = cast(dict[str, Any], found)["state_dict"]
    if not isinstance(found, dict):
        return {}
    named = cast(dict[str, Any], found)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


_MOST_NESTED = 8
# Of the names in safetensors' headers those that matter here.
_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
