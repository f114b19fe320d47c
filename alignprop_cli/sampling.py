"""The differentiable sampling chain: one DDIM step, and the loops over them.

Shapes: B images, C latent channels, h x w latent pixels.

    latents (B, C, h, w)  --denoise-->  noise_pred (B, C, h, w)  --ddim_step-->  latents

Everything here knows tensors only. `rollout` runs calls without gradient; `backprop` runs the rest
of the chain along a `GradPath`, which says where the gradient flows (estimators.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from alignprop_cli.estimators import GradPath
from alignprop_cli.guidance import Denoise
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step

DrawNoise = Callable[[int], Tensor]
"""(index of the step) -> standard normal noise, same shape and dtype as latents."""


def predict_x0_epsilon(
    noise_pred: Tensor, latents: Tensor, step: Step, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Turn the output of the network into the clean sample and the noise it implies.

    Both satisfy latents = alpha x0 + sigma epsilon, but for a consistency model, whose x0 is
    c_out x0 + c_skip latents.

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
    # Each line solves latents = alpha x0 + sigma epsilon together with what the output means. None
    # divides by zero: NoiseSchedule refuses epsilon at alpha = 0, and steps start at sigma > 0.
    alpha, sigma = step.alpha, step.sigma
    if prediction_type == "epsilon":
        x0, epsilon = (latents - sigma * noise_pred) / alpha, noise_pred
    elif prediction_type == "v_prediction":
        # v = alpha epsilon - sigma x0, a rotation of (x0, epsilon): alpha^2 + sigma^2 = 1.
        x0, epsilon = alpha * latents - sigma * noise_pred, alpha * noise_pred + sigma * latents
    elif prediction_type == "sample":
        x0, epsilon = noise_pred, (latents - alpha * noise_pred) / sigma
    else:
        # flow: velocity = epsilon - x0 and latents = (1 - sigma) x0 + sigma epsilon
        x0, epsilon = latents - sigma * noise_pred, latents + alpha * noise_pred
    if step.c_skip != 0.0 or step.c_out != 1.0:
        x0 = step.c_out * x0 + step.c_skip * latents
    return x0, epsilon


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
    s = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2), or s = eta sigma' where the
    step renoises, as in consistency models.

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
    if eta > 0.0 and step.renoises:
        spread = eta * step.sigma_next
    elif eta > 0.0:
        kept = step.alpha * step.sigma_next / step.alpha_next
        spread = eta * step.sigma_next / step.sigma * math.sqrt(max(step.sigma**2 - kept**2, 0.0))

    # 3. Move to the next noise level. The variances of the predicted and the fresh noise add up to
    #    sigma'^2, so the marginal distribution is the same for every eta.
    direction = math.sqrt(max(step.sigma_next**2 - spread**2, 0.0))
    latents = step.alpha_next * x0 + direction * epsilon
    if eta > 0.0:
        if noise is None:
            raise ValueError(f"eta is {eta}: ddim_step needs noise where eta > 0")
        latents = latents + spread * noise
    return latents


def rollout(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    *,
    stops: Sequence[int] | None = None,
    eta: float | None = None,
    draw_noise: DrawNoise | None = None,
) -> Tensor:
    """Run the chain without any gradient; images may stop at different calls.

    Args:
        denoise: (latents, step) -> noise_pred with guidance applied. Once images have stopped it
            gets only the rows of the others, which are the first ones.
        latents: Standard normal noise, shape (B, C, h, w); scaled here as the schedule says.
        schedule: Noise levels of all steps.
        stops: The call before which each image stops, descending, B numbers in [0, T]; None runs
            all calls of all images.
        eta: Share of fresh noise per step in [0, 1]; None is the schedule's own.
        draw_noise: Gives the fresh noise of step i of all B images; needed where eta > 0.

    Returns:
        Latents before each image's stop, shape (B, C, h, w). Not differentiable; no activation is
        stored.

    Raises:
        ValueError: If stops do not descend, or eta > 0 and draw_noise is None.
    """
    stops = [len(schedule)] * len(latents) if stops is None else stops
    if list(stops) != sorted(stops, reverse=True) or len(stops) != len(latents):
        raise ValueError(f"expected {len(latents)} descending stops, got {list(stops)}")
    eta = schedule.eta if eta is None else eta
    with torch.no_grad():
        if schedule.initial_scale != 1.0:
            latents = schedule.initial_scale * latents
        for i, step in enumerate(schedule.steps[: max(stops, default=0)]):
            # Stops descend, so the images that still run are the first rows: a view, no copy.
            active = sum(stop > i for stop in stops)
            noise_pred = denoise(latents[:active], step)
            moved = _step(noise_pred, latents[:active], step, i, schedule, eta, draw_noise)
            latents = moved if active == len(latents) else torch.cat([moved, latents[active:]])
    return latents


def backprop(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    path: GradPath,
    *,
    eta: float | None = None,
    draw_noise: DrawNoise | None = None,
    plain: Denoise | None = None,
    recomputed: Collection[int] = (),
) -> Tensor:
    """Run the rest of the chain along a path, so that the reward's gradient flows back through it.

    Only the network call sits under the gradient switch. The arithmetic of the step stays outside
    it, so the path through `latents` survives after a call without gradient. At those no graph is
    kept and no activation is stored.

    Args:
        denoise: (latents, step) -> noise_pred with guidance applied.
        latents: What `rollout` returned for `path.rollout_calls` calls, shape (B, C, h, w).
        schedule: Noise levels of all steps.
        path: Which calls carry gradient, what their input is and where the chain ends.
        eta: Share of fresh noise per step in [0, 1]; None is the schedule's own.
        draw_noise: Gives the fresh noise of step i; needed where eta > 0. With `path.copies` also
            that of the copies, numbered from T on.
        plain: Used instead of `denoise` at calls without gradient, where a cheaper call gives the
            same values.
        recomputed: The calls that are recomputed in backward instead of storing their activations.
            Values and gradients are the same bit for bit on the CPU. Gradients then come from
            `backward` alone, not from `torch.autograd.grad`.

    Returns:
        Clean latents, shape (B, C, h, w); of a path with n ends (n B, C, h, w), the batch's own
        ends first, then those of each copy. Differentiable in the parameters of `denoise` through
        the path's calls, and in `latents`; the gradient stops at all other calls.

    Raises:
        ValueError: If eta > 0 and draw_noise is None.
    """
    eta = schedule.eta if eta is None else eta
    # A jump carries the gradient apart from the values: `latents` are those of the true chain,
    # `jump` is one large step from the last call with gradient to where the next one begins.
    jump: Tensor | None = None
    distances: list[Tensor] = []
    steps = len(schedule)
    for i in range(path.rollout_calls(steps), path.chain_calls(steps)):
        step = schedule.steps[i]
        if i in path:
            # 1. The call: its input has the true values, and as much of their gradient as is asked;
            #    the arithmetic of the step keeps all of it.
            latents = _attach(latents, jump, distances)
            inputs = _mix(latents, path.input_grad)
            noise_pred = _call(denoise, inputs, step, recompute=i in recomputed)
        else:
            with torch.no_grad():
                noise_pred = (plain or denoise)(latents, step)
        if i == path.stop or (path.leaps and i in path):
            # 2. The gradient skips the steps in between: one jump to the next of the path's calls,
            #    or to the end. Detached, the step below adds no second way for it.
            jump = _jump(noise_pred, latents, schedule, i, path)
            latents, noise_pred = latents.detach(), noise_pred.detach()
        # 3. The step itself, outside the gradient switch: linear in `latents`, so the gradient of
        #    later steps passes through it at the cost of a few multiplications.
        if i != path.stop or path.endpoint == "chain":
            latents = _step(noise_pred, latents, step, i, schedule, eta, draw_noise)
    # 4. The end, with the copies of it.
    if jump is not None and path.endpoint == "predicted":
        latents = jump.detach()
    ends = [_attach(latents, jump, distances)] if path.ends > path.copies else []
    ends += _copies(denoise, latents.detach(), schedule, path, draw_noise, recomputed)
    latents = ends[0] if len(ends) == 1 else torch.cat(ends)
    return _weigh(latents, _weight(path, schedule, distances))


def sample(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    *,
    eta: float | None = None,
    path: GradPath | None = None,
    plain: Denoise | None = None,
    draw_noise: DrawNoise | None = None,
    recomputed: Collection[int] = (),
) -> Tensor:
    """Run the whole chain from noise to clean latents: `rollout`, then `backprop` along a path.

    Args:
        denoise: As in `backprop`.
        latents: As in `rollout`.
        schedule: Noise levels of all steps.
        eta: Share of fresh noise per step in [0, 1]; None is the schedule's own.
        path: None means no gradient at all.
        plain: As in `backprop`.
        draw_noise: Gives the fresh noise of step i; needed where eta > 0.
        recomputed: As in `backprop`.

    Returns:
        Clean latents, as `backprop`.

    Raises:
        ValueError: If eta > 0 and draw_noise is None.
    """
    # Under no_grad a path has no meaning, and its calls would ask for a graph nobody goes back.
    if not torch.is_grad_enabled():
        path = None
    stops = None if path is None else [path.rollout_calls(len(schedule))] * len(latents)
    latents = rollout(
        plain or denoise, latents, schedule, stops=stops, eta=eta, draw_noise=draw_noise
    )
    if path is None:
        return latents
    return backprop(
        denoise,
        latents,
        schedule,
        path,
        eta=eta,
        draw_noise=draw_noise,
        plain=plain,
        recomputed=recomputed,
    )


def _call(denoise: Denoise, latents: Tensor, step: Step, *, recompute: bool) -> Tensor:
    """Call the network with gradient; with `recompute`, backward runs it a second time."""
    with torch.enable_grad():
        if not recompute:
            return denoise(latents, step)
        # The step is an argument, not a closure over the loop: the call is repeated during
        # backward, when a closure would see the last step.
        # Reentrant checkpointing needs an input that requires grad. Where there is one it is used,
        # since it keeps no graph: the graph's small nodes would lie between freed activations and
        # keep glibc from reusing their memory
        # (tests/benchmarks/results/heap_epyc-2-cores_202611.md).
        # No random state is saved: the network is in eval mode, without dropout.
        return checkpoint(
            denoise,
            latents,
            step,
            use_reentrant=latents.requires_grad,
            preserve_rng_state=False,
        )


def _step(
    noise_pred: Tensor,
    latents: Tensor,
    step: Step,
    i: int,
    schedule: NoiseSchedule,
    eta: float,
    draw_noise: DrawNoise | None,
) -> Tensor:
    """Take step i, with its fresh noise where eta > 0."""
    if eta > 0.0 and draw_noise is None:
        raise ValueError(f"eta is {eta}: the chain needs draw_noise where eta > 0")
    noise = draw_noise(i)[: len(latents)] if draw_noise is not None and eta > 0.0 else None
    return ddim_step(noise_pred, latents, step, schedule.prediction_type, eta=eta, noise=noise)


def _mix(latents: Tensor, alpha: float) -> Tensor:
    """Return the same values with a share alpha of the gradient."""
    if alpha == 1.0:
        return latents
    return latents.detach() if alpha == 0.0 else torch.lerp(latents.detach(), latents, alpha)


def _weigh(latents: Tensor, weight: float | Tensor) -> Tensor:
    """Return the same values with the gradient multiplied by a factor, or one for each image."""
    if isinstance(weight, float) and weight == 1.0:
        return latents
    return latents.detach() + weight * (latents - latents.detach())


def _weight(path: GradPath, schedule: NoiseSchedule, distances: list[Tensor]) -> float | Tensor:
    """Return the factor on the gradient that enters the end."""
    weight = path.weight
    if path.rescale:
        weight *= 1.0 + path.rescale * (1.0 / schedule.path_share(path.calls) - 1.0)
    if path.tau is None or not distances:
        return weight
    return weight / torch.stack(distances).clamp(min=path.tau).sum(dim=0)


def _attach(latents: Tensor, jump: Tensor | None, distances: list[Tensor]) -> Tensor:
    """Return the values of latents with the gradient of a jump (straight-through).

    How far the jump landed from them is added to the distances, for each image.
    """
    if jump is None:
        return latents
    gap = jump - jump.detach()
    distances.append((jump.detach() - latents).abs().mean(tuple(range(1, gap.ndim)), keepdim=True))
    return latents.detach() + gap


def _jump(
    noise_pred: Tensor, latents: Tensor, schedule: NoiseSchedule, i: int, path: GradPath
) -> Tensor:
    """Go from call i in one step: to the path's next call, to the end, or at the stop to x0."""
    if i == path.stop:
        x0, _ = predict_x0_epsilon(noise_pred, latents, schedule.steps[i], schedule.prediction_type)
        return x0
    # The level before a call is the level after the step that precedes it.
    later = [call for call in path.calls if call > i]
    last = schedule.steps[later[0] - 1 if later else -1]
    across = replace(schedule.steps[i], alpha_next=last.alpha_next, sigma_next=last.sigma_next)
    return ddim_step(noise_pred, latents, across, schedule.prediction_type)


def _copies(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    path: GradPath,
    draw_noise: DrawNoise | None,
    recomputed: Collection[int],
) -> list[Tensor]:
    """Make the path's only call once per copy, each from the clean latents with fresh noise."""
    if path.copies and draw_noise is None:
        raise ValueError("a path with copies needs draw_noise")
    ends: list[Tensor] = []
    for copy in range(path.copies):
        assert draw_noise is not None
        (i,) = path.calls
        step = schedule.steps[i]
        # Numbers from T on, so that no copy shares its noise with a step of the chain.
        noised = step.alpha * latents + step.sigma * draw_noise(len(schedule) + copy)
        noise_pred = _call(denoise, noised, step, recompute=i in recomputed)
        ends.append(_jump(noise_pred, noised, schedule, i, path))
    return ends  # each (B, C, h, w)
