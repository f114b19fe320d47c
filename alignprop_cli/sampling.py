"""The differentiable sampling chain: guidance, one DDIM step, and the loop over them.

Shapes: B images, C latent channels, h x w latent pixels.

    latents (B, C, h, w)  --denoise-->  noise_pred (B, C, h, w)  --ddim_step-->  latents

Everything here knows tensors only. `sample` runs the whole chain; which network calls carry
gradient is a value made in `truncation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from alignprop_cli.estimators import GradWindow
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step

Denoise = Callable[[Tensor, float], Tensor]
"""(latents, timestep) -> noise_pred, guidance applied, same shape and dtype as latents."""

DrawNoise = Callable[[int], Tensor]
"""(index of the step) -> standard normal noise, same shape and dtype as latents."""


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


def predict_x0_epsilon(
    noise_pred: Tensor, latents: Tensor, step: Step, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Turn the output of the network into the clean sample and the noise it implies.

    Both satisfy latents = alpha x0 + sigma epsilon.

    Args:
        noise_pred: Output of the network, shape (B, C, h, w).
        latents: Its input, same shape.
        step: Gives alpha and sigma.
        prediction_type: What the network predicts, see `NoiseSchedule`.

    Returns:
        (x0, epsilon), each of shape (B, C, h, w). Differentiable in both tensors.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 and appendix D (v_prediction);
        Lipman et al. 2023, arXiv:2210.02747 (flow, with time running from data to noise here).
    """
    alpha, sigma = step.alpha, step.sigma
    if prediction_type == "epsilon":
        return (latents - sigma * noise_pred) / alpha, noise_pred
    if prediction_type == "v_prediction":
        return alpha * latents - sigma * noise_pred, alpha * noise_pred + sigma * latents
    if prediction_type == "sample":
        return noise_pred, (latents - alpha * noise_pred) / sigma
    # flow: velocity = epsilon - x0 and latents = (1 - sigma) x0 + sigma epsilon
    return latents - sigma * noise_pred, latents + alpha * noise_pred


def ddim_step(
    noise_pred: Tensor,
    latents: Tensor,
    step: Step,
    prediction_type: PredictionType,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Take one step of DDIM, for diffusion and for rectified flow alike.

    latents' = alpha' x0 + sqrt(sigma'^2 - s^2) epsilon + s noise, where
    s = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2).

    Args:
        noise_pred: Output of the network, guidance applied, shape (B, C, h, w).
        latents: Noisy latents before the step, same shape.
        step: (alpha, sigma) before and (alpha', sigma') after.
        prediction_type: What the network predicts, see `NoiseSchedule`.
        eta: Share of fresh noise in [0, 1]; 0 is deterministic, 1 is DDPM's variance.
        noise: Standard normal, same shape; needed where eta > 0.

    Returns:
        latents after the step, same shape. Differentiable in noise_pred and latents.

    Raises:
        ValueError: If eta > 0 and no noise is given.

    Source: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16; s is written for any (alpha, sigma)
        and equals theirs where alpha^2 + sigma^2 = 1.
    """
    # 1. Clean sample and noise implied by the prediction.
    x0, epsilon = predict_x0_epsilon(noise_pred, latents, step, prediction_type)

    # 2. Spread of the fresh noise. max(): rounding can leave a tiny negative under the root.
    spread = 0.0
    if eta > 0.0:
        kept = step.alpha * step.sigma_next / step.alpha_next
        spread = eta * step.sigma_next / step.sigma * math.sqrt(max(step.sigma**2 - kept**2, 0.0))

    # 3. Move to the next noise level.
    direction = math.sqrt(max(step.sigma_next**2 - spread**2, 0.0))
    latents = step.alpha_next * x0 + direction * epsilon
    if eta > 0.0:
        if noise is None:
            raise ValueError(f"eta is {eta}: ddim_step needs noise where eta > 0")
        latents = latents + spread * noise
    return latents


def sample(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    window: GradWindow | None = None,
    rollout: Denoise | None = None,
    draw_noise: DrawNoise | None = None,
    recomputed: GradWindow | None = None,
) -> Tensor:
    """Run the whole chain from noise to clean latents.

    Only the network call sits under the gradient switch. The arithmetic of the step stays outside
    it, so the path through `latents` survives after a window that ends before the last step.
    Outside the window no graph is kept and no activation is stored.

    Args:
        denoise: (latents, timestep) -> noise_pred with guidance applied.
        latents: Standard normal noise at the first step, shape (B, C, h, w).
        schedule: Noise levels of all steps.
        eta: Share of fresh noise per step in [0, 1].
        window: The calls that carry gradient; None means a roll-out without any gradient.
        rollout: Takes the place of `denoise` outside the window, where a cheaper call gives the
            same values.
        draw_noise: Gives the fresh noise of step i; needed where eta > 0.
        recomputed: The calls of the window that backward computes again in place of storing their
            activations. Values and gradients are the same bit for bit on the CPU; gradients come by
            `backward` alone, not by `torch.autograd.grad`.

    Returns:
        Clean latents, shape (B, C, h, w). Differentiable in the parameters of `denoise` through
        the calls inside the window, and in `latents`; the gradient stops at all other calls.

    Raises:
        ValueError: If eta > 0 and draw_noise is None.
    """
    if eta > 0.0 and draw_noise is None:
        raise ValueError(f"eta is {eta}: sample needs draw_noise where eta > 0")
    grad_allowed = torch.is_grad_enabled() and window is not None
    with torch.set_grad_enabled(grad_allowed):
        for i, step in enumerate(schedule.steps):
            has_grad = grad_allowed and window is not None and i in window
            with torch.set_grad_enabled(has_grad):
                if has_grad and recomputed is not None and i in recomputed:
                    # The timestep is an argument, not a closure over the loop: the call is
                    # repeated during backward, when a closure would see the last timestep.
                    # Reentrant where it can be, with a gradient into the call: that keeps no graph,
                    # whose small nodes would lie between the places of freed activations, so that
                    # glibc could not use those again
                    # (tests/benchmarks/results/heap_epyc-2-cores_202611.md).
                    noise_pred = checkpoint(
                        denoise,
                        latents,
                        step.timestep,
                        use_reentrant=latents.requires_grad,
                        preserve_rng_state=False,
                    )
                elif has_grad or rollout is None:
                    noise_pred = denoise(latents, step.timestep)
                else:
                    noise_pred = rollout(latents, step.timestep)
            noise = draw_noise(i) if draw_noise is not None and eta > 0.0 else None
            latents = ddim_step(
                noise_pred, latents, step, schedule.prediction_type, eta=eta, noise=noise
            )
    return latents
