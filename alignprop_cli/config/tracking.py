"""The `tracking` section: which experiment trackers are told of a run, and under which names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from alignprop_cli.config.section import Section, Text

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]
"""A tracker, by the name that accelerate has for it."""


class TrackingConfig(Section):
    """Who is told of a run besides its folder (docs/trackers.md); not stored with a run."""

    # Keys and tokens are read by the trackers from the environment, and have no place here.
    log_with: tuple[Tracker, ...] = Field(
        default=(),
        description="Trackers: tensorboard, wandb, trackio, mlflow, swanlab. Each needs its "
        "package: pip install 'alignprop[wandb]'.",
    )
    project: Text | None = Field(
        default=None,
        description="Project (of MLflow: experiment); null is the tracker's own environment "
        "variable, or else alignprop.",
    )
    run_name: Text | None = Field(
        default=None,
        description="Name of the run; null is the tracker's own environment variable, or else the "
        "name of the folder.",
    )
    tags: tuple[Text, ...] = Field(default=(), description="Tags of the run.")

    @field_validator("log_with")
    @classmethod
    def _each_once(cls, names: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        """Drop what is named again: a tracker is one process."""
        return tuple(dict.fromkeys(names))
