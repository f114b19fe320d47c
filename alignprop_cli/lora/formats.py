"""From the tensors of a LoRA file to the factors of every layer, for four file formats.

    diffusers   unet.<layer>.lora.down.weight and .lora.up.weight, or .lora_A.weight and
                .lora_B.weight; in old versions .processor.to_q_lora.down.weight and so on
    PEFT        base_model.model.<layer>.lora_A.weight and .lora_B.weight
    kohya       lora_unet_<layer, _ for .>.lora_down.weight and .lora_up.weight; for Stable
                Diffusion XL and transformers the layers are named as in the original code
    ComfyUI     diffusion_model.<layer> and any of these endings, of transformers; the layers are
                mostly named as in the original code (original.py)

Alpha is a tensor of its own (<layer>.alpha) or part of the adapter's configuration. The name of an
adapter may come before `.weight`. A DoRA has <layer>.lora_magnitude_vector beside the factors, in
all but kohya's format; kohya's dora_scale, which others compute differently, is refused. Every
tensor is used, or belongs to a text encoder and is counted, or the file is refused: nothing is
dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.lora import original, settings
from alignprop_cli.lora.factors import (
    Factors,
    Layers,
    adapter_settings,
    not_finite,
    scaling,
)
from alignprop_cli.lora.names import (
    KOHYA,
    NETWORKS,
    WHOSE,
    layer_of,
    original_prefix,
    present,
    without_network,
)
from alignprop_cli.lora.settings import shown
from alignprop_cli.parsing import ParseError, read_json

_TEXT = re.compile(r"text_encoder(_\d|s)?\.|lora_te\d?_|base_model\.model\.text_model\.")

# The three spellings of the two factors: peft's, diffusers' and kohya's.
_HALVES = {"lora_A": "down", "lora.down": "down", "lora_down": "down"}
_HALVES |= {"lora_B": "up", "lora.up": "up", "lora_up": "up"}
_TENSOR = re.compile(
    rf"(?P<layer>.+?)\.(?:(?P<half>{'|'.join(map(re.escape, _HALVES))})"
    r"(?:\.(?P<adapter>[^.]+))?\.weight|alpha"
    r"|(?P<magnitude>lora_magnitude_vector)(?:(?:\.(?P<of>[^.]+))?\.weight)?)"
)
_TEXT_TENSOR = re.compile(r"[._]lora[._].*|\.(alpha|dora_scale)$")

# Kinds of adapter that are not a plain LoRA, by a part of their tensors' names (a regular
# expression); settings.py knows them by an option of their configuration.
_OTHER_KINDS = {
    r"dora_scale": "a DoRA in kohya's format",
    r"hada_.*": "a LoHa",
    r"lokr_.*": "a LoKr",
    r"lora_mid": "a LoCon with a Tucker factor",
    r"oft_.*|boft_.*": "an OFT",
    r"ia3_.*|on_input": "an (IA)3",
    r"lora_E|ranknum": "an AdaLoRA",
    r"diff|diff_b|w_norm|b_norm": "a file of whole weight differences",
    r"lora_embedding_[AB]": "a LoRA of embeddings",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class _Tensors:
    """The tensors of one layer while they are collected, each with its name in the file.

    The magnitudes of a DoRA are among the halves.
    """

    halves: dict[str, tuple[str, Tensor]] = field(default_factory=dict[str, tuple[str, Tensor]])
    alpha: tuple[str, Tensor] | None = None


def read_settings(text: str, where: str) -> dict[str, Any]:
    """Return the adapter's configuration, its keys without the prefix of the network.

    Args:
        text: JSON of peft's `LoraConfig`.
        where: File and place in it, for messages.

    Raises:
        AssetError: If it is no such configuration.
        ConfigError: If it belongs to another kind of adapter.
    """
    try:
        found = read_json(text)
    except ParseError as error:
        raise AssetError(f"{where}: {error}") from error
    if not isinstance(found, dict):
        raise AssetError(f"{where}: expected an object, got {shown(text)}")
    # Those of a text encoder go with its layers, which are left out.
    own = {key: value for key, value in found.items() if not _TEXT.match(key)}
    options: dict[str, Any] = {without_network(key): value for key, value in own.items()}
    if len(options) < len(own):
        raise AssetError(f"{where}: an option is given twice, with the network's name and without")
    settings.check(options, where)
    return options


def read_layers(
    state: Mapping[str, Tensor], options: Mapping[str, Any], file: Path
) -> tuple[Layers, int]:
    """Return the factors of every layer, and the number of layers of text encoders.

    Args:
        state: All tensors of the file, by name.
        options: The adapter's configuration; empty where there is none.
        file: For messages.

    Raises:
        AssetError: If it is no LoRA of a UNet, a tensor's name is unknown, or a tensor is damaged.
        ConfigError: If it is another kind of adapter, or a LoRA of text encoders alone.
        RunError: If a number is not finite.
    """
    # 1. No command uses a LoRA in a text encoder. Its layers are counted, for a warning.
    texts = {_TEXT_TENSOR.sub("", name) for name in state if _TEXT.match(name)}
    names = sorted(name for name in state if not _TEXT.match(name))
    if texts and not names:
        raise ConfigError(f"{file}: is a LoRA of the text encoder alone, which is left out here")
    # 2. Other kinds of adapter, before the general complaint about an unknown tensor.
    for name in names:
        for pattern, what in _OTHER_KINDS.items():
            if any(re.fullmatch(pattern, part) for part in name.split(".")[1:]):
                settings.refuse(str(file), f"{what} ({shown(name)})")
    if not any(_TENSOR.fullmatch(present(name)) for name in names):
        raise AssetError(f"{file}: holds no LoRA weights")
    # 3. The tensors of every layer, and their factors once they are complete.
    grouped = _group(state, names, file)
    layers = {
        layer: _factors(layer, tensors, options, file) for layer, tensors in sorted(grouped.items())
    }
    if len({factors.magnitude is None for factors in layers.values()}) > 1:
        raise AssetError(f"{file}: is a DoRA in some of its layers and a LoRA in others")
    if any(map(original_prefix, names)):
        layers = _in_diffusers(layers, names, options, file)
    damage = not_finite(layers)
    if damage:
        raise RunError(f"{file}: {damage}", hint="use an earlier checkpoint or another copy")
    return layers, len(texts)


def _group(state: Mapping[str, Tensor], names: list[str], file: Path) -> dict[str, _Tensors]:
    """Return the tensors by layer; an unknown name is refused."""
    grouped: dict[str, _Tensors] = {}
    adapters: set[str] = set()
    for name in names:
        found = _TENSOR.fullmatch(present(name))
        layer = layer_of(found["layer"]) if found else None
        if found is None or layer is None:
            raise AssetError(f"{file}: cannot be read as a LoRA: unexpected tensor {shown(name)}")
        tensors = grouped.setdefault(layer, _Tensors())
        half = "magnitude" if found["magnitude"] else _HALVES.get(found["half"] or "")
        if half is None:
            tensors.alpha = (name, state[name])
            continue
        adapters.add(found["adapter"] or found["of"] or "")
        # Twice by two formats or two adapters in one file; which one is meant cannot be known.
        if half in tensors.halves:
            first = tensors.halves[half][0]
            raise AssetError(
                f"{file}: has two tensors for layer {layer}: {shown(first)} and {shown(name)}"
            )
        tensors.halves[half] = (name, state[name])
    if len(adapters) > 1:
        some = ", ".join(map(shown, sorted(adapters)[:3]))
        raise AssetError(f"{file}: holds several adapters: {some}")
    return grouped


def _in_diffusers(
    layers: Layers, names: list[str], options: Mapping[str, Any], file: Path
) -> dict[str, Factors]:
    """Return the layers of a file with names that original.py knows by diffusers' names."""
    name, prefix = next((n, prefix) for n in names if (prefix := original_prefix(n)))
    other = next((n for n in names if original_prefix(n) != prefix), None)
    if other is not None:
        beside = f"{WHOSE[prefix]} names ({prefix}...)"
        if other.startswith(prefix):
            # kohya's of a UNet: beside hundreds of them it is the name that is odd.
            other, beside = name, f"{shown(other)}, which is a UNet's"
        raise AssetError(
            f"{file}: cannot be read as a LoRA: unexpected tensor {shown(other)} beside {beside}"
        )
    renamed = original.in_diffusers(layers, prefix, file)
    # Whose names its patterns mean, is not known.
    pattern = next((p for p in ("rank_pattern", "alpha_pattern") if options.get(p)), None)
    if pattern is not None and renamed.keys() != layers.keys():
        raise AssetError(
            f"{file}: the layers have {WHOSE[prefix]} names, for which {pattern} of its "
            "configuration cannot be read",
            hint=f"alphas are read from tensors {prefix}....alpha",
        )
    return renamed


