"""An estimator from outside the package: every other call, each with a detached input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignprop_cli.estimators import Estimator


@dataclass(frozen=True)
class EveryOther:
    """The calls T-1, T-3, ..., or one earlier each, as a coin falls."""

    uniforms: int = 1

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> tuple[int, ...]:
        return tuple(range(int(2 * uniforms[0]), num_inference_steps, 2))

    def sizes(self, num_inference_steps: int) -> Mapping[int, float]:
        odd, even = num_inference_steps // 2, -(-num_inference_steps // 2)
        return {even: 1.0} if odd == even else {odd: 0.5, even: 0.5}

    def problems(self, num_inference_steps: int) -> list[str]:
        return [] if num_inference_steps > 1 else ["every_other needs at least 2 steps"]


def every_other() -> Estimator:
    return Estimator(EveryOther(), input_grad=0.0)
