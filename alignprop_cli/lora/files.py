"""LoRA files without a model: find them, read their layers and header, write a new one.

The format is that of diffusers: `unet.<layer>.lora.down.weight` and `.lora.up.weight` (or peft's
`lora_A`, `lora_B`), with rank and alpha as JSON in the header under `lora_adapter_metadata`.
Where no alpha is recorded it is the rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.lora.mixing import Factors, Layers, scaling
from alignprop_cli.models.base import LORA_FILE
from alignprop_cli.storage import sha256

_PREFIX = "unet."
_STEP = re.compile(r"step-(\d{6,})$")
_DOWN = re.compile(r"\.(lora\.down|lora_A|lora_down)(\.default)?\.weight$")
_UP = re.compile(r"\.(lora\.up|lora_B|lora_up)(\.default)?\.weight$")


@dataclass(frozen=True)
class Located:
    """Where the weights are that a user named.

    Args:
        file: The LoRA file.
        run: The run it belongs to, where there is one.
        step: Name of its checkpoint, such as step-000020, where a checkpoint was named.
    """

    file: Path
    run: Path | None = None
    step: str | None = None

    @property
    def label(self) -> str:
        """Return a short name for folders: that of the run and checkpoint, folder, or file."""
        if self.run is not None:
            return self.run.resolve().name + (f"-{self.step}" if self.step else "")
        file = self.file.resolve()
        return file.parent.name if file.name == LORA_FILE else file.stem


@dataclass(frozen=True)
class Adapter:
    """A LoRA file.

    Args:
        file: Where it is.
        layers: Its factors by the name of the layer in the network.
        header: The texts in the header of the file.
        sha256: Of the whole file, hexadecimal.
        left_out: Number of layers of a text encoder that the file has too, and that are not read.
    """

    file: Path
    layers: Layers
    header: Mapping[str, str]
    sha256: str
    left_out: int = 0


def locate(name: str) -> Located:
    """Find the LoRA file of a run, a checkpoint, a LoRA folder or a file.

    Raises:
        AssetError: If there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Located(path)
    if not path.is_dir():
        raise AssetError(
            f"{name}: no such file or folder",
            hint="name a run, a checkpoint, a LoRA file or folder, or `base`",
        )
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        return Located(latest(path) / LORA_FILE, run=path)
    if not (path / LORA_FILE).is_file():
        raise AssetError(f"{name}: is no run and holds no LoRA ({LORA_FILE})")
    run = path.resolve().parent.parent
    if path.resolve().parent.name == "checkpoints" and (run / "config.yaml").is_file():
        return Located(path / LORA_FILE, run=run, step=path.resolve().name)
    return Located(path / LORA_FILE)


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if _STEP.search(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        AssetError: If the run does not exist or has none.
    """
    found = checkpoints(run)
    if not found:
        what = "has no checkpoint" if run.is_dir() else "does not exist"
        raise AssetError(f"{run}: {what}", hint="`ls runs/` shows the runs there are")
    return found[-1]


def read_header(file: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; none for other kinds of file.

    Raises:
        AssetError: If it cannot be read.
    """
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{file}: cannot be read: {error}") from error


def changes_text_encoder(file: Path) -> bool:
    """Return whether a safetensors file has layers of a text encoder, which no command uses.

    Raises:
        AssetError: If it cannot be read.
    """
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return any(name.startswith(("text_encoder", "lora_te")) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{file}: cannot be read: {error}") from error


def recorded_config(header: Mapping[str, str], file: Path) -> dict[str, Any] | None:
    """Return the configuration that training put into a header, None where there is none.

    Raises:
        AssetError: If it is damaged.
    """
    if "alignprop.config" not in header:
        return None
    try:
        return dict(json.loads(header["alignprop.config"]))
    except (ValueError, TypeError) as error:
        raise AssetError(
            f"{file}: alignprop.config in its header is damaged",
            hint="take the file from its run again",
        ) from error


def read(file: Path) -> Adapter:
    """Read a LoRA file in diffusers', peft's or kohya's format.

    Raises:
        AssetError: If it is missing, damaged, not a LoRA, or of another format.
        ConfigError: If it is a LoRA whose update is not alpha / rank B A (DoRA and others).
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = dict(opened.metadata() or {})
            state: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{file}: cannot be read as a LoRA: {error}") from error
    settings = _settings(header, file)
    if any(name.startswith(("lora_unet_", "lora_te")) for name in state):
        state = _from_kohya(file)
    texts = [name for name in state if name.startswith("text_encoder")]
    left_out = len({_UP.sub("", _DOWN.sub("", n)).removesuffix(".alpha") for n in texts})
    for name in texts:
        del state[name]
    alphas = {k: state.pop(k) for k in list(state) if k.endswith(".alpha")}
    pairs = _pairs(state, file)
    layers: dict[str, Factors] = {}
    for key, (down, up) in pairs.items():
        layer = key.removeprefix(_PREFIX)
        rank = down.shape[0]
        if up.ndim < 2 or up.shape[1] != rank:
            raise AssetError(
                f"{file}: layer {layer}: {tuple(up.shape)} and {tuple(down.shape)} share no rank"
            )
        try:
            alpha = _alpha(settings, layer, rank)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise AssetError(f"{file}: alpha of layer {layer} cannot be read: {error}") from error
        if f"{key}.alpha" in alphas:
            alpha = float(alphas[f"{key}.alpha"])
        stabilised = bool(settings.get("use_rslora"))
        layers[layer] = Factors(down, up, scaling(alpha, rank, rank_stabilised=stabilised))
    return Adapter(file, layers, header, sha256(file), left_out)


def write(directory: Path, layers: Layers, header: Mapping[str, str]) -> Path:
    """Write a LoRA in diffusers' format and return the file.

    Args:
        directory: Existing folder.
        layers: Factors with scaling 1.
        header: Further texts for the header.
    """
    ranks = {name: factors.rank for name, factors in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    settings = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(layers),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "peft_type": "LORA",
    }
    text = json.dumps({_PREFIX + k: v for k, v in settings.items()}, indent=2, sort_keys=True)
    state: dict[str, Tensor] = {}
    for name, factors in layers.items():
        if factors.scaling != 1.0:
            raise ValueError(f"layer {name}: expected scaling 1, got {factors.scaling}")
        state[f"{_PREFIX}{name}.lora.down.weight"] = factors.down.contiguous()
        state[f"{_PREFIX}{name}.lora.up.weight"] = factors.up.contiguous()
    file = directory / LORA_FILE
    save_file(state, file, metadata={"format": "pt", **header, "lora_adapter_metadata": text})
    # safetensors makes files that only their owner can read.
    file.chmod(0o644)
    return file


def _settings(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Return the adapter's own configuration from the header; empty where there is none."""
    try:
        settings = json.loads(header.get("lora_adapter_metadata", "{}"))
        settings = {str(k).removeprefix(_PREFIX): v for k, v in settings.items()}
    except (ValueError, AttributeError) as error:
        raise AssetError(f"{file}: lora_adapter_metadata in its header is not JSON") from error
    if settings.get("use_dora"):
        raise ConfigError(
            f"{file}: is a DoRA: it rescales whole columns of the weight, "
            "so its update depends on the base weight and cannot be mixed as a sum"
        )
    for option in ("lora_bias", "use_qalora", "use_bdlora"):
        if settings.get(option):
            raise ConfigError(f"{file}: uses {option}, which is more than alpha / rank B A")
    return settings


def _from_kohya(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in kohya's format by the names of diffusers, alphas too.

    Raises:
        AssetError: If diffusers cannot read it.
    """
    # Here, since it brings diffusers with it and few files need it.
    from alignprop_cli.models.unet import read_lora

    try:
        state, alphas, _ = read_lora(file)
    except (OSError, ValueError, KeyError) as error:
        raise AssetError(f"{file}: cannot be read as a LoRA in kohya's format: {error}") from error
    return {**state, **{name: torch.tensor(alpha) for name, alpha in alphas.items()}}


def _pairs(state: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (down, up) of every layer, or refuse what is no LoRA of a network."""
    downs = {_DOWN.sub("", name): value for name, value in state.items() if _DOWN.search(name)}
    ups = {_UP.sub("", name): value for name, value in state.items() if _UP.search(name)}
    if not downs:
        raise AssetError(f"{file}: holds no LoRA weights")
    rest = [n for n in sorted(state) if not _DOWN.search(n) and not _UP.search(n)]
    if any("dora_scale" in name or "magnitude_vector" in name for name in rest):
        raise ConfigError(f"{file}: is a DoRA, which cannot be mixed as a sum of updates")
    foreign = [n for n in sorted(downs) if n.startswith("transformer.")]
    odd = sorted(downs.keys() ^ ups.keys()) or rest or foreign
    if odd:
        raise AssetError(f"{file}: cannot be read as a LoRA of a UNet: unexpected {odd[0]}")
    return {name: (downs[name], ups[name]) for name in sorted(downs)}


def _alpha(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return alpha of a layer; patterns are regular expressions on the end of its name."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(alpha)
    alpha = settings.get("lora_alpha")
    return float(rank if alpha is None else alpha)
