"""What the transformers of rectified flows have in common: noise levels, sizes, recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from alignprop_cli.errors import ConfigError
from alignprop_cli.models.base import Source
from alignprop_cli.models.components import PartRules, recompute
from alignprop_cli.models.rules import NOTHING, either, number, one_of, whole
from alignprop_cli.schedule import NoiseSchedule, flow_schedule

SCHEDULER = PartRules(
    ("FlowMatchEulerDiscreteScheduler",),
    {
        "_class_name": one_of("FlowMatchEulerDiscreteScheduler"),
        "num_train_timesteps": whole(1, 100_000),
        "shift": number(0.0, float("inf")),
        "use_dynamic_shifting": one_of(True, False),
        "time_shift_type": one_of("exponential", "linear"),
        "shift_terminal": either(number(0.0, 1.0), NOTHING),
        "base_image_seq_len": whole(1, 2**20),
        "max_image_seq_len": whole(1, 2**20),
        "base_shift": number(-float("inf"), float("inf")),
        "max_shift": number(-float("inf"), float("inf")),
        # The two that are not obeyed: noise that rises, and fresh noise at every step.
        "invert_sigmas": either(one_of(False), NOTHING),
        "stochastic_sampling": either(one_of(False), NOTHING),
    },
    "scheduler_config.json",
)
"""The scheduler of a rectified flow. diffusers' own class makes the noise levels."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of images that a network can sample, in pixels.

    Args:
        channels: Of the latents.
        per_latent: Pixels in a row of an image, divided by latents in a row.
        unit: Height and width are multiples of it.
        default: Height and width where none is asked for.
        most: The largest height and width; None where there is no limit.
    """

    channels: int
    per_latent: int
    unit: int
    default: int
    most: int | None = None

    def latent_shape(
        self, height: int | None, width: int | None, model_id: str
    ) -> tuple[int, int, int]:
        """Return (C, h, w), as `Network.latent_shape`."""
        sizes: list[int] = []
        for name, asked in (("height", height), ("width", width)):
            pixels = self.default if asked is None else asked
            if pixels % self.unit:
                nearest = max(self.unit, round(pixels / self.unit) * self.unit)
                raise ConfigError(
                    f"sample.{name}: {pixels} is not a multiple of {self.unit}, which {model_id} "
                    f"needs; nearest: {nearest}"
                )
            if self.most is not None and pixels > self.most:
                raise ConfigError(
                    f"sample.{name}: {pixels} is more than the {self.most} that {model_id} has "
                    "positions for"
                )
            sizes.append(pixels // self.per_latent)
        return self.channels, sizes[0], sizes[1]

    def image_size(self, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
        """Return (H, W) of the image of latents (C, h, w)."""
        return latent_shape[1] * self.per_latent, latent_shape[2] * self.per_latent


class FlowTransformer:
    """A transformer of a rectified flow; a family's subclass says how it is called.

    Args:
        module: diffusers' network, frozen.
        scheduler_config: The configuration of the model's scheduler.
        sizes: What it can sample.
        model_id: The model's id as the user gave it, for messages.
    """

    def __init__(
        self, module: Any, scheduler_config: Mapping[str, Any], sizes: Sizes, model_id: str
    ) -> None:
        self.module: Any = module
        self.sizes = sizes
        self._scheduler_config = dict(scheduler_config)
        self._model_id = model_id

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the network's own weights."""
        # Not `module.dtype`: where the linear layers are quantised and have no bias, the first
        # parameter is one of the LoRA, which is float32.
        own = (p for name, p in self.module.named_parameters() if "lora_" not in name)
        return next(own).dtype

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (C, h, w); see `Network`."""
        return self.sizes.latent_shape(height, width, self._model_id)

    def schedule(
        self, steps: int, latent_shape: tuple[int, int, int], spacing: str = "model"
    ) -> NoiseSchedule:
        """Return the levels of the model's own pipeline; see `Network`.

        Args:
            steps: T.
            latent_shape: (C, h, w).
            spacing: `model`, or `linear` for linspace(1, 1 / T, T), shifted by the scheduler.
        """
        sigmas = self.own_sigmas(steps) if spacing == "model" else _linear(steps)
        try:
            scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
            mu = self.shift(steps, latent_shape)
            options = {} if mu is None else {"mu": mu}
            if sigmas is None:
                scheduler.set_timesteps(steps, **options)
            else:
                scheduler.set_timesteps(sigmas=sigmas, **options)
            return flow_schedule(scheduler.sigmas.tolist(), scheduler.timesteps.tolist())
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(f"model.id: {self._model_id}: scheduler: {error}") from error

    def own_sigmas(self, steps: int) -> Any:
        """Return the levels before the shift that the model's pipeline gives to the scheduler.

        None where the scheduler makes them. Mostly they are linear.
        """
        return _linear(steps)

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> float | None:
        """Return mu of the scheduler's dynamic shift, as the model's pipeline computes it."""
        raise NotImplementedError

    def recompute_blocks(self, on: bool) -> None:
        """Switch checkpointing of the network's blocks on or off; see `Network`."""
        if on:
            self.module.enable_gradient_checkpointing(recompute)
        else:
            self.module.disable_gradient_checkpointing()


def _linear(steps: int) -> Any:
    return np.linspace(1.0, 1.0 / steps, steps)


def patches_of(latents: Tensor) -> Tensor:
    """Return latents in 2 x 2 patches: (B, C, 2 h, 2 w) -> (B, C, h, 2, w, 2)."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))


def packed(latents: Tensor) -> Tensor:
    """Return 2 x 2 patches of latents as tokens: (B, C, 2 h, 2 w) -> (B, h w, 4 C)."""
    return patches_of(latents).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `packed`: (B, h w, 4 C) -> (B, C, 2 h, 2 w)."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))  # (B, h, w, C, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def refuse_float16(source: Source) -> None:
    """Refuse float16 for a model that overflows in it.

    Raises:
        ConfigError: With the precisions that there are.
    """
    if source.dtype == torch.float16:
        chosen = ", which `auto` is on this GPU" if source.config.dtype == "auto" else ""
        raise ConfigError(
            f"model.dtype: {source.config.id} overflows in float16{chosen}",
            hint="set model.dtype: bfloat16, or float32",
        )
