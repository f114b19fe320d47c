"""The contract of a family of base models: text encoders, network and decoder.

A family is one file in this folder and one row of rows.py. Nothing outside models/ and
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
from alignprop_cli.guidance import Conditioning, Embeds, Guidance, Rescale
from alignprop_cli.schedule import NoiseSchedule


class TextEncoders(Protocol):
    """Turn prompts into embeddings; dropped as soon as all prompts are encoded."""

    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself.

        Returns:
            One `Embeds` per prompt, without a batch dimension, on the encoders' device. Not
            differentiable.
        """
        ...


class Network(Protocol):
    """The part that is called once per step and carries the LoRA.

    Latents stay (B, C, h, w) in the chain. Packing, position ids, the units of the timestep and the
    sign of the output differ between families and stay inside `predict`.

    Args:
        module: The network itself, which the LoRA is added to.

    A network that takes the guidance scale as an input has `embeds_guidance = True`, and finds the
    scale as "guidance" among the embeddings.
    """

    module: torch.nn.Module

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w) for an image of this size in pixels; None is the model's own size.

        Raises:
            ConfigError: If the model cannot sample images of this size.
        """
        ...

    def schedule(self, steps: int, latent_shape: tuple[int, int, int]) -> NoiseSchedule:
        """Return the noise levels of a chain of `steps` steps for latents (C, h, w).

        A family that lists `schedulers` or `spacings` takes the chosen one as a further argument
        `scheduler` or `spacing`.

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
        """Switch activation checkpointing of the network's blocks on or off."""
        ...


class Decoder(Protocol):
    """From clean latents to images, in its own precision.

    Args:
        module: The decoder's network, perhaps with more around it (the whole autoencoder).
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
            recompute: Whether the decoder's blocks are recomputed in backward.
        """
        ...


