"""The `guard` section, which stops a run that has gone too far, and held-out rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from alignprop_cli.config.section import PositiveFloat, PositiveInt, Section, Text

HELD_OUT = "held_out"
"""In `guard.watch` and `guard.best`: every reward of `eval.rewards`, and the prompts' checker."""

RIGHT = "all right"
"""The share of images that the checker of their prompts finds right."""

SPREAD = ("diversity", "pixel_diversity", "vendi")
"""Measures of how different the images of one prompt are; a fall is harm."""

PIXEL_MEASURES = ("saturation", "clipped", "jpeg_kilobytes")
"""Measures of the pixels alone: of the first two a rise is harm, of the last any change."""


class HeldOutConfig(Section):
    """A reward that is measured and not trained on; the reward's own options are further keys."""

    # They are checked by rewards/registry.py, as those of `reward`.
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Precision of the reward's network."
    )

    @property
    def options(self) -> dict[str, Any]:
        """Return the reward's own options."""
        return dict(self.model_extra or {})


class GuardConfig(Section):
    """When a run is stopped because what is not trained on gets worse; see docs/guard.md."""

    enabled: bool = Field(
        default=True,
        description="Whether the run is stopped. All is measured and drawn in any case, every "
        "eval.every steps.",
    )
    watch: tuple[Text, ...] = Field(
        default=(HELD_OUT, "diversity"),
        description="What must not get worse: held_out (every reward of eval.rewards, and the "
        "prompts' checker), all right (the checker alone), diversity, pixel_diversity, vendi, "
        "saturation, clipped, jpeg_kilobytes, or a reward.",
    )
    tolerance: PositiveFloat = Field(
        default=0.5,
        description="How much worse is too much, in standard deviations of the base model's "
        "images.",
    )
    diversity_tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.25,
        description="The same for both diversities and vendi: the share of the base model's that "
        "may be lost.",
    )
    standard_errors: PositiveFloat = Field(
        default=3.0,
        description="And the change must be this clear: in standard errors of the paired "
        "difference for many prompts, in more of them for few (Student's t).",
    )
    patience: PositiveInt = Field(
        default=2, description="Measurements in a row that must say so before the run is stopped."
    )
    best: Text = Field(
        default=HELD_OUT,
        description="By what the checkpoint kept as `best` is chosen: held_out (without any: the "
        "rewards that are trained on) or the name of a reward or measure, higher is better.",
    )
