"""Where the gradient flows: the estimators of the reward's gradient, as values.

A chain has T network calls, i = 0 .. T-1, the last one nearest the image. An estimator is four
facts; the sampler (sampling.py) carries them out and knows no method by name:

1. which calls carry gradient (`calls`, a distribution over sets of calls, see calls.py);
2. what their input is (`input_grad`: attached, detached, or mixed with a factor alpha);
3. where the gradient's path ends (the chain's last latents, or the clean sample that a call
   predicts), whether the path leaps there from call to call (`leaps`), and which of the two ends
   the reward sees (`endpoint`);
4. how often and how strongly the result counts (`copies`, `own_end`, `weight`, `rescale`, `tau`).

Each group of images draws one path (never inside a chain), as a function of seed and step. The
draws of one step are stratified over its groups: the marginal distribution of each is unchanged,
and their mean varies less.

Most estimators are biased: the gradient through fewer calls is not a noisy version of the full
gradient but another, cheaper direction. K = 1 changes mostly fine detail, large K also the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch

from alignprop_cli.calls import (
    Calls,
    GaussianStart,
    LastCalls,
    LateCalls,
    OneCall,
    SpacedCalls,
    TwoCalls,
    stratified,
)

Endpoint = Literal["chain", "predicted"]
"""What the reward sees: the end of the chain, or a clean sample predicted on the way."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an estimator and each of its paths have in common.

    Args:
        input_grad: alpha, the share of the gradient that each call passes on through its input, in
            [0, 1]: 1 leaves the input attached, 0 detaches it.
        leaps: Whether a call's output reaches the path's next call, or the end, in one jump. The
            values stay those of the true chain; only the gradient goes through the jump.
        copies: n >= 0. The last call is made n times more, each on the clean latents noised back to
            the level before that call with fresh noise.
        own_end: Whether the chain's own end counts beside the copies; without copies it does.
        weight: Factor on the gradient that enters the end.
        rescale: r in [0, 1]. The gradient is multiplied by 1 + r (1 / s - 1), where s is the share
            of the path through the noise that the calls cover (`NoiseSchedule.path_share`).
        tau: None, or a floor > 0: the gradient of each image is divided by the sum over the jumps
            of max(d, tau), where d is the mean absolute distance from the landing of the jump to
            the true latents there. Gradient stops at d.
    """

    input_grad: float = 1.0
    leaps: bool = False
    copies: int = 0
    own_end: bool = True
    weight: float = 1.0
    rescale: float = 0.0
    tau: float | None = None

    @property
    def ends(self) -> int:
        """Return how many clean latents one image has: one, and one for each copy."""
        return self.copies + (self.own_end or not self.copies)

    def passes(self, calls: int) -> int:
        """Return how many network calls carry gradient, of a path with `calls` of the chain's."""
        # A path with copies has one call, which is made once for each end.
        return self.ends if self.copies else calls


@dataclass(frozen=True)
class GradPath(Facts):
    """Where the gradient flows in one chain: one draw of an estimator; see also `Facts`.

    Args:
        calls: Which network calls carry gradient, ascending. The gradient stops at all others; the
            arithmetic of the steps between them passes it on.
        stop: The call whose predicted clean sample is the end of the path; it need not be one of
            `calls`. None ends it at the chain's last latents.
        endpoint: What the reward sees where the path has a stop: "predicted" is that clean sample,
            and the chain goes no further; "chain" is the end of the chain, whose values get the
            gradient of the predicted sample (straight-through).
    """

    calls: tuple[int, ...]
    stop: int | None = None
    endpoint: Endpoint = "chain"

    def __contains__(self, i: int) -> bool:
        return i in self.calls

    def __len__(self) -> int:
        return self.passes(len(self.calls))

    def rollout_calls(self, num_inference_steps: int) -> int:
        """Return how many calls come before the first one with gradient, so need no graph."""
        # Copies alone start from the clean latents, so the whole chain comes before them.
        if not self.calls or (self.copies and not self.own_end):
            return num_inference_steps
        return self.calls[0]

    def chain_calls(self, num_inference_steps: int) -> int:
        """Return how many calls of the chain are made, copies not counted."""
        if self.stop is None or self.endpoint == "chain" or self.copies:
            return num_inference_steps
        return self.stop + 1

    def earlier(self, calls: int) -> GradPath:
        """Return the same path in a chain that has `calls` fewer calls before it."""
        stop = None if self.stop is None else self.stop - calls
        return replace(self, calls=tuple(i - calls for i in self.calls), stop=stop)


