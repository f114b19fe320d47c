"""A family of models from outside the package: a rectified flow of one small network, in one file.

Its folder holds model_index.json, which names the pipeline class, and the weights of the network.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models.base import Family, MetaModel, Parts, Source
from alignprop_cli.schedule import NoiseSchedule, Step

CHANNELS, WIDTH, SIZE = 3, 4, 8


class ToyModule(nn.Module):
    """Mixes every pixel's channels with the time and the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(CHANNELS + 1 + WIDTH, 16)
        self.out = nn.Linear(16, CHANNELS)

    def forward(self, latents: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        pixels = latents.permute(0, 2, 3, 1)  # (B, h, w, C)
        shape = pixels.shape[:3]
        told = [time.view(-1, 1, 1, 1).expand(*shape, 1), prompt[:, None, None].expand(*shape, -1)]
        return self.out(torch.tanh(self.into(torch.cat([pixels, *told], -1)))).permute(0, 3, 1, 2)


class ToyNetwork:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        return CHANNELS, (height or SIZE), (width or SIZE)

    def schedule(self, steps: int, latent_shape: tuple[int, int, int]) -> NoiseSchedule:
        sigmas = [1.0 - i / steps for i in range(steps + 1)]
        return NoiseSchedule(
            tuple(
                Step(sigma, 1.0 - sigma, sigma, 1.0 - after, after)
                for sigma, after in itertools.pairwise(sigmas)
            ),
            "flow",
        )

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        time = torch.full((len(latents),), timestep, device=latents.device)
        return self.module(latents, time, embeds.tensors["prompt"])

    def recompute_blocks(self, on: bool) -> None:
        """It has one block."""


class ToyDecoder:
    module = nn.Identity()

    def parameters(self) -> list[Tensor]:
        return []

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        return torch.sigmoid(latents.float())


class ToyEncoders:
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        digests = [hashlib.sha256(prompt.encode()).digest()[:WIDTH] for prompt in prompts]
        return [Embeds({"prompt": torch.tensor(list(d)) / 255.0}) for d in digests]


def load_parts(source: Source, device: torch.device) -> Parts:
    assert source.path is not None
    module = ToyModule().requires_grad_(False)
    module.load_state_dict(load_file(source.path / "toy.safetensors"))
    return Parts(ToyNetwork(module.to(device)), ToyDecoder())


def on_meta(source: Source) -> MetaModel:
    with torch.device("meta"):
        parts = Parts(ToyNetwork(ToyModule().requires_grad_(False)), ToyDecoder())
        prompt = Embeds({"prompt": torch.empty(1, WIDTH)})
    return MetaModel(parts, Conditioning(prompt, prompt), lambda shape: (shape[1], shape[2]))


TOY = Family(
    name="Toy",
    pipeline_class="ToyPipeline",
    lora_prefix="transformer.",
    target_modules=("into", "out"),
    load_text_encoders=lambda source, device: ToyEncoders(),
    load_parts=load_parts,
    on_meta=on_meta,
)


def write(folder: Path) -> Path:
    """Write a model of this family with random weights."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(ToyModule().state_dict(), folder / "toy.safetensors")
    return folder
