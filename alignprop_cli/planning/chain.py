"""How many network calls one image goes through, of which kind: what estimates are made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from alignprop_cli.estimators import Estimator


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The sampling chain of a step and where the gradient flows in it.

    Args:
        num_inference_steps: T, network calls of one chain.
        estimator: Which of them carry gradient.
        rollout_steps: Number of calls that replace those before the first with gradient; None keeps
            them all.
        compares: Whether the base model makes every call with gradient too, as for the KL.
    """

    num_inference_steps: int
    estimator: Estimator
    rollout_steps: int | None = None
    compares: bool = False

    @property
    def ends(self) -> int:
        """Return how many clean latents one image has: one, and one per copy."""
        return self.estimator.ends

    @cached_property
    def longest(self) -> int:
        """Return the most calls with gradient that one image can have, copies included."""
        return self.estimator.longest(self.num_inference_steps)

    @property
    def storable(self) -> int:
        """Return how many calls can be stored where at least one is recomputed."""
        # Copies are one call that is made several times: all are recomputed, or none.
        return 0 if self.estimator.copies else self.longest - 1

    @cached_property
    def mean(self) -> float:
        """Return the mean number of calls with gradient of one image, copies included."""
        return self.estimator.mean(self.num_inference_steps)

    @cached_property
    def rolled_out(self) -> float:
        """Return the mean number of calls before the path, with those that are replaced."""
        # Only calls before the first with gradient are replaced: copies start from the true end.
        total, steps, most = 0.0, self.num_inference_steps, self.rollout_steps
        for path, probability in self.estimator.paths(steps):
            saved = 0 if most is None else max(path.calls[0] - most, 0)
            total += probability * (path.rollout_calls(steps) - saved)
        return total

    @cached_property
    def between(self) -> float:
        """Return the mean number of calls without gradient from the first one with gradient on."""
        total, steps = 0.0, self.num_inference_steps
        for path, probability in self.estimator.paths(steps):
            later = path.chain_calls(steps) - path.rollout_calls(steps)
            own = len(path.calls) if path.ends > path.copies else 0
            total += probability * (later - own)
        return total

    @property
    def calls(self) -> float:
        """Return the mean number of network calls of one image, without recomputation."""
        return self.rolled_out + self.between + self.mean

    @property
    def base_calls(self) -> float:
        """Return the mean number of calls of the base model, for the same images."""
        return self.mean if self.compares else 0.0

    def stored(self, most: int) -> float:
        """Return the mean number of calls on a path of which the last `most` are counted."""
        return self.mean - self.estimator.mean_beyond(self.num_inference_steps, most)

    @property
    def is_attached(self) -> bool:
        """Return whether gradient flows into a call through its input."""
        # A copy starts from clean latents that were rolled out without gradient.
        return self.estimator.input_grad > 0.0 and not self.estimator.copies
