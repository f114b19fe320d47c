"""The trackers themselves, through accelerate's classes, with what those leave out.

accelerate begins a run, logs numbers and closes it. Captions, files and going on with a run are
each tracker's own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import tracking

from alignprop_cli.tracking.secrets import masked
from alignprop_cli.tracking.spool import Job

# MLflow refuses other characters in names, and all trackers make folders of slashes.
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")

Shown = Sequence[Mapping[str, str]]
"""Images: each with `file`, `prompt` and `text`."""


class Backend:
    """One tracker. Its methods may raise anything.

    Args:
        job: Who the run is.
        identity: Its id; see `spool.identity`.

    Attributes:
        url: Where the run can be seen; None where that is not known.
    """

    project_variable: str | None = None
    name_variable: str | None = None
    url: str | None = None

    def __init__(self, job: Job, identity: str) -> None:
        self.job, self.identity = job, identity
        environ = os.environ
        self.project = job.project or environ.get(self.project_variable or "") or "alignprop"
        self.name = job.run_name or environ.get(self.name_variable or "") or job.name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self.tracker.log({_NOT_IN_NAMES.sub("_", k): v for k, v in values.items()}, step=step)

    def images(self, step: int, label: str, shown: Shown) -> None:
        """Log images with captions."""

    def artifact(self, name: str, files: Sequence[str]) -> None:
        """Log files; nothing where the tracker has no place for them."""

    def end(self, status: str) -> None:
        """Close the run."""
        self.tracker.finish()

    # One of accelerate's, which have more methods than their base class.
    tracker: Any


class TensorBoard(Backend):
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, job: Job, identity: str) -> None:
        super().__init__(job, identity)
        # Steps that come again are shown once; all of them come where a run is begun again before
        # its first checkpoint, with the samples of the base model, which are step 0.
        first = job.resumed + 1 if job.resumed else 0
        self.tracker = tracking.TensorBoardTracker(
            "tensorboard", logging_dir=job.folder, purge_step=first
        )
        self.tracker.start()
        # Not as hyperparameters: each start would make a further folder of them.
        lines = [f"{key}: {value}" for key, value in _plain(job.config).items()]
        about = [f"name: {self.name}", f"tags: {', '.join(job.tags)}", *lines]
        self.tracker.tracker.add_text("config", "\n".join(f"    {line}" for line in about))

    def images(self, step: int, label: str, shown: Shown) -> None:
        """Log each image under its prompt, so that its steps are in one row."""
        from torchvision.io import read_image

        writer = self.tracker.tracker
        for number, one in enumerate(shown):
            tag = f"{label}/{number:02d} {one['prompt'][:80]}"
            writer.add_image(tag, read_image(one["file"]), global_step=step)
        # It has no captions.
        texts = "\n".join(
            f"    {n:02d} {one['prompt']}: {one['text']}" for n, one in enumerate(shown)
        )
        writer.add_text(f"{label}/captions", texts, global_step=step)


class Wandb(Backend):
    """Weights & Biases."""

    project_variable, name_variable = "WANDB_PROJECT", "WANDB_NAME"

    def __init__(self, job: Job, identity: str) -> None:
        super().__init__(job, identity)
        self.tracker = tracking.WandBTracker(
            self.project,
            name=self.name,
            id=identity,
            resume="allow",
            job_type=job.kind,
            # None leaves WANDB_TAGS in force.
            tags=list(job.tags) or None,
            config=_masked(job.config),
            # This process prints nothing worth keeping, and its arguments tell nothing.
            settings={"console": "off", "silent": True},
        )
        self.tracker.start()
        run = self.tracker.tracker
        # Its own counter refuses steps that come again after a resume.
        run.define_metric("*", step_metric="step")
        self.url = run.url

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self.tracker.log({**values, "step": step})

    def images(self, step: int, label: str, shown: Shown) -> None:
        """Log images with captions."""
        import wandb  # pyright: ignore[reportMissingImports]

        # One key for all, so that they are one panel with a slider over the steps.
        found = [wandb.Image(one["file"], caption=_caption(one)) for one in shown]
        self.tracker.log({label: found, "step": step})

    def artifact(self, name: str, files: Sequence[str]) -> None:
        """Log files as an artifact of type model."""
        import wandb  # pyright: ignore[reportMissingImports]

        # Named for the run: in a project each name has versions of one thing.
        made = wandb.Artifact(f"{name}-{self.identity}", type="model")
        for file in files:
            made.add_file(file)
        self.tracker.tracker.log_artifact(made)

    def end(self, status: str) -> None:
        """Close the run, which is shown as failed where it is."""
        self.tracker.tracker.finish(exit_code=0 if status == "finished" else 1)


class Trackio(Backend):
    """Trackio: a database on this machine, or a Space."""

    project_variable = "TRACKIO_PROJECT"

    def __init__(self, job: Job, identity: str) -> None:
        super().__init__(job, identity)
        self.tracker = tracking.TrackioTracker(
            self.project,
            # A run is found by its name there, so the name holds the id.
            name=f"{self.name}-{identity[:8]}",
            resume="allow",
            # It has neither tags nor kinds of runs.
            config={**_plain(job.config), "tags": ", ".join(job.tags), "kind": job.kind},
            # Otherwise it starts a server for its pages.
            embed=False,
        )
        self.tracker.start()

    def images(self, step: int, label: str, shown: Shown) -> None:
        """Log images with captions."""
        import trackio  # pyright: ignore[reportMissingImports]

        found = {
            # It takes no lists of images.
            f"{label}/{number:02d}": trackio.Image(one["file"], caption=_caption(one))
            for number, one in enumerate(shown)
        }
        self.tracker.log(found, step=step)

    def artifact(self, name: str, files: Sequence[str]) -> None:
        """Log files as an artifact of type model."""
        import trackio  # pyright: ignore[reportMissingImports]

        made = trackio.Artifact(f"{name}-{self.identity}", type="model")
        for file in files:
            made.add_file(file)
        trackio.log_artifact(made)


class MLflow(Backend):
    """MLflow: the server or store of MLFLOW_TRACKING_URI, or mlflow.db in the working folder."""

    project_variable, name_variable = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"

    def __init__(self, job: Job, identity: str) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        super().__init__(job, identity)
        # accelerate prefers the variable, but what is typed wins.
        os.environ["MLFLOW_EXPERIMENT_NAME"] = self.project
        # Ids of runs are MLflow's own there; this tag is what a resumed run finds its run by.
        tags = {"alignprop.run": identity, "alignprop.kind": job.kind}
        # accelerate would take the variable's instead of these.
        tags |= json.loads(os.environ.pop("MLFLOW_TAGS", "{}"))
        known = self._known(mlflow) if job.resumed else None
        self.tracker = tracking.MLflowTracker(
            self.project,
            run_id=known,
            run_name=self.name,
            tags={**tags, **{f"tag.{tag}": "true" for tag in job.tags}},
        )
        self.tracker.start()
        # MLflow refuses to change a parameter.
        if known is None:
            self.tracker.store_init_configuration(_plain(job.config))

    def _known(self, mlflow: Any) -> str | None:
        """Return MLflow's id of the run that is resumed; None if it has none."""
        where = f"tags.\"alignprop.run\" = '{self.identity}'"
        found = mlflow.search_runs(
            experiment_names=[self.project], filter_string=where, output_format="list"
        )
        return found[0].info.run_id if found else None

    def images(self, step: int, label: str, shown: Shown) -> None:
        """Log images, and their captions in a file of their own."""
        import mlflow  # pyright: ignore[reportMissingImports]
        from PIL import Image

        for number, one in enumerate(shown):
            with Image.open(one["file"]) as image:
                mlflow.log_image(image.copy(), key=f"{label}/{number:02d}", step=step)
        captions = {f"{n:02d}": f"{o['prompt']}\n{o['text']}" for n, o in enumerate(shown)}
        mlflow.log_dict(captions, f"{label}/step-{step:06d}.json")

    def artifact(self, name: str, files: Sequence[str]) -> None:
        """Log files below the name."""
        for file in files:
            self.tracker.log_artifact(file, name)

    def end(self, status: str) -> None:
        """Close the run with its status."""
        import mlflow  # pyright: ignore[reportMissingImports]

        # Everything else counts as failed.
        known = {"finished": "FINISHED", "interrupted": "KILLED"}
        mlflow.end_run(known.get(status, "FAILED"))


