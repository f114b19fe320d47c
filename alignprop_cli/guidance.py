"""Classifier-free guidance: the network's two branches, and how they are combined.

This is the only place where the branches meet. A family's `Guidance` says what its scale means.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignprop_cli.schedule import Step

Denoise = Callable[[Tensor, Step], Tensor]
"""(latents, step) -> noise_pred, guidance applied, same shape and dtype as latents."""


@dataclass(frozen=True)
class Embeds:
    """The embeddings of prompts, as the network reads them.

    Args:
        tensors: By the names that the family's network expects, e.g. "hidden" and "pooled"; shape
            (B, ...) for a batch, without the first dimension for one prompt.
    """

    tensors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Embeds:
        """Return a copy on a device."""
        return Embeds({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def with_guidance(self, scale: float) -> Embeds:
        """Return a copy of a batch with the guidance scale as "guidance", shape (B,), float32."""
        some = next(iter(self.tensors.values()))
        guidance = torch.full((len(some),), scale, device=some.device)
        return Embeds({**self.tensors, "guidance": guidance})

    def __getitem__(self, rows: slice) -> Embeds:
        return Embeds({name: tensor[rows] for name, tensor in self.tensors.items()})

    def followed_by(self, other: Embeds) -> Embeds:
        """Return both batches in one, this one's rows first."""
        return Embeds(
            {name: torch.cat([mine, other.tensors[name]]) for name, mine in self.tensors.items()}
        )


@dataclass(frozen=True)
class Conditioning:
    """The embeddings that condition the network on the prompts of a batch.

    Args:
        text: Embeddings of the prompts, batched.
        negative: Embeddings for the unconditional branch, batched; None switches guidance off.
    """

    text: Embeds
    negative: Embeds | None = None

    def __getitem__(self, rows: slice) -> Conditioning:
        return Conditioning(self.text[rows], None if self.negative is None else self.negative[rows])


Predict = Callable[[Tensor, float, Embeds], Tensor]
"""(latents, timestep, embeds) -> noise_pred, one branch per row, unguided."""

Rescale = Callable[[Tensor, Tensor], Tensor]
"""(guided, text) predictions -> the guided one rescaled, for families that do so."""


@dataclass(frozen=True)
class Guidance:
    """How the two branches of classifier-free guidance are combined.

    Args:
        scale: w, dimensionless, as diffusers counts it for the family; at most 1 (for the origin
            "text" at most 0) means the text branch alone.
        interval: (low, high) in sigma: calls at other noise levels run the text branch alone.
        origin: What w (c - u) is added to: "uncond" is u + w (c - u), "text" is c + w (c - u), for
            the predictions u of the unconditional and c of the text branch.
        rescale: Applied to the guided prediction; None leaves it as it is.
        embedded: The scale that the network takes as an input (`Embeds` "guidance"), as models do
            that guidance was distilled into; None for a network without such an input.

    Source of the interval: Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    origin: Literal["uncond", "text"] = "uncond"
    rescale: Rescale | None = None
    embedded: float | None = None

    @property
    def enabled(self) -> bool:
        """Return whether any call needs both branches."""
        # As diffusers has it: up to the scale at which the formula returns c, there is no guidance.
        # Models that were distilled without it, such as SD-Turbo, are published with scale 0.
        return self.scale > (1.0 if self.origin == "uncond" else 0.0)

    def applies(self, sigma: float) -> bool:
        """Return whether a call at this noise level needs both branches."""
        return self.enabled and self.interval[0] <= sigma <= self.interval[1]

    def combine(self, noise_pred_uncond: Tensor, noise_pred_text: Tensor) -> Tensor:
        """Return the guided prediction, shape (B, C, h, w). Differentiable in both."""
        # c + w (c - u) = u + (w + 1) (c - u)
        scale = self.scale + (self.origin == "text")
        guided = guide(noise_pred_uncond, noise_pred_text, scale)
        return guided if self.rescale is None else self.rescale(guided, noise_pred_text)


def guided(
    predict: Predict,
    conditioning: Conditioning,
    guidance: Guidance,
    *,
    detach_uncond: bool = False,
) -> Denoise:
    """Return the guided network call of a batch.

    Both branches go through the network in one batch, the unconditional one first; where guidance
    does not apply, the text branch runs alone.

    Args:
        predict: The network, unguided.
        conditioning: Of B prompts.
        guidance: How the branches are combined.
        detach_uncond: Whether the unconditional branch is a constant for the gradient. It then runs
            by itself and stores nothing, whatever the gradient mode.

    Returns:
        (latents, step) -> noise_pred, in latents' dtype. Given fewer than B rows, it takes them for
        the first ones. Differentiable in latents and in the trainable parameters of `predict`; with
        `detach_uncond` through the text branch alone.
    """

    # Cached: a chain calls it once per step, mostly with the same number of rows.
    @functools.cache
    def first(rows: int) -> tuple[Embeds, Embeds | None, Embeds | None]:
        part = conditioning[slice(rows)]
        text, negative = part.text, part.negative
        if guidance.embedded is not None:
            text = text.with_guidance(guidance.embedded)
        if negative is None or not guidance.enabled:
            return text, None, None
        if guidance.embedded is not None:
            negative = negative.with_guidance(guidance.embedded)
        return text, negative, None if detach_uncond else negative.followed_by(text)

    def denoise(latents: Tensor, step: Step) -> Tensor:
        text, negative, both = first(len(latents))
        if negative is None or not guidance.applies(step.sigma):
            return predict(latents, step.timestep, text)
        if both is None:
            # In every gradient mode: both branches in one batch would round otherwise, and a call
            # that is recomputed has to repeat itself bit for bit.
            with torch.no_grad():
                uncond = predict(latents.detach(), step.timestep, negative)
            return guidance.combine(uncond, predict(latents, step.timestep, text))
        # `repeat` rather than two uses of latents: its backward adds the two gradients itself, in
        # the same order whether or not the call is recomputed.
        branches = predict(latents.repeat(2, 1, 1, 1), step.timestep, both)  # (2 B, C, h, w)
        return guidance.combine(*branches.chunk(2))

    return denoise


def guide(noise_pred_uncond: Tensor, noise_pred_text: Tensor, guidance_scale: float) -> Tensor:
    """Combine the unconditional and the conditional prediction by classifier-free guidance.

    noise_pred = uncond + w (text - uncond) with w = guidance_scale; w = 1 returns the text branch.

    Args:
        noise_pred_uncond: Prediction for the empty (or negative) prompt, shape (B, C, h, w).
        noise_pred_text: Prediction for the prompt, same shape and dtype.
        guidance_scale: w, dimensionless, in the convention of diffusers: 1 means no guidance.

    Returns:
        noise_pred, shape (B, C, h, w). Differentiable in both predictions.

    Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, whose w is ours minus 1.
    """
    return noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
