"""The `gradient` section: which network calls of the chain carry gradient."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignprop_cli.config.section import PositiveInt, Section


class GradientConfig(Section):
    """Which network calls of the chain carry gradient."""

    method: Literal["full", "last_k", "random_k", "gaussian_k"] = Field(
        default="random_k", description="The estimator, see docs/estimators.md."
    )
    # Each estimator reads its own options and ignores the others, so that --set gradient.method is
    # enough to try another one.
    k: PositiveInt = Field(
        default=1, description="last_k: number of calls, counted from the image."
    )
    path_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None,
        description="last_k: instead of k, the share of the path from noise to image to cover.",
    )
    k_min: PositiveInt = Field(default=1, description="random_k: smallest number of calls.")
    k_max: PositiveInt | None = Field(default=None, description="random_k: largest; null is all T.")
    mean: float = Field(
        default=0.84, gt=0.0, lt=1.0, description="gaussian_k: mean first call, fraction of T."
    )
    std: float = Field(
        default=0.1, ge=0.0, description="gaussian_k: deviation of the first call, fraction of T."
    )
    # In images, never in micro-batches: the gradient of a step must not depend on the memory or on
    # the number of processes.
    window_group: PositiveInt | None = Field(
        default=None,
        description="Images that share one draw of the calls with gradient; null depends on "
        "train.batch_size alone, see docs/estimators.md.",
    )
    rollout_steps: PositiveInt | None = Field(
        default=None,
        description="In training, the number of calls that replace those before the first one with "
        "gradient: cheaper, and changes the images that are trained on. Null replaces none.",
    )
    # Recomputation changes time and memory; on the CPU it does not change one bit of the gradient.
    checkpoint_network: Literal["auto", "none", "block", "call"] = Field(
        default="auto",
        description="Activation checkpointing of the network: recompute nothing, the blocks of "
        "each call, or the whole call; auto is the cheapest that fits the memory.",
    )
    checkpoint_decoder: bool | Literal["auto"] = Field(
        default="auto", description="Activation checkpointing of the decoder's blocks."
    )
    checkpoint_reward: bool | Literal["auto"] = Field(
        default="auto", description="Activation checkpointing of the rewards' blocks."
    )
