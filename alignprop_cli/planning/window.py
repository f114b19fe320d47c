"""How much of a rectified flow's path the calls with gradient cover, and a window asked for so.

The last steps of two models are not alike: with 28 steps the last one is 0.9 % of the path in
Stable Diffusion 3.5's own list and 10 % in one of equal steps.
"""

from __future__ import annotations

import torch

from alignprop_cli.calls import GaussianStart
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import impossible_calls
from alignprop_cli.errors import ConfigError
from alignprop_cli.estimators import Estimator
from alignprop_cli.models import families
from alignprop_cli.models.meta import meta_model
from alignprop_cli.schedule import NoiseSchedule

_WINDOWS = ("last_k", "random_k", "refl", "drtune", "leap", "sparse")

LEAST_SHARE = 0.05
"""Below this share of the path training changes next to nothing, and a warning says so."""


def schedule_of(config: Config) -> NoiseSchedule:
    """Return the chain's noise levels, from the model's configuration files alone.

    Raises:
        AssetError, ConfigError: As `meta_model`, or if the model cannot sample such images.
    """
    family, _ = families.find(config.model)
    network = meta_model(config.model, torch.float32).parts.network
    sampler = families.sampler(config.sample, family, network)
    shape = network.latent_shape(sampler.height, sampler.width)
    return sampler.schedule(network, shape)


def with_window(config: Config) -> Config:
    """Return the configuration with the window that `gradient.path_share` asks for.

    It is the smallest number of last calls that cover the share: `gradient.k`, `gradient.k_max` or
    the beginning of `gradient.span`, whichever the estimator has.

    Raises:
        AssetError, ConfigError: As `schedule_of`; also if the estimator needs more calls.
    """
    gradient, steps = config.gradient, config.sample.num_inference_steps
    share = gradient.path_share
    if share is None or gradient.method not in _WINDOWS:
        return config
    schedule = schedule_of(config)
    # Rounding may leave all steps together a little below 1.
    k = next(
        (k for k in range(1, steps) if schedule.path_share(range(steps - k, steps)) >= share), steps
    )
    update = {"last_k": {"k": k}, "random_k": {"k_max": k}}.get(
        gradient.method, {"span": ((steps - k) / steps, 1.0)}
    )
    found = gradient.model_copy(update=update)
    if problems := list(impossible_calls(found, steps)):
        raise ConfigError(
            f"gradient.path_share: {share:g} of the path are the last {k} of {steps} calls",
            problems,
            hint="give a larger gradient.path_share, or null and the window itself",
        )
    return config.model_copy(update={"gradient": found})


def covered(schedule: NoiseSchedule, estimator: Estimator) -> float:
    """Return the share of the path that the calls with gradient cover, the mean over the draws."""
    steps = len(schedule)
    return sum(p * schedule.path_share(path.calls) for path, p in estimator.paths(steps))


def describe(schedule: NoiseSchedule, estimator: Estimator) -> tuple[str | None, str | None]:
    """Return what the plan says about the window, and a warning where it covers next to nothing.

    Args:
        schedule: Of the whole chain.
        estimator: Where the gradient flows.

    Returns:
        (note, warning), None where there is nothing to say. Of diffusion models nothing is said:
        the share of their sigma is no measure of what a step moves.
    """
    if schedule.prediction_type != "flow":
        return None, None
    share = covered(schedule, estimator)
    what = f"the calls with gradient cover {share:.1%} of the path from noise to image"
    if share >= LEAST_SHARE:
        return what, None
    # These two have no window that a share of the path could set.
    fixed = bool(estimator.copies) or isinstance(estimator.calls, GaussianStart)
    advice = "take another gradient.method" if fixed else "set gradient.path_share"
    advice += ", or sample.spacing: linear"
    return what, f"{what}, so they can change next to nothing: {advice}"
