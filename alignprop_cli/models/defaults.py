"""With how many steps and which guidance published models are meant to be sampled."""

from __future__ import annotations

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.models.families import find
from alignprop_cli.models.published import PUBLISHED

# (num_inference_steps, guidance_scale) by the name in `published.PUBLISHED`, or by model.id. From
# the models' own pages, or the defaults and examples of their pipelines in diffusers 0.42. Where a
# row says nothing else it is the pipeline's default or its page's example.
_PUBLISHED = {
    "sd-1.5": (50, 7.5),
    "sd-2.1": (50, 7.5),
    "sd-2.1-base": (50, 7.5),
    "sd-turbo": (1, 0.0),
    "lcm-dreamshaper-v7": (4, 8.0),
    "sdxl": (50, 5.0),
    "sdxl-turbo": (1, 0.0),
    "sd-3-medium": (28, 7.0),
    "sd-3.5-medium": (40, 4.5),
    "sd-3.5-large": (28, 3.5),
    # Its authors' own code takes 50 steps (github.com/black-forest-labs/flux, src/flux/cli.py).
    "flux.1-dev": (28, 3.5),
    # Its authors' demo (huggingface.co/spaces/black-forest-labs/FLUX.1-Krea-dev, app.py).
    "flux.1-krea-dev": (28, 4.5),
    "flux.1-schnell": (4, 0.0),
    # 4 and 50 steps: github.com/black-forest-labs/flux2, README.
    "flux.2-klein-4b": (4, 1.0),
    "flux.2-klein-9b": (4, 1.0),
    "flux.2-klein-base-4b": (50, 4.0),
    "flux.2-klein-base-9b": (50, 4.0),
    "z-image-turbo": (8, 0.0),
    # The example of its page, as others repeat it; the pipeline's default is 5.
    "z-image": (50, 4.0),
    "qwen-image": (50, 4.0),
    "krea-2-raw": (28, 4.5),
    "krea-2-turbo": (8, 0.0),
}
# Of models that their own model_index.json calls distilled, by the class of their pipeline.
_DISTILLED = {"Flux2KleinPipeline": (4, 1.0), "Krea2Pipeline": (8, 0.0)}


def own_sampling(config: ModelConfig) -> tuple[int, float] | None:
    """Return a model's own number of steps and guidance scale; None where nothing says them.

    A scheduler's configuration does not: few-step models mostly have that of their base.

    Args:
        config: The `model` section.

    Raises:
        AssetError, ConfigError: As `families.find`.
    """
    known = _PUBLISHED.get(PUBLISHED.get(config.id, config.id))
    if known is not None:
        return known
    family, _ = find(config)
    return None if family.guides else _DISTILLED.get(family.pipeline_class)
