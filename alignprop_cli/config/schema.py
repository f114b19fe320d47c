"""The schema of a run: every option, its default, its range and what it means.

A default is written here and nowhere else. Unknown keys are refused. validation.py reports all
problems together, each with its source. No torch: configurations are read before anything heavy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, field_validator

from alignprop_cli.config.gradient import GradientConfig
from alignprop_cli.config.guard import GuardConfig, HeldOutConfig
from alignprop_cli.config.section import (
    Dtype,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
)
from alignprop_cli.config.tracking import TrackingConfig
from alignprop_cli.config.train import TrainConfig
from alignprop_cli.parsing import write_yaml

EMBEDDED_MODELS = ("tiny", "tiny-flow", "tiny-fewstep")
"""Ids of the models inside the package, which all draw the prompts of one language."""
EMBEDDED_ALIGNERS = ("tiny", "tiny-resnet")
"""Names of the image-text models inside the package, which know that language."""

PYTHON = "python:"
"""How the name of a reward begins that is a Python object, given by a caller; no file names it."""


class ModelConfig(Section):
    """The base model that the LoRA is trained on."""

    id: Text = Field(
        default="tiny",
        description="`tiny`, `tiny-flow` or `tiny-fewstep` (the embedded models), a folder in "
        "diffusers format, a single .safetensors or .ckpt file, or a hub id such as "
        "stable-diffusion-v1-5/stable-diffusion-v1-5.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    variant: str | None = Field(
        default=None, description="Weight variant of a hub id or a folder, such as fp16."
    )
    config: str | None = Field(
        default=None,
        description="Folder in diffusers format with the configs and the tokenizer that belong to "
        "a single-file checkpoint; null reads them from the hub.",
    )
    vae_tile_size: PositiveInt | None = Field(
        default=None,
        description="Decode in overlapping tiles of this many pixels: less memory, and images "
        "change a little. Null decodes them whole.",
    )
    t5: Literal["model", "none"] = Field(
        default="model",
        description="none leaves out the largest text encoder of Stable Diffusion 3 (9.5 GB).",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Precision of the frozen weights; auto is bfloat16 on a GPU that has it, "
        "float16 on an older one, float32 on the CPU. LoRA weights are always float32.",
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="Hold the linear layers of network and text encoders in 8 bits, or in 4 "
        "(pip install 'alignprop[quantize]'): images change a little. Never the VAE or the LoRA.",
    )
    decoder: Text = Field(
        default="full",
        description="What decodes the images that are rewarded in training: full, the model's own; "
        "taesd, an approximation in a fraction of the memory; or the folder or hub id of another "
        "AutoencoderTiny. Samples and evaluation are decoded in full.",
    )


class LoraConfig(Section):
    """The trained low-rank weights: W + (alpha / rank) B A, or a variant of it."""

    rank: PositiveInt = Field(
        default=4, description="Rank of B A; higher can change more, costs memory."
    )
    alpha: PositiveFloat | None = Field(
        default=None, description="Numerator of the scaling; null is rank."
    )
    # Null, since layers have different names in every family (models/rows.py).
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] | Text | None = Field(
        default=None,
        description="Layers of the network that get a LoRA: a list of endings of their names, "
        "one regular expression for whole names, or all-linear; null is the default of the model's "
        "family.",
    )
    rslora: bool = Field(
        default=False, description="rsLoRA: alpha / sqrt(rank) instead of alpha / rank."
    )
    dora: bool = Field(
        default=False,
        description="DoRA: the rows' lengths of a weight are trained beside its direction. Slower, "
        "and cannot be mixed or sampled at other strengths.",
    )
    init: str | None = Field(
        default=None, description="LoRA folder or file to start from instead of a fresh one."
    )

    @field_validator("target_modules")
    @classmethod
    def _is_a_regular_expression(cls, value: tuple[str, ...] | str | None) -> Any:
        # Checked here, since peft would complain only after the model is loaded.
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from error
        return value


class SampleConfig(Section):
    """How images are sampled, in training and in evaluation alike."""

    num_inference_steps: PositiveInt = Field(
        default=50, description="T, network calls of one chain."
    )
    guidance_scale: float = Field(
        default=7.5,
        ge=0.0,
        description="Classifier-free guidance, as the model's pipeline counts it; at most 1 (for "
        "Z-Image and Krea 2: 0) means none and halves the cost.",
    )
    true_guidance_scale: float = Field(
        default=1.0,
        ge=0.0,
        description="FLUX.1 alone: guidance by a second branch with the negative prompt, as "
        "diffusers' true_cfg_scale, on top of guidance_scale; at most 1 means none.",
    )
    guidance_interval: tuple[Share, Share] = Field(
        default=(0.0, 1.0),
        description="Guide only where sigma, the share of noise in the latents, is in this range: "
        "0 is the image, 1 pure noise (for diffusion sqrt(1 - alphas_cumprod)). Other calls cost "
        "half. Changes the images.",
    )
    # What a family does not have is refused by name (models/families.py).
    scheduler: Literal["model", "ddim", "euler", "euler_ancestral", "lcm"] = Field(
        default="model",
        description="How steps are taken: as the model's scheduler does (DDIM for those of higher "
        "order), or as this one of diffusers does with the model's noise.",
    )
    spacing: Literal["model", "leading", "trailing", "linspace", "linear"] = Field(
        default="model",
        description="How timesteps are spread; model is the model's own way. linear is for "
        "rectified flows: equal steps before the shift, so that the last is not tiny.",
    )
    # Null: 1 for euler_ancestral and lcm, else 0.
    eta: Share | None = Field(
        default=None,
        description="Fresh noise per step, 0 deterministic to 1 DDPM; null is the scheduler's own.",
    )
    # Null rather than a number: models were trained at different sizes.
    height: Pixels | None = Field(default=None, description="Pixels; null is the model's own.")
    width: Pixels | None = Field(default=None, description="Pixels; null is the model's own.")
    negative_prompt: str = Field(default="", description="Prompt of the unconditional branch.")


class LossConfig(Section):
    """How a reward becomes a loss."""

    kind: Literal["maximise", "target", "hinge"] = Field(
        default="maximise",
        description="maximise: -r; target: |r - target|; hinge: max(0, target - r).",
    )
    target: float | None = Field(
        default=None, description="For target and hinge, in the reward's units."
    )
    scale: PositiveFloat = Field(default=1.0, description="Factor on the loss.")


class RewardConfig(Section):
    """One member of the mixture: its weight, optionally its own loss, and the reward's options."""

    # A reward's own options are extra keys, which rewards/registry.py checks, not this schema.
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    weight: float = Field(
        default=1.0, description="Factor on this member's loss; negative minimises it."
    )
    loss: LossConfig | None = Field(
        default=None, description="This member's loss; null is the `loss` section."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the reward's network; its rewards are float32 in any case.",
    )
    # Rewards have different units, such as kB. Without a common one the weights mean little.
    standardise: bool = Field(
        default=False,
        description="Subtract the base model's mean and divide by its deviation before the loss, "
        "so that the weights of a mixture compare.",
    )
    base_mean: float | None = Field(
        default=None,
        description="For standardise; null measures it on the base model's images of `eval`, and "
        "writes it to the run's config.",
    )
    base_std: PositiveFloat | None = Field(default=None, description="As base_mean.")

    @property
    def options(self) -> dict[str, Any]:
        """Return the reward's own options."""
        return dict(self.model_extra or {})