def window(start: int, stop: int) -> GradPath:
    """Return the plain path: calls start <= i < stop, inputs attached, to the last latents."""
    return GradPath(tuple(range(start, stop)))


@dataclass(frozen=True)
class Estimator(Facts):
    """How the gradient of the reward is estimated: the four facts of the module's docstring.

    Planner, probe and trainer ask this value; none of them looks at the name of a method.

    Args:
        calls: Which calls carry gradient, and where the path ends.
        endpoint: What the reward sees; None is where the path ends. Of a path to the chain's last
            latents, "predicted" makes the end the clean sample that its last call predicts.
    """

    calls: Calls = field(default_factory=LastCalls)
    endpoint: Endpoint | None = None

    def draw(
        self, num_inference_steps: int, generator: torch.Generator, groups: int = 1
    ) -> list[GradPath]:
        """Draw one path for each group of a step, stratified over the groups.

        Each path by itself has the estimator's distribution. With G groups, [0, 1) is cut into G
        equal parts and each group draws from a part of its own, so a step has small and large k.

        Args:
            num_inference_steps: T, the number of network calls of the chain.
            generator: Source of all randomness; estimators that draw nothing leave it untouched.
            groups: G, how many paths to draw.

        Raises:
            ValueError: If the estimator has `problems` with T steps.
        """
        for problem in self.problems(num_inference_steps):
            raise ValueError(problem)
        rows = stratified(self.calls.uniforms, groups, generator)
        return [self.path(*self.calls.draw(num_inference_steps, row)) for row in rows]

    def path(self, calls: tuple[int, ...], stop: int | None = None) -> GradPath:
        """Return the estimator's path through these calls, to this stop, without a draw."""
        endpoint: Endpoint = "chain" if stop is None else "predicted"
        endpoint = self.endpoint or endpoint
        if endpoint == "predicted" and stop is None:
            stop = calls[-1]
        shared = {fact.name: getattr(self, fact.name) for fact in fields(Facts)}
        return GradPath(calls, stop, endpoint, **shared)

    def paths(self, num_inference_steps: int) -> list[tuple[GradPath, float]]:
        """Return the paths that can be drawn, each with its probability."""
        draws = self.calls.draws(num_inference_steps)
        return [(self.path(*draw), probability) for draw, probability in draws.items()]

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        """Return the possible numbers of calls with gradient, each with its probability."""
        sizes: dict[int, float] = {}
        for draw, probability in self.calls.draws(num_inference_steps).items():
            size = self.passes(len(draw.calls))
            sizes[size] = sizes.get(size, 0.0) + probability
        return sizes

    def longest(self, num_inference_steps: int) -> int:
        """Return the largest number of calls that can carry gradient."""
        return max(self.sizes(num_inference_steps))

    def mean(self, num_inference_steps: int) -> float:
        """Return the mean number of calls that carry gradient."""
        return self.mean_beyond(num_inference_steps, 0)

    def mean_beyond(self, num_inference_steps: int, calls: int) -> float:
        """Return E max(k - calls, 0), k the number of calls with gradient."""
        sizes = self.sizes(num_inference_steps)
        return sum(p * max(k - calls, 0) for k, p in sizes.items())

    def problems(self, num_inference_steps: int) -> list[str]:
        """Return why it is impossible in a chain of T steps, in words; empty if it is possible."""
        return self.calls.problems(num_inference_steps)


def full() -> Estimator:
    """Every call carries gradient: the exact gradient of the reward.

    Source: Prabhudesai et al. 2023, arXiv:2310.03739, section 4 (AlignProp);
        Clark et al. 2023, arXiv:2309.17400, section 4 (DRaFT).
    """
    return Estimator(calls=LastCalls())


def last_k(k: int) -> Estimator:
    """The last k calls carry gradient, 1 <= k <= T; k = T is `full`.

    Source: Clark et al. 2023, arXiv:2309.17400 (DRaFT-K); AlignProp's "K = 1" variant.
    """
    return Estimator(calls=LastCalls(k, k))


def random_k(k_min: int = 1, k_max: int | None = None) -> Estimator:
    """The last k calls carry gradient, k uniform on {k_min, ..., k_max}; None means T.

    Source: Prabhudesai et al. 2023, arXiv:2310.03739 (randomised truncation; their U(0, 50)
        includes the empty window, which has no gradient and is left out here).
    """
    return Estimator(calls=LastCalls(k_min, k_max))


