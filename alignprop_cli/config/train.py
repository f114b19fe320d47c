"""The `train` section: the optimisation, and how a step is divided."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignprop_cli.config.section import PositiveFloat, PositiveInt, Section, Text


class TrainConfig(Section):
    """The optimisation."""

    prompts: str = Field(
        default="animals", description="Built-in prompt set or a .txt, .jsonl or .csv file."
    )
    steps: PositiveInt = Field(default=20, description="Optimiser steps.")
    batch_size: PositiveInt = Field(
        default=128, description="Images per optimiser step, over all processes and accumulation."
    )
    # How the work of a step is divided. The result is the same up to rounding, so these options may
    # change when a run is resumed.
    rollout_batch: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Images rolled out together, without gradient, in one process; auto is the "
        "largest that fits the memory.",
    )
    micro_batch: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Images of one micro-batch, which goes through the calls with gradient and "
        "back, in one process; auto is the fastest that fits.",
    )
    decode_batch: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Images of a micro-batch that are decoded, scored and differentiated together; "
        "auto is the largest that fits the memory.",
    )
    memory_limit: Text | None = Field(
        default=None,
        description="The most memory that a process uses, such as 12GB; null is what is free.",
    )
    # AdamW and its schedule, which does not depend on `steps`, so that a run can be made longer.
    learning_rate: PositiveFloat = Field(default=1.0e-3, description="AdamW's learning rate.")
    lr_decay_steps: PositiveInt | None = Field(
        default=None,
        description="N: after the warmup the learning rate falls linearly over N steps to 1 / N of "
        "itself and stays there; null keeps it constant.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Optimiser steps over which the learning rate rises linearly."
    )
    adam_beta1: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="AdamW's first moment decay."
    )
    adam_beta2: float = Field(
        default=0.999, ge=0.0, lt=1.0, description="AdamW's second moment decay."
    )
    adam_epsilon: PositiveFloat = Field(default=1.0e-8, description="AdamW's denominator offset.")
    weight_decay: float = Field(default=1.0e-4, ge=0.0, description="AdamW's, on the LoRA weights.")
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="The gradient is scaled down to this L2 norm; null leaves it."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What happens where images, rewards or a gradient are NaN or infinite: the run "
        "stops, or the step updates nothing.",
    )
    nonfinite_limit: PositiveInt = Field(
        default=5, description="With skip, steps in a row that are skipped before the run stops."
    )
    deterministic: bool = Field(
        default=False,
        description="On a GPU, use kernels that repeat bit for bit and are slower. On the CPU runs "
        "always repeat, with the same number of threads.",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Compile the blocks that the network repeats; auto tries it on a GPU, in a run "
        "of more than 20 minutes, and keeps it where it is faster.",
    )
    cuda_graph: bool | Literal["auto"] = Field(
        default="auto",
        description="On a GPU, replay the roll-out's calls from a recording (a CUDA graph); auto "
        "does it where launching kernels takes most of their time and the memory holds it.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Seed of everything random in training."
    )
