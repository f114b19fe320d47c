"""The `train` section: the optimisation, and how a step is divided."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignprop_cli.config.section import PositiveFloat, PositiveInt, Section, Text

OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]
ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]
# FACTOR:STEP, for each step from which on the next factor holds, and the last factor.
_FACTOR = r"[0-9]{1,9}(\.[0-9]{1,12})?(e-?[0-9]{1,2})?"
_RULES = rf"^({_FACTOR}:[1-9][0-9]{{0,8}},)+{_FACTOR}$"


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
    optimizer: OptimizerName = Field(
        default="adamw",
        description="adamw; adamw8bit, whose moments take a quarter of the memory; or prodigy, "
        "which finds the learning rate (set learning_rate to 1). The last two: "
        "pip install 'alignprop[optimizers]'.",
    )
    # The schedule does not depend on `steps`, so that a run can be made longer.
    learning_rate: PositiveFloat = Field(
        default=1.0e-3, description="The largest learning rate; for prodigy a factor, usually 1."
    )
    lr_schedule: ScheduleName | None = Field(
        default=None,
        description="A schedule of diffusers, which falls over lr_decay_steps after the warmup; "
        "null: the warmup, then constant, or as lr_decay_steps says.",
    )
    lr_decay_steps: PositiveInt | None = Field(
        default=None,
        description="N: after the warmup the learning rate falls linearly over N steps to 1 / N of "
        "itself and stays there; null keeps it constant. With lr_schedule: how long that falls.",
    )
    lr_cycles: PositiveInt = Field(
        default=1, description="cosine_with_restarts: how often the learning rate falls."
    )
    lr_power: PositiveFloat = Field(default=1.0, description="polynomial: the exponent.")
    lr_rules: Annotated[str, Field(pattern=_RULES, max_length=1000)] | None = Field(
        default=None,
        description="piecewise_constant: 1:10,0.1:20,0.01 is learning_rate up to step 10, a tenth "
        "up to step 20, a hundredth from then on.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Optimiser steps over which the learning rate rises linearly."
    )
    adam_beta1: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="Decay of the optimiser's first moment."
    )
    adam_beta2: float = Field(
        default=0.999, ge=0.0, lt=1.0, description="Decay of its second moment."
    )
    adam_epsilon: PositiveFloat = Field(default=1.0e-8, description="Offset of its denominator.")
    weight_decay: float = Field(
        default=1.0e-4, ge=0.0, description="Decoupled, on the LoRA weights."
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        default=None,
        description="Keep an exponential moving average of the LoRA in every checkpoint (ema/), "
        "for evaluate --ema; 0.995 is published. Null keeps none.",
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="The gradient is scaled down to this L2 norm; null leaves it."
    )
    kl_weight: float = Field(
        default=0.0,
        ge=0.0,
        description="Weight of the KL to the base model in the loss: the squared difference of the "
        "predicted noise, the mean over elements and calls with gradient. 0 is off; 0.1 to 1 are "
        "published (DRaFT+) for rewards that are maximised.",
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
