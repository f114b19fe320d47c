"""Noise schedules from the configurations of diffusers' schedulers.

A model is sampled as its own scheduler does where that is Euler's method, the ancestral one, or
multistep consistency sampling, and by DDIM otherwise. `sample.scheduler` and `sample.spacing`
choose others, with the model's own noise, as `from_config` of these classes does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from alignprop_cli.errors import ConfigError
from alignprop_cli.schedule import (
    NoiseSchedule,
    consistency_schedule,
    diffusion_schedule,
    euler_schedule,
)

MODEL = "model"
"""The value of `sample.scheduler` and `sample.spacing` that leaves the model's own."""

SCHEDULERS: Mapping[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
"""The classes that the values of `sample.scheduler` mean."""

_BY_CLASS = {kind.__name__: kind for kind in SCHEDULERS.values()}


def noise_schedule(
    config: Mapping[str, Any],
    steps: int,
    model_id: str,
    *,
    scheduler: str = MODEL,
    spacing: str = MODEL,
) -> NoiseSchedule:
    """Return the noise levels of a chain.

    Args:
        config: Configuration of the model's own scheduler, its class under `_class_name`.
        steps: T.
        model_id: The model's id as the user gave it, for messages.
        scheduler: A key of `SCHEDULERS`, or `model`.
        spacing: How timesteps are spread, as diffusers' `timestep_spacing`, or `model`.

    Raises:
        ConfigError: If there is no such chain.
    """
    kind = _BY_CLASS.get(str(config.get("_class_name")), DDIMScheduler)
    if scheduler != MODEL:
        kind = SCHEDULERS[scheduler]
    # 1. Latents are never clipped, which makes sense for pixels alone.
    changes: dict[str, Any] = {} if spacing == MODEL else {"timestep_spacing": spacing}
    if kind in (DDIMScheduler, LCMScheduler):
        changes["clip_sample"] = False
    own = {key: value for key, value in config.items() if key != "_class_name"}
    if scheduler == MODEL and kind.__name__ == config.get("_class_name"):
        # Stable Diffusion's pipeline sets steps_offset to 1 where the file does not say it, but
        # leaves it among the defaults, which `from_config` drops, as it does for other classes.
        defaults = own.get("_use_default_values", ())
        own["_use_default_values"] = [key for key in defaults if key != "steps_offset"]
    made = kind.from_config(own, **changes)
    total = made.config.num_train_timesteps
    if steps > total:
        raise ConfigError(
            f"sample.num_inference_steps: {steps} is more than the {total} timesteps {model_id} "
            "was trained with"
        )
    # 2. The timesteps. steps_offset moves all of them, so with many steps the first one may lie
    #    beyond the last one that the model was trained with.
    _set_timesteps(made, steps, model_id, spacing)
    # With `trailing` spacing rounding adds one at -1 for some numbers of steps, such as 61.
    timesteps: list[Any] = [t for t in made.timesteps.tolist() if t >= 0][:steps]
    if timesteps[0] >= total:
        raise ConfigError(
            f"sample.num_inference_steps: {steps} reaches timestep {timesteps[0]:g}, {model_id} "
            f"was trained with {total}, numbered from 0: take fewer"
        )
    # 3. (alpha, sigma) of each step.
    try:
        return _levels(made, timesteps)
    except ValueError as error:
        raise ConfigError(f"model.id: {model_id}: {error}") from error


def _set_timesteps(made: Any, steps: int, model_id: str, spacing: str) -> None:
    """Have a scheduler choose T timesteps; refuse what a consistency model cannot have."""
    if isinstance(made, LCMScheduler):
        if spacing != MODEL:
            raise ConfigError(
                f"sample.spacing: {spacing} cannot be obeyed: the timesteps of consistency "
                "sampling (LCM) are those of its distillation; leave it `model`"
            )
        if steps > made.config.original_inference_steps:
            raise ConfigError(
                f"sample.num_inference_steps: {steps} is more than the "
                f"{made.config.original_inference_steps} steps of the consistency distillation "
                f"(original_inference_steps of {model_id}): take fewer, such as 4 or 8"
            )
    made.set_timesteps(steps)


def _levels(made: Any, timesteps: list[Any]) -> NoiseSchedule:
    """Return the schedule of a scheduler whose timesteps are set."""
    prediction_type = made.config.prediction_type
    if isinstance(made, LCMScheduler):
        scaling = made.config.timestep_scaling
        return consistency_schedule(made.alphas_cumprod, timesteps, prediction_type, scaling)
    if isinstance(made, DDIMScheduler):
        final = float(made.final_alpha_cumprod)
        return diffusion_schedule(made.alphas_cumprod, timesteps, final, prediction_type)
    sigmas = made.sigmas.double().tolist()
    return euler_schedule(
        timesteps,
        [*sigmas[: len(timesteps)], sigmas[-1]],
        prediction_type,
        eta=float(isinstance(made, EulerAncestralDiscreteScheduler)),
        unit_noise=made.config.timestep_spacing == "leading",
    )
