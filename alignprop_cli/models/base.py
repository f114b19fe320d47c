"""The contract of a base model: text in, network calls, latents out, images out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from alignprop_cli.sampling import Denoise
from alignprop_cli.schedule import NoiseSchedule

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name diffusers gives a LoRA file in a folder."""


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about the prompts of a batch.

    Args:
        prompt_embeds: Shape (B, L, D), in the network's precision.
        negative_prompt_embeds: The same for the unconditional branch.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor


class DiffusionModel(Protocol):
    """A frozen base model with a network that can carry a LoRA.

    Args:
        id: What the user called it.
        network: The part that is called once per step; LoRA goes here.
        fingerprint: Hash of the architecture (names and shapes of the network's weights): two
            checkpoints with the same fingerprint can exchange LoRAs.
    """

    id: str
    network: torch.nn.Module
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        ...

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w) for a picture of this size in pixels; None is the model's own size.

        Raises:
            ConfigError: If the size is not a multiple of what the model can draw.
        """
        ...

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        """Return the noise levels of a chain of this many steps.

        Raises:
            ConfigError: If the model's scheduler has no such chain.
        """
        ...

    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """Encode prompts. Not differentiable; the last 1,024 texts are cached."""
        ...

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts for good, then move the text encoder to the CPU.

        The embeddings are kept in the CPU's memory too; other prompts are encoded there from now
        on, which is slower.
        """
        ...

    def denoiser(
        self,
        conditioning: Conditioning,
        guidance_scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Denoise:
        """Return the guided network call: (latents, timestep) -> noise_pred, in latents' dtype.

        Both branches go through the network in one batch; guidance_scale 1 runs the text branch
        alone, and so do timesteps outside of the interval, where 0 is the image and 1 pure noise.
        Differentiable in latents and in the network's trainable parameters.

        Source of the interval: Kynkaanniemi et al. 2024, arXiv:2404.07724.
        """
        ...

    def recompute_blocks(self, on: bool) -> None:
        """Compute the blocks of the network again in backward, from now on or no longer."""
        ...

    def decoder_parameters(self) -> list[Tensor]:
        """Return the weights that `decode` uses."""
        ...

    def decode(self, latents: Tensor, *, use_checkpoint: bool = False) -> Tensor:
        """Decode clean latents (B, C, h, w) to images (B, 3, H, W), float32, in [0, 1].

        Differentiable in latents; saturated pixels as `images.saturate` says.
        """
        ...

    def load_lora(self, path: Path) -> None:
        """Add a LoRA from a file or folder to the network, ready to be used.

        Raises:
            AssetError: If there is no such file or it is not a LoRA.
            ConfigError: If it belongs to another model.
        """
        ...

    def unload_lora(self) -> None:
        """Take the LoRA out of the network: the base model is back, exactly."""
        ...

    def save_lora(
        self, directory: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """Write LoRA weights in diffusers' format and return the file.

        Args:
            directory: Existing folder.
            weights: The network's adapter, keys as `lora.weights` returns them.
            metadata: Goes to the header of the file; values are texts.
        """
        ...
