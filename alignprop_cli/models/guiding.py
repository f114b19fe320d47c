"""From the `sample` section to the guidance of a family's network."""

from __future__ import annotations

from alignprop_cli.config.schema import SampleConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Guidance
from alignprop_cli.models.base import Family


def takes_scale(network: object) -> bool:
    """Return whether a network takes the guidance scale as an input."""
    return bool(getattr(network, "embeds_guidance", False))


def guidance_of(config: SampleConfig, family: Family, network: object) -> Guidance:
    """Return how a network is guided.

    Args:
        config: The `sample` section.
        family: Says what its guidance scale means.
        network: As `families.sampler`.

    Raises:
        ConfigError: If something is asked for that would not be obeyed.
    """
    embedded = takes_scale(network)
    # 1. Two branches where guidance was not distilled into the network, or on top of that.
    if family.true_guidance:
        scale = config.true_guidance_scale
    elif config.true_guidance_scale != 1.0:
        raise ConfigError(
            f"sample.true_guidance_scale: {config.true_guidance_scale:g} is not for {family.name}, "
            "whose guidance is sample.guidance_scale"
        )
    else:
        scale = config.guidance_scale if family.guides and not embedded else 0.0
    made = Guidance(
        scale=scale,
        interval=config.guidance_interval,
        origin=family.guidance_origin,
        rescale=family.guidance_rescale,
        embedded=config.guidance_scale if embedded else None,
    )
    # 2. What needs two branches.
    if (embedded or family.true_guidance) and not made.enabled:
        for key, given in (
            ("guidance_interval", config.guidance_interval != (0.0, 1.0)),
            ("negative_prompt", bool(config.negative_prompt)),
        ):
            if given:
                raise ConfigError(
                    f"sample.{key}: {getattr(config, key)} cannot be obeyed: guidance was "
                    "distilled into this model, which has no unconditional branch",
                    hint="sample.true_guidance_scale above 1 adds one"
                    if family.true_guidance
                    else None,
                )
    return made