class SwanLab(Backend):
    """SwanLab. It has no artifacts, and goes on with a run only where it is online."""

    project_variable, name_variable = "SWANLAB_PROJ_NAME", "SWANLAB_EXP_NAME"

    def __init__(self, job: Job, identity: str) -> None:
        super().__init__(job, identity)
        self.tracker = tracking.SwanLabTracker(
            self.project,
            name=self.name,
            tags=list(job.tags) or None,
            job_type=job.kind,
            id=identity,
            resume="allow",
            config=_masked(job.config),
        )
        self.tracker.start()

    def images(self, step: int, label: str, shown: Shown) -> None:
        """Log images with captions."""
        import swanlab  # pyright: ignore[reportMissingImports]

        found = [swanlab.Image(one["file"], caption=_caption(one)) for one in shown]
        self.tracker.log({label: found}, step=step)


BACKENDS: dict[str, type[Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
    "swanlab": SwanLab,
}


def _caption(one: Mapping[str, str]) -> str:
    return f"{one['prompt']}\n{one['text']}"


def _masked(value: Any) -> Any:
    """Return a configuration as it is, with its texts masked."""
    if isinstance(value, Mapping):
        return {key: _masked(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def _plain(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return a configuration as dotted keys with plain values."""
    found: dict[str, str | int | float | bool] = {}
    # Parameters and hyperparameters are numbers and texts; lists become texts.
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _plain(value, f"{prefix}{key}.")
        else:
            plain = value if isinstance(value, bool | int | float) else masked(str(value))
            found[f"{prefix}{key}"] = plain
    return found
