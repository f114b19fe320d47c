"""The noise level before and after every step of a sampling chain.

Notation used by the whole package: a noisy sample is `latents = alpha * x0 + sigma * epsilon`.
A variance preserving diffusion has alpha^2 + sigma^2 = 1; a rectified flow has alpha + sigma = 1.
A step takes (alpha, sigma) to (alpha_next, sigma_next).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]

# Deviation of the data, as consistency models are parametrised.
_SIGMA_DATA = 0.5
# What float32 may add to a noise level, as a share of it.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Step:
    """One step of the chain.

    Args:
        timestep: Input of the network, in the units of the scheduler (0 to 999 for diffusion).
        alpha: Scale of the signal before the step, in [0, 1].
        sigma: Scale of the noise before the step, in [0, 1].
        alpha_next: Scale of the signal after the step, in (0, 1].
        sigma_next: Scale of the noise after the step, in [0, 1].
        c_skip: Share of the step's input in its clean sample, and
        c_out: share of the predicted clean sample: a consistency model's boundary condition.
        renoises: Whether at eta = 1 all noise after the step is fresh, as in consistency models;
            else at eta = 1 it has the variance of DDPM.
    """

    timestep: float
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    c_skip: float = 0.0
    c_out: float = 1.0
    renoises: bool = False


@dataclass(frozen=True)
class NoiseSchedule:
    """All steps of a chain, first (noisiest) to last, and what the network predicts.

    The coefficients are Python floats: reading them never waits for an accelerator.

    Args:
        steps: The steps in the order in which they are taken.
        prediction_type: `epsilon`, `v_prediction` (alpha epsilon - sigma x0), `sample` (x0) or
            `flow` (epsilon - x0, the velocity of a rectified flow).
        eta: Share of fresh noise per step where the caller does not choose one.
        initial_scale: Factor on the standard normal noise that the chain starts from.

    Raises:
        ValueError: If there is no step, the prediction type is unknown, or the noise is predicted
            where no signal is left (alpha = 0): x0 cannot be recovered from it.
    """

    steps: tuple[Step, ...]
    prediction_type: PredictionType
    eta: float = 0.0
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"unknown prediction_type {self.prediction_type!r}; "
                f"expected one of {get_args(PredictionType)}"
            )
        if not self.steps:
            raise ValueError("a schedule needs at least one step, got none")
        # x0 = (latents - sigma epsilon) / alpha divides by zero there.
        if self.prediction_type == "epsilon" and self.steps[0].alpha == 0.0:
            raise ValueError(
                "epsilon prediction is undefined at alpha = 0 (a zero terminal SNR schedule); "
                "use a model with v_prediction, or timesteps that start below the last one"
            )

    def __len__(self) -> int:
        return len(self.steps)

    def path_share(self, calls: Iterable[int]) -> float:
        """Return the share of the path through the noise that the steps of these calls cover.

        A step covers sigma - sigma_next of it, and all steps together 1. A call moves a rectified
        flow, and so passes gradient on, in proportion to that.

        Args:
            calls: Indices of steps.
        """
        whole = self.steps[0].sigma - self.steps[-1].sigma_next
        covered = (self.steps[i].sigma - self.steps[i].sigma_next for i in calls)
        return sum(covered) / whole

    def shortened(self, before: int, calls: int) -> NoiseSchedule:
        """Return the schedule with fewer, larger steps at its beginning.

        Together they cover the same noise levels, so the rest of the chain begins where it did.

        Args:
            before: How many steps are replaced, counted from the first.
            calls: How many steps replace them, spread evenly.

        Raises:
            ValueError: Unless 1 <= calls <= before <= T.
        """
        if not 1 <= calls <= before <= len(self):
            raise ValueError(
                f"expected 1 <= calls <= before <= {len(self)}, got calls={calls}, before={before}"
            )
        # New step j replaces the old steps edges[j] .. edges[j + 1] - 1: it starts at the level
        # (and timestep) of the first of them and ends at the level after the last.
        edges = [round(i * before / calls) for i in range(calls + 1)]
        first = tuple(
            replace(
                self.steps[start],
                alpha_next=self.steps[stop - 1].alpha_next,
                sigma_next=self.steps[stop - 1].sigma_next,
            )
            for start, stop in itertools.pairwise(edges)
        )
        return replace(self, steps=first + self.steps[before:])


def diffusion_schedule(
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    final_alpha_cumprod: float,
    prediction_type: PredictionType,
) -> NoiseSchedule:
    """Build the schedule of DDIM sampling for a variance preserving diffusion.

    alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]). The level after a
    step at t is the one at t - N // T (N training timesteps, T steps), which is DDIM's rule and
    need not be the next timestep in the list; below 0 it is `final_alpha_cumprod`.

    Args:
        alphas_cumprod: Cumulative product of 1 - beta, shape (N,), in [0, 1], decreasing.
        timesteps: T distinct training timesteps, decreasing, each in [0, N).
        final_alpha_cumprod: alphas_cumprod at the clean end, 1 or alphas_cumprod[0].
        prediction_type: What the network predicts.

    Returns:
        The schedule with T steps. Not differentiable.

    Source: Song et al. 2021, arXiv:2010.02502, eq. 12, where their alpha_t is `alphas_cumprod[t]`.
    """
    cumprod = cast(list[float], alphas_cumprod.double().tolist())  # pyright: ignore[reportUnknownMemberType]
    # N // T, which need not be the distance of two timesteps in the list.
    stride = len(cumprod) // max(len(timesteps), 1)

    def levels(timestep: int) -> tuple[float, float]:
        value = cumprod[timestep] if timestep >= 0 else float(final_alpha_cumprod)
        return math.sqrt(value), math.sqrt(1.0 - value)

    steps = tuple(Step(int(t), *levels(int(t)), *levels(int(t) - stride)) for t in timesteps)
    return NoiseSchedule(steps, prediction_type)


def euler_schedule(
    timesteps: Sequence[float],
    sigmas: Sequence[float],
    prediction_type: PredictionType,
    *,
    eta: float,
    unit_noise: bool,
) -> NoiseSchedule:
    """Build the schedule of Euler's method in the variance exploding form, for the same networks.

    With x = x0 + s epsilon, Euler's step x' = x + (s' - s) epsilon is DDIM's step for the latents
    x / sqrt(1 + s^2), whose alpha is 1 / sqrt(1 + s^2) and sigma s / sqrt(1 + s^2). The ancestral
    method is DDIM with eta = 1.

    Args:
        timesteps: T inputs of the network, decreasing, whole or not.
        sigmas: The T + 1 noise levels s, decreasing; the last one is that of the clean end.
        prediction_type: What the network predicts.
        eta: 0 is Euler's method, 1 the ancestral one.
        unit_noise: Whether x starts as sqrt(1 + s^2) times standard normal noise, which is the
            whole variance at s; else as s times the noise.

    Returns:
        The schedule with T steps. Not differentiable.

    Raises:
        ValueError: If the levels rise.

    Source: Karras et al. 2022, arXiv:2206.00364, section 4; diffusers' Euler(Ancestral)Discrete-
        Scheduler, whose sigma_up is `ddim_step`'s spread at eta = 1.
    """

    def levels(sigma: float) -> tuple[float, float]:
        scale = math.sqrt(1.0 + sigma**2)
        return 1.0 / scale, sigma / scale

    # The last two may be one level by two ways of rounding.
    for sigma, after in itertools.pairwise(sigmas):
        if after > sigma * (1.0 + _ROUNDING):
            raise ValueError(
                f"the noise levels rise from {sigma:.4g} to {after:.4g}; see sigma_min and "
                "sigma_max of the scheduler"
            )
    # The end is left in the variance exploding form, as what is decoded: (1, 0) mostly.
    after = [levels(sigma) for sigma in sigmas[1:-1]] + [(1.0, sigmas[-1])]
    steps = tuple(
        Step(timestep, *levels(sigma), *level)
        for timestep, sigma, level in zip(timesteps, sigmas[:-1], after, strict=True)
    )
    scale = 1.0 if unit_noise or not steps else steps[0].sigma
    return NoiseSchedule(steps, prediction_type, eta=eta, initial_scale=scale)


def consistency_schedule(
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction_type: PredictionType,
    timestep_scaling: float,
) -> NoiseSchedule:
    """Build the schedule of multistep sampling from a latent consistency model.

    The clean sample is c_out x0 + c_skip latents with c_skip = d^2 / (u^2 + d^2), c_out = u /
    sqrt(u^2 + d^2), u = timestep_scaling t and d = 0.5. All steps but the last draw fresh noise.

    Args:
        alphas_cumprod: Cumulative product of 1 - beta, shape (N,).
        timesteps: T distinct training timesteps, decreasing.
        prediction_type: What the network predicts.
        timestep_scaling: As above; 10 in published models.

    Returns:
        The schedule with T steps, and eta 1. Not differentiable.

    Source: Luo et al. 2023, arXiv:2310.04378, eq. 9 and algorithm 3; diffusers' LCMScheduler.
    """
    cumprod = cast(list[float], alphas_cumprod.double().tolist())  # pyright: ignore[reportUnknownMemberType]
    levels = [(math.sqrt(cumprod[t]), math.sqrt(1.0 - cumprod[t])) for t in timesteps]
    steps: list[Step] = []
    for timestep, level, after in zip(timesteps, levels, [*levels[1:], (1.0, 0.0)], strict=True):
        scaled = timestep_scaling * timestep
        total = scaled**2 + _SIGMA_DATA**2
        steps.append(
            Step(
                timestep,
                *level,
                *after,
                c_skip=_SIGMA_DATA**2 / total,
                c_out=scaled / math.sqrt(total),
                renoises=True,
            )
        )
    return NoiseSchedule(tuple(steps), prediction_type, eta=1.0)


def flow_schedule(sigmas: Sequence[float], timesteps: Sequence[float]) -> NoiseSchedule:
    """Build the schedule of a rectified flow: alpha = 1 - sigma, and the network predicts flow.

    Args:
        sigmas: T + 1 noise levels in [0, 1], decreasing: before every step, and after the last.
        timesteps: T inputs of the network.

    Returns:
        The schedule with T steps. Not differentiable.

    Raises:
        ValueError: If the levels do not decrease or leave [0, 1].

    Source: Liu et al. 2023, arXiv:2209.03003, with time running from data to noise.
    """
    # A shift in float32 can leave a first level a little above 1, such as 1 + 1.2e-7 for 1.32.
    if 1.0 < sigmas[0] < 1.0 + _ROUNDING:
        sigmas = [1.0, *sigmas[1:]]
    pairs = list(itertools.pairwise(sigmas))
    if any(not 1.0 >= sigma > after >= 0.0 for sigma, after in pairs):
        raise ValueError(f"the noise levels do not decrease from 1 to 0: {_some(sigmas)}")
    steps = tuple(
        Step(timestep, 1.0 - sigma, sigma, 1.0 - after, after)
        for timestep, (sigma, after) in zip(timesteps, pairs, strict=True)
    )
    return NoiseSchedule(steps, "flow")


def _some(levels: Sequence[float]) -> str:
    shown = [f"{level:.4g}" for level in levels[:5]]
    return ", ".join([*shown, "..."] if len(levels) > 5 else shown)