def stack(embeds: Sequence[Embeds]) -> Embeds:
    """Return the batch of several prompts' embeddings, which all have the same shapes."""
    names = embeds[0].tensors
    return Embeds({name: torch.stack([e.tensors[name] for e in embeds]) for name in names})


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Args:
        config: The `model` section of the configuration.
        path: A folder in diffusers format or a single file; for a hub id, the folder in the cache.
        dtype: Precision of the frozen weights.
        device: Where weights are quantised, if they are; None is where they are loaded.
    """

    config: ModelConfig
    path: Path
    dtype: torch.dtype
    device: torch.device | None = None


def meta_embeds(source: Source, **shapes: tuple[int, ...]) -> Embeds:
    """Return embeddings of one prompt on the meta device, by name and shape without the batch."""
    return Embeds(
        {n: torch.empty((1, *s), dtype=source.dtype, device="meta") for n, s in shapes.items()}
    )


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
        conditioning: Embeddings of one prompt (both branches): shapes without content.
        image_size: Latents (C, h, w) -> (H, W), the size of their image in pixels.
    """

    parts: Parts
    conditioning: Conditioning
    image_size: Callable[[tuple[int, int, int]], tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """Everything that is named after a family, in one row.

    Args:
        name: For people.
        pipeline_class: The pipeline's class in diffusers, as model_index.json names it.
        lora_prefix: What diffusers puts before the names of the network's layers in a LoRA file.
        target_modules: The layers that get a LoRA by default: endings of their names, or one
            regular expression for whole names.
        load_text_encoders: Loads the text encoders on a device.
        load_parts: Loads network and decoder on a device, frozen.
        on_meta: Builds network and decoder without weights, from configuration files alone.
        guidance_origin: As `guidance.Guidance.origin`.
        guidance_rescale: As `guidance.Guidance.rescale`.
        stack: Makes a batch of the embeddings of several prompts.
        schedulers: Values of `sample.scheduler` besides `model` that its networks can have.
        spacings: The same for `sample.spacing`.
        guides: Whether there is classifier-free guidance at all; False for a model whose
            model_index.json says that it was distilled without it.
        true_guidance: Whether `sample.guidance_scale` is an input of the network alone (where it
            has one), and `sample.true_guidance_scale` the scale of two branches.
        single_files: Whether a single file with all of a model's weights can be loaded.
        taesd: Hub id of the AutoencoderTiny that was published for it; None where there is none.
        t5: Whether T5 is among its text encoders, and whether it can be left out.
    """

    name: str
    pipeline_class: str
    lora_prefix: str
    target_modules: tuple[str, ...] | str
    load_text_encoders: Callable[[Source, torch.device], TextEncoders]
    load_parts: Callable[[Source, torch.device], Parts]
    on_meta: Callable[[Source], MetaModel]
    guidance_origin: Literal["uncond", "text"] = "uncond"
    guidance_rescale: Rescale | None = None
    stack: Callable[[Sequence[Embeds]], Embeds] = stack
    schedulers: tuple[str, ...] = ()
    spacings: tuple[str, ...] = ()
    guides: bool = True
    true_guidance: bool = False
    single_files: bool = False
    taesd: str | None = None
    t5: Literal["none", "optional", "needed"] = "none"


@dataclass(frozen=True)
class Sampler:
    """How images are sampled, in training and evaluation alike.

    Args:
        num_inference_steps: T, network calls of one chain.
        guidance: How the two branches are combined.
        eta: Share of fresh noise per step in [0, 1]; 0 is deterministic, None the scheduler's own.
        height: Pixels; None is the model's own.
        width: Pixels; None is the model's own.
        negative_prompt: The prompt of the unconditional branch.
        choices: Arguments `scheduler` and `spacing` of `Network.schedule`, where they are chosen.
    """

    num_inference_steps: int
    guidance: Guidance
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    choices: Mapping[str, str] = field(default_factory=dict[str, str])

    def schedule(self, network: Network, latent_shape: tuple[int, int, int]) -> NoiseSchedule:
        """Return the noise levels of the chain for latents (C, h, w).

        Raises:
            ConfigError: If the model has no such chain.
        """
        return network.schedule(self.num_inference_steps, latent_shape, **self.choices)


@dataclass
class Model:
    """A loaded base model: frozen parts, and the embeddings of all prompts it was opened with.

    Args:
        id: The model's id, as the user gave it.
        family: The family's row.
        network: Can carry a LoRA.
        decoder: From latents to images.
        embeds: Embeddings by prompt, without a batch dimension, on the CPU (`EmbedsCache`: or on
            disk).
        fingerprint: Hash of the architecture (names and shapes of the network's weights before a
            LoRA is added): models with the same fingerprint can exchange LoRAs.
        path: The folder or file it was loaded from; None where there is none.
        tiny_decoder: Decodes the images that are rewarded in training; None: `decoder` does.
    """

    id: str
    family: Family
    network: Network
    decoder: Decoder
    embeds: Mapping[str, Embeds] = field(default_factory=dict[str, Embeds])
    longest_prompt: str | None = None
    fingerprint: str = ""
    path: Path | None = None
    tiny_decoder: Decoder | None = None

    @property
    def reward_decoder(self) -> Decoder:
        """Return what decodes the images that are rewarded in training; samples get `decoder`."""
        return self.tiny_decoder or self.decoder

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return next(self.network.module.parameters()).device

    def conditioning(self, prompts: Sequence[str], negative_prompt: str | None) -> Conditioning:
        """Return the embeddings of a batch of prompts on the network's device.

        Args:
            prompts: B prompts that were encoded when the model was opened.
            negative_prompt: One more of these; None where guidance is off.

        Raises:
            KeyError: If a prompt was not encoded.
        """
        text = self.family.stack([self.embeds[prompt] for prompt in prompts]).to(self.device)
        if negative_prompt is None:
            return Conditioning(text)
        # One negative prompt for all images, so that each row has its own unconditional branch.
        negative = self.family.stack([self.embeds[negative_prompt]] * len(prompts))
        return Conditioning(text, negative.to(self.device))
