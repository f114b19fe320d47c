"""The `gradient` section: which network calls of the chain carry gradient."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignprop_cli.config.section import PositiveInt, Section, Share


class GradientConfig(Section):
    """Which network calls of the chain carry gradient, and how."""

    method: Literal[
        "full", "last_k", "random_k", "gaussian_k", "draft_lv", "refl", "drtune", "leap", "sparse"
    ] = Field(default="random_k", description="The estimator, see docs/estimators.md.")
    endpoint: Literal["chain", "predicted"] | None = Field(
        default=None,
        description="What the reward sees: the end of the chain, or the clean sample that the last "
        "call of the path predicts. Null is the estimator's own: predicted for refl and drtune.",
    )
    detach_uncond: bool = Field(
        default=False,
        description="Keep the gradient out of the unconditional branch of guidance, which then "
        "stores nothing: half the activations, and another gradient.",
    )
    # Each estimator reads its own options and ignores the others, so that --set gradient.method is
    # enough to try another one.
    k: PositiveInt = Field(
        default=1, description="last_k: number of calls, counted from the image."
    )
    path_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None,
        description="The share of the path from noise to image that the last calls cover, instead "
        "of last_k's k, random_k's k_max and the beginning of `span`.",
    )
    k_min: PositiveInt = Field(default=1, description="random_k: smallest number of calls.")
    k_max: PositiveInt | None = Field(default=None, description="random_k: largest; null is all T.")
    mean: float = Field(
        default=0.84, gt=0.0, lt=1.0, description="gaussian_k: mean first call, fraction of T."
    )
    std: float = Field(
        default=0.1, ge=0.0, description="gaussian_k: deviation of the first call, fraction of T."
    )
    copies: PositiveInt = Field(
        default=2, description="draft_lv: how often the last call is repeated on noised latents."
    )
    own_end: bool = Field(
        default=True,
        description="draft_lv: whether the chain's own last call counts beside the copies.",
    )
    calls: PositiveInt = Field(
        default=3, description="drtune, sparse: number of calls that carry gradient."
    )
    span: tuple[Share, Share] | None = Field(
        default=None,
        description="refl, leap, sparse: the part of the chain that the calls are drawn from, two "
        "fractions of T; drtune: where it stops. Null is as published: [0.75, 1] for refl, "
        "[0.6, 1] for drtune, [0, 1] for the others.",
    )
    alpha: Share = Field(
        default=0.3, description="leap: share of the gradient that passes through the second call."
    )
    tau: float | None = Field(
        default=0.1,
        gt=0.0,
        description="leap: least distance that counts where images are weighted by how far the "
        "jumps land from the chain; null weights all images alike.",
    )
    # 1,000 to the power of 103 is more than a float holds.
    late_bias: float = Field(
        default=2.0,
        ge=0.0,
        le=64.0,
        description="sparse: call i is drawn with weight (i + 1)^late_bias.",
    )
    rescale: Share = Field(
        default=0.0,
        description="sparse: how much of the path that is not covered the gradient is scaled up "
        "for; 1 is all of it.",
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