def gaussian_k(mean: float = 0.84, std: float = 0.1) -> Estimator:
    """All calls from a normally distributed first one on; both arguments are fractions of T.

    Source: the current main branch of the AlignProp reference repository. Its mean 42 and deviation
        5 are divided by its 50 steps, so that they hold for any T. It repeats the draw until
        1 <= s < T; this is the same truncated distribution.
    """
    return Estimator(calls=GaussianStart(mean, std))


def draft_lv(copies: int = 2, *, own_end: bool = True) -> Estimator:
    """The last call, and `copies` times more on the clean latents noised back to its level.

    The mean over the ends of the gradient of R(x_T). Copy j starts at alpha sg(x_T) + sigma
    noise_j, the level before the last call. With `own_end` the chain's own last call counts too;
    without, only the copies do.

    Source: Clark et al. 2023, arXiv:2309.17400 (DRaFT-LV, n = 2), who add the gradients of the
        copies to that of the last call; FlowBP (2606.11075) takes the mean, as here.
    """
    return Estimator(calls=LastCalls(1, 1), copies=copies, own_end=own_end)


def refl(span: tuple[float, float] = (0.75, 1.0)) -> Estimator:
    """One call m, uniform on a part of the chain; the reward sees the clean sample it predicts.

    Args:
        span: Fractions of T. ImageReward's m in {30, ..., 39} at T = 40 is 0.75 to 1.

    Source: Xu et al. 2023, arXiv:2304.05977, algorithm 1 (ReFL).
    """
    return Estimator(calls=OneCall(span))


def drtune(calls: int = 3, span: tuple[float, float] = (0.6, 1.0)) -> Estimator:
    """Equally spaced calls with detached inputs, and the clean sample predicted by a random call.

    Every network input is detached, so the gradient reaches each call through the arithmetic of the
    steps alone, never through the network.

    Args:
        calls: K, spaced evenly over the calls up to the stop, from a random offset.
        span: Where the stop lies, in fractions of T; 0.6 to 1 are the last 10 of 25 calls.

    Source: Wu et al. 2024, arXiv:2405.00760 (DRTune); K and span as in FlowBP's code (2606.11075).
    """
    return Estimator(calls=SpacedCalls(calls, span), input_grad=0.0)


def leap(
    alpha: float = 0.3, tau: float | None = 0.1, span: tuple[float, float] = (0.0, 1.0)
) -> Estimator:
    """Two random calls, joined by one-step jumps whose landings are moved onto the true chain.

    Args:
        alpha: Share of the gradient that the second call passes on through its input.
        tau: The gradient of an image is divided by max(d_j, tau) + max(d_0, tau), where d is how
            far the two jumps land from the true latents; None: it is not.
        span: Where both calls lie, in fractions of T.

    Source: LeapAlign, arXiv:2604.15311, whose alpha is 0.3 for HPSv2.1 and 0.1 for PickScore.
    """
    return Estimator(calls=TwoCalls(span), input_grad=alpha, leaps=True, tau=tau)


def sparse(
    calls: int = 3,
    late_bias: float = 2.0,
    rescale: float = 0.0,
    span: tuple[float, float] = (0.0, 1.0),
) -> Estimator:
    """Random calls with detached inputs, drawn more often near the image; to the chain's end.

    Args:
        calls: K, drawn without replacement.
        late_bias: Call i is drawn with weight (i + 1)^late_bias.
        rescale: As `Facts.rescale`.
        span: Where the calls lie, in fractions of T.

    Source: FlowBP-Sparse, arXiv:2606.11075; defaults as in its code. It repeats its calls at stored
        latents; here they are the calls of the chain itself, with the same values and gradient.
    """
    late = LateCalls(calls, late_bias, span)
    return Estimator(calls=late, input_grad=0.0, rescale=rescale)


DRAWS_PER_STEP = 4
"""How many paths a step draws at most.

On the embedded model, one draw per step adds 1.3 % to the variance of the step's gradient, four
stratified draws 0.05 % (tests/benchmarks/results/window_group_epyc-2-cores_202611.md).
"""

# Images of one group go through the network together; fewer than 8 leave a GPU waiting.
_LEAST_GROUP = 8


def window_group(batch_size: int) -> int:
    """Return how many consecutive images share one path by default.

    The batch divided by `DRAWS_PER_STEP`, or by the largest smaller number that leaves whole groups
    of at least 8 images.
    """
    # A function of the batch alone, never of memory or processes: a step has to compute the same
    # gradient on any machine.
    draws = (d for d in range(1, DRAWS_PER_STEP + 1) if batch_size % d == 0)
    return batch_size // max((d for d in draws if batch_size // d >= _LEAST_GROUP), default=1)
