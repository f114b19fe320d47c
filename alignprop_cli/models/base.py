"""The contract of a family of base models: prompts in, network calls, latents out, images out.

A family is one file beside this one and one row of families.py. Nothing outside models/ and
lora/files.py knows its name. The parts are separate because they need not be on the device
together: text encoders are loaded, used and dropped before the network is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.guidance import Conditioning, Embeds, Guidance
from alignprop_cli.schedule import NoiseSchedule


class TextEncoders(Protocol):
    """What turns prompts into embeddings; dropped as soon as all prompts are encoded."""

    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself.

        Returns:
            One `Embeds` a prompt, without a batch dimension, on the encoders' device. Not
            differentiable.
        """
        ...


class Network(Protocol):
    """The part that is called once per step and carries the LoRA.

    Latents stay (B, C, h, w) in the chain; packing, position ids, units of time and sign are the
    family's affair and live inside `predict`.

    Args:
        module: Where the LoRA goes.
    """

    module: torch.nn.Module

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w) for an image of this size in pixels; None is the model's own size.

        Raises:
            ConfigError: If the size is not a multiple of what the model can draw.
        """
        ...

    def schedule(self, steps: int, latent_shape: tuple[int, int, int]) -> NoiseSchedule:
        """Return the noise levels of a chain of so many steps for latents of this shape.

        Raises:
            ConfigError: If the model's scheduler has no such chain.
        """
        ...

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        """Call the network, one branch per row, unguided.

        Args:
            latents: Shape (B, C, h, w), any precision.
            timestep: In the units of `schedule`.
            embeds: Batched, B rows.

        Returns:
            noise_pred, shape and dtype of latents. Differentiable in latents and in the trainable
            parameters of `module`.
        """
        ...

    def recompute_blocks(self, on: bool) -> None:
        """Recompute the blocks of the network in backward, from now on or no longer."""
        ...


class Decoder(Protocol):
    """From clean latents to images, in its own precision.

    Args:
        module: Its network.
    """

    module: torch.nn.Module

    def parameters(self) -> list[Tensor]:
        """Return the weights that `decode` uses."""
        ...

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode clean latents (B, C, h, w) to images (B, 3, H, W), float32, in [0, 1].

        Differentiable in latents; the gradient of saturated pixels is as `images.saturate` says.

        Args:
            latents: As the chain leaves them.
            recompute: Whether backward recomputes the decoder's blocks.
        """
        ...


def stack(embeds: Sequence[Embeds]) -> Embeds:
    """Return the batch of several prompts' embeddings, all of the same shapes."""
    names = embeds[0].tensors
    return Embeds({name: torch.stack([e.tensors[name] for e in embeds]) for name in names})


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Args:
        config: The `model` section of the configuration.
        path: A folder in diffusers format or a single file; that of a hub id is in the cache.
        dtype: Precision of the frozen weights.
    """

    config: ModelConfig
    path: Path
    dtype: torch.dtype


@dataclass(frozen=True)
class Parts:
    """The parts of a model that stay for the whole run."""

    network: Network
    decoder: Decoder


@dataclass(frozen=True)
class MetaModel:
    """A model without its weights, on the meta device, to plan with.

    Args:
        parts: Network and decoder.
        conditioning: Embeddings of one prompt (both branches), of the right shapes and no content.
        image_size: Pixels (H, W) of an image for latents of (C, h, w).
    """

    parts: Parts
    conditioning: Conditioning
    image_size: Callable[[tuple[int, int, int]], tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """Everything that is named after a family, in one row.

    Args:
        name: For people.
        pipeline_class: Class of diffusers in model_index.json.
        lora_prefix: Of the network's layers in a LoRA file of diffusers.
        kohya_prefix: The same in a file of kohya's trainers.
        target_modules: Layers that get a LoRA by default: their names' endings.
        load_text_encoders: Loads them on a device.
        load_parts: Loads network and decoder on a device, frozen.
        on_meta: The same without weights, from configuration files alone; told the type of the
            device that it will run on.
        guidance_origin: As `guidance.Guidance.origin`.
        stack: Makes a batch of the embeddings of several prompts.
    """

    name: str
    pipeline_class: str
    lora_prefix: str
    kohya_prefix: str
    target_modules: tuple[str, ...]
    load_text_encoders: Callable[[Source, torch.device], TextEncoders]
    load_parts: Callable[[Source, torch.device], Parts]
    on_meta: Callable[[Source, str], MetaModel]
    guidance_origin: Literal["uncond", "text"] = "uncond"
    stack: Callable[[Sequence[Embeds]], Embeds] = stack


@dataclass(frozen=True)
class Sampler:
    """How images are sampled, in training and evaluation alike.

    Args:
        num_inference_steps: T, network calls of one chain.
        guidance: How the two branches are combined.
        eta: Share of fresh noise per step in [0, 1]; 0 is deterministic.
        height: Pixels; None is the model's own.
        width: Likewise.
        negative_prompt: What the unconditional branch is given.
    """

    num_inference_steps: int
    guidance: Guidance
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""


@dataclass
class Model:
    """A loaded base model: frozen parts, and the embeddings of the prompts that it is asked for.

    Args:
        id: What the user called it.
        family: Its row.
        network: Can carry a LoRA.
        decoder: From latents to images.
        embeds: By prompt, without a batch dimension, on the CPU.
        fingerprint: Hash of the architecture (names and shapes of the network's weights before a
            LoRA is added): two checkpoints with the same fingerprint can exchange LoRAs.
    """

    id: str
    family: Family
    network: Network
    decoder: Decoder
    embeds: Mapping[str, Embeds] = field(default_factory=dict[str, Embeds])
    fingerprint: str = ""

    @property
    def device(self) -> torch.device:
        """Return where the network is."""
        return next(self.network.module.parameters()).device

    def conditioning(self, prompts: Sequence[str], negative_prompt: str | None) -> Conditioning:
        """Return the batch of some prompts on the network's device.

        Args:
            prompts: B of those that were encoded when the model was opened.
            negative_prompt: Likewise; None where guidance is off.

        Raises:
            KeyError: If a prompt was not encoded.
        """
        text = self.family.stack([self.embeds[prompt] for prompt in prompts]).to(self.device)
        if negative_prompt is None:
            return Conditioning(text)
        negative = self.family.stack([self.embeds[negative_prompt]] * len(prompts))
        return Conditioning(text, negative.to(self.device))