class EvalConfig(Section):
    """What is sampled and measured before, during and after training; it changes no training."""

    prompts: str = Field(default="animals-eval", description="Prompt set or file, held out.")
    images: PositiveInt = Field(
        default=32,
        description="Images before and after training; prompts repeat with new noise.",
    )
    images_per_prompt: PositiveInt = Field(
        default=1,
        description="Of these, images of each prompt; several show how diverse they are.",
    )
    rewards: dict[str, HeldOutConfig] = Field(
        default_factory=dict[str, HeldOutConfig],
        description="Rewards by name that are measured and never trained on.",
    )
    # The samples taken during training are fewer, and taken more often.
    every: Annotated[int, Field(ge=0)] = Field(
        default=5, description="Steps between the samples taken during training; 0 never."
    )
    sample_images: PositiveInt = Field(
        default=16, description="Images sampled each time, at most `images`."
    )
    sample_images_per_prompt: PositiveInt = Field(
        default=2, description="Of these, images of each prompt; one shows no diversity."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=8, description="Images sampled together; changes no image."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Seed of the evaluation's noise."
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _name_alone_means_defaults(cls, value: Any) -> Any:
        return _with_defaults(value)


class OutputConfig(Section):
    """Where a run is written."""

    dir: str | None = Field(default=None, description="Run folder; null is runs/<preset>-<number>.")
    save_every: Annotated[int, Field(ge=0)] = Field(
        default=10, description="Steps between checkpoints; 0 only the last one."
    )
    keep_last: PositiveInt | None = Field(
        default=None, description="Checkpoints kept; null keeps them all."
    )


class Config(Section):
    """Everything that decides a run."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    sample: SampleConfig = SampleConfig()
    gradient: GradientConfig = GradientConfig()
    reward: dict[str, RewardConfig] = Field(
        default_factory=dict[str, RewardConfig],
        description="Rewards by name; several are a weighted mixture.",
    )
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    output: OutputConfig = OutputConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("reward", mode="before")
    @classmethod
    def _name_alone_means_defaults(cls, value: Any) -> Any:
        return _with_defaults(value)


def _with_defaults(value: Any) -> Any:
    """Return rewards by name, with no options for those of which only the name is given."""
    # Anything but a mapping is refused by the type of the field.
    if not isinstance(value, dict):
        return value
    members = cast(dict[Any, Any], value)
    empty: dict[str, Any] = {}
    return {name: empty if member is None else member for name, member in members.items()}


def dump(config: Config) -> str:
    """Return the complete configuration as YAML that `validation.parse` reads back unchanged."""
    return write_yaml(config.model_dump(mode="json"))