def for_comfyui(layers: Layers, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by the names that ComfyUI reads.

    Args:
        layers: The LoRA.
        prefix: One of `NETWORKS`. A U-Net's layers get kohya's names, which A1111 reads too; other
            networks keep diffusers' names.

    Returns:
        Two factors of every layer; of a U-Net also alpha, where the scaling is alpha / rank. It is
        1 in other networks.
    """
    state: dict[str, Tensor] = {}
    for name, factors in layers.items():
        if prefix == NETWORKS[0]:
            layer = f"{KOHYA}{name.replace('.', '_')}"
            state[f"{layer}.lora_down.weight"] = factors.down
            state[f"{layer}.lora_up.weight"] = factors.up
            state[f"{layer}.alpha"] = torch.tensor(factors.scaling * factors.rank)
        else:
            state[f"{prefix}{name}.lora_A.weight"] = factors.down
            state[f"{prefix}{name}.lora_B.weight"] = factors.folded().up
    return state


def folded(
    weights: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a LoRA with the scaling of every layer multiplied into its B: the scaling is 1 then.

    Args:
        weights: By diffusers' or PEFT's names.
        options: The adapter's configuration, as peft's `LoraConfig`.

    Returns:
        Weights and configuration. Tensors that stay as they are, are the same objects.
    """
    scaled = dict(weights)
    for name, value in weights.items():
        found = _TENSOR.fullmatch(name)
        if found is None or _HALVES.get(found["half"] or "") != "up":
            continue
        alpha = settings.number(options, "lora_alpha", "alpha_pattern", found["layer"])
        stabilised = settings.flag(options, "use_rslora")
        factor = scaling(alpha or 0.0, value.shape[1], rank_stabilised=stabilised)
        if factor != 1.0:
            scaled[name] = factor * value.float()
    ranks = options.get("rank_pattern") or {}
    ones = {"lora_alpha": options["r"], "alpha_pattern": ranks, "use_rslora": False}
    return scaled, {**options, **ones}


def _factors(layer: str, tensors: _Tensors, options: Mapping[str, Any], file: Path) -> Factors:
    """Return the factors of one layer, checking that its tensors and numbers fit together."""
    # 1. Both factors, of floats.
    if set(tensors.halves) - {"magnitude"} != {"down", "up"}:
        odd = next(iter(tensors.halves.values()), tensors.alpha)
        assert odd is not None
        raise AssetError(
            f"{file}: cannot be read as a LoRA: unexpected tensor {shown(odd[0])}, which stands "
            "alone"
        )
    for name, value in tensors.halves.values():
        if value.dtype not in _DTYPES:
            kind = str(value.dtype).removeprefix("torch.")
            raise AssetError(f"{file}: {name} is {kind}; expected a float of 16 to 64 bits")
    down, up = tensors.halves["down"][1], tensors.halves["up"][1]
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    # 2. Shapes (r, in) and (out, r); for a convolution (r, in, kh, kw) and (out, r, 1, 1).
    if (
        down.ndim not in (2, 4)
        or up.ndim != down.ndim
        or up.shape[1] != down.shape[0]
        or any(size != 1 for size in up.shape[2:])
        or 0 in (*down.shape, *up.shape)
    ):
        raise AssetError(f"{file}: layer {layer}: shapes {shapes} share no rank")
    rank = down.shape[0]
    magnitude = _magnitude(layer, tensors, options, file)
    # 3. Rank and alpha as the configuration and the file have them. A foreign file may hold
    #    anything: wrong types, broken patterns, numbers that are too large.
    try:
        recorded = settings.number(options, "r", "rank_pattern", layer)
        alpha = settings.number(options, "lora_alpha", "alpha_pattern", layer)
        stabilised = settings.flag(options, "use_rslora")
        stored = None if tensors.alpha is None else _scalar(tensors.alpha[1])
    except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
        raise AssetError(
            f"{file}: alpha of layer {layer} cannot be read: {shown(str(error))}"
        ) from error
    # 4. They must agree: otherwise it is unknown which rank or alpha the weights were trained with.
    if recorded is not None and recorded != rank:
        raise AssetError(f"{file}: layer {layer} has rank {rank}, its configuration {recorded:g}")
    if None not in (alpha, stored) and alpha != stored:
        raise AssetError(
            f"{file}: layer {layer} has alpha {stored:g} among its tensors, {alpha:g} in its "
            "configuration"
        )
    if alpha is None and stored is None and recorded is not None:
        raise AssetError(f"{file}: its configuration has a rank and no lora_alpha")
    # Without any alpha the scaling is 1, by the convention of diffusers and kohya.
    known = stored if alpha is None else alpha
    return Factors(down, up, float(rank) if known is None else known, stabilised, magnitude)


def _magnitude(
    layer: str, tensors: _Tensors, options: Mapping[str, Any], file: Path
) -> Tensor | None:
    """Return the magnitudes of a layer of a DoRA; None of a LoRA."""
    _, found = tensors.halves.get("magnitude", ("", None))
    wanted = options.get("use_dora") or False
    # Without a configuration the tensors say it, as in diffusers.
    if options and wanted is not (found is not None):
        has = "no lora_magnitude_vector" if found is None else "a lora_magnitude_vector"
        raise AssetError(
            f"{file}: layer {layer} has {has}, and use_dora of its configuration is {shown(wanted)}"
        )
    up = tensors.halves["up"][1]
    one_each = (len(up),) if up.ndim == 2 else (1, len(up), 1, 1)
    if found is not None and tuple(found.shape) != one_each:
        raise AssetError(
            f"{file}: lora_magnitude_vector of layer {layer} is {tuple(found.shape)}, expected "
            f"{one_each}"
        )
    return found


def _scalar(value: Tensor) -> float:
    if value.numel() != 1 or value.dtype not in (*_DTYPES, torch.int32, torch.int64):
        raise ValueError(f"expected one number, got {value.dtype} of shape {tuple(value.shape)}")
    return float(value)


def packed(layers: Layers) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and configuration for `files.save`, of a LoRA that is in no network."""
    weights: dict[str, Tensor] = {}
    for name, factors in layers.items():
        weights[f"{name}.lora.down.weight"] = factors.down
        weights[f"{name}.lora.up.weight"] = factors.up
        if factors.magnitude is not None:
            weights[f"{name}.lora_magnitude_vector"] = factors.magnitude
    settings: dict[str, Any] = {
        **adapter_settings(layers),
        "target_modules": sorted(layers),
        "bias": "none",
        "peft_type": "LORA",
    }
    return weights, settings
