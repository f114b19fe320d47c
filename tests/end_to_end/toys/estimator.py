"""An estimator from outside the package: every other call, each with a detached input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignprop_cli.calls import Draw
from alignprop_cli.estimators import Estimator


@dataclass(frozen=True)
class EveryOther:
    """The calls T-1, T-3, ..., or one earlier each, as a coin falls."""

    uniforms: int = 1

    def draw(self, num_inference_steps: int, uniforms: Sequence[float]) -> Draw:
        return Draw(tuple(range(int(2 * uniforms[0]), num_inference_steps, 2)))

    def draws(self, num_inference_steps: int) -> Mapping[Draw, float]:
        return {self.draw(num_inference_steps, [coin]): 0.5 for coin in (0.0, 0.5)}

    def problems(self, num_inference_steps: int) -> list[str]:
        return [] if num_inference_steps > 1 else ["every_other needs at least 2 steps"]


def every_other() -> Estimator:
    return Estimator(EveryOther(), input_grad=0.0)
