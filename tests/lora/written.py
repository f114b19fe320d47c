"""A random LoRA, and the files that others would write of it, one function for each format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignprop_cli.lora import files, formats
from alignprop_cli.lora.factors import Factors
from alignprop_cli.lora.files import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from tests.factories import randn


class Lora:
    """A random LoRA, and the files that others would write of it."""

    def __init__(self, network: torch.nn.Module, layers: dict[str, tuple[int, float]]) -> None:
        self.ranks = {name: rank for name, (rank, _) in layers.items()}
        self.alphas = {name: alpha for name, (_, alpha) in layers.items()}
        self.downs: dict[str, Tensor] = {}
        self.ups: dict[str, Tensor] = {}
        for number, (name, rank) in enumerate(self.ranks.items()):
            out, *inputs = network.get_submodule(name).weight.shape
            ones = (1,) * (len(inputs) - 1)
            self.downs[name] = 0.3 * randn(number, rank, *inputs, dtype=torch.float32)
            self.ups[name] = 0.3 * randn(90 + number, out, rank, *ones, dtype=torch.float32)

    def state(self, down: str, up: str, rename: Callable[[str], str]) -> dict[str, Tensor]:
        """Return its tensors by `<renamed layer>.<down>` and `<renamed layer>.<up>`."""
        downs = {f"{rename(name)}.{down}": value for name, value in self.downs.items()}
        return downs | {f"{rename(name)}.{up}": value for name, value in self.ups.items()}

    def alpha_tensors(self, rename: Callable[[str], str]) -> dict[str, Tensor]:
        return {f"{rename(name)}.alpha": torch.tensor(a) for name, a in self.alphas.items()}

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return a configuration as of peft: everything by patterns, some that match two layers."""
        return {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 1,
            "rank_pattern": {n: r for n, r in self.ranks.items() if r != 4},
            "alpha_pattern": {n: a for n, a in self.alphas.items() if a != 1.0},
            "target_modules": sorted(self.ranks),
        } | more

    def deltas(self, scaling: Callable[[float, int], float]) -> dict[str, Tensor]:
        """Return scaling x B A of every layer, float64, by its definition."""
        found = {}
        for name, down in self.downs.items():
            product = self.ups[name].double().flatten(1) @ down.double().flatten(1)
            factor = scaling(self.alphas[name], self.ranks[name])
            found[name] = factor * product.view(-1, *down.shape[1:])
        return found


def unet(name: str) -> str:
    return f"unet.{name}"


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def peft(name: str) -> str:
    return f"base_model.model.{name}"


def header(settings: dict[str, Any]) -> dict[str, str]:
    named = {f"unet.{key}": value for key, value in settings.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(named)}


def diffusers_down(made: Lora, place: Path) -> Path:
    save_file(
        made.state("lora.down.weight", "lora.up.weight", unet),
        place / LORA_FILE,
        metadata=header(made.settings()),
    )
    return place / LORA_FILE


def diffusers_ab(made: Lora, place: Path, **settings: Any) -> Path:
    state = made.state("lora_A.weight", "lora_B.weight", unet)
    save_file(state, place / LORA_FILE, metadata=header(made.settings(**settings)))
    return place / LORA_FILE


def diffusers_plain(made: Lora, place: Path) -> Path:
    save_file(made.state("lora_A.weight", "lora_B.weight", unet), place / LORA_FILE)
    return place / LORA_FILE


def diffusers_alpha(made: Lora, place: Path) -> Path:
    state = made.state("lora_A.weight", "lora_B.weight", unet) | made.alpha_tensors(unet)
    save_file(state, place / LORA_FILE)
    return place / LORA_FILE


def diffusers_both(made: Lora, place: Path) -> Path:
    state = made.state("lora.down.weight", "lora.up.weight", unet) | made.alpha_tensors(unet)
    save_file(state, place / LORA_FILE, metadata=header(made.settings()))
    return place / LORA_FILE


def diffusers_rslora(made: Lora, place: Path) -> Path:
    return diffusers_ab(made, place, use_rslora=True)


def diffusers_name(made: Lora, place: Path) -> Path:
    state = made.state("lora_A.default_0.weight", "lora_B.default_0.weight", unet)
    save_file(state, place / LORA_FILE)
    return place / LORA_FILE


def diffusers_processor(made: Lora, place: Path) -> Path:
    def old(name: str) -> str:
        attention, _, layer = name.removesuffix(".0").rpartition(".")
        return f"unet.{attention}.processor.{layer}_lora"

    save_file(made.state("down.weight", "up.weight", old), place / LORA_FILE)
    return place / LORA_FILE


def peft_folder(made: Lora, place: Path, **settings: Any) -> Path:
    save_file(made.state("lora_A.weight", "lora_B.weight", peft), place / PEFT_FILE)
    (place / PEFT_CONFIG).write_text(json.dumps(made.settings(**settings)), encoding="utf-8")
    return files.locate(str(place)).file


def peft_rslora(made: Lora, place: Path) -> Path:
    return peft_folder(made, place, use_rslora=True)


def kohya_plain(made: Lora, place: Path) -> Path:
    file = place / "kohya.safetensors"
    save_file(made.state("lora_down.weight", "lora_up.weight", kohya), file)
    return file


def kohya_alpha(made: Lora, place: Path) -> Path:
    file = place / "kohya.safetensors"
    state = made.state("lora_down.weight", "lora_up.weight", kohya) | made.alpha_tensors(kohya)
    save_file(state, file)
    return file


def ours(made: Lora, place: Path) -> Path:
    layers = {n: Factors(made.downs[n], made.ups[n], a) for n, a in made.alphas.items()}
    weights, settings = formats.packed(layers)
    return files.save(place, weights, {}, prefix="unet.", adapter_metadata=settings)


def over_rank(alpha: float, rank: int) -> float:
    return alpha / rank


def over_root(alpha: float, rank: int) -> float:
    return alpha / rank**0.5


def one(alpha: float, rank: int) -> float:
    return 1.0
