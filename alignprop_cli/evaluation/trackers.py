"""Tell experiment trackers the result of an evaluation; see tracking/follow.py."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.evaluation.compare import Evaluation
from alignprop_cli.tracking.follow import Followers
from alignprop_cli.tracking.spool import Job

# Images of each model that are shown.
_SHOWN = 16


class Told:
    """The trackers of an evaluation, as a context: they load while it samples.

    Args:
        config: The complete configuration.
        console: For people.
        folder: Where the result is written.
        is_main: Whether this is the main process; on others nobody is told anything.
    """

    def __init__(self, config: Config, console: Console, folder: Path, *, is_main: bool) -> None:
        self._config, self._folder = config, folder
        names = config.tracking.log_with if is_main else ()
        self._followers = Followers(names, console.warn, console.note)

    def __enter__(self) -> Self:
        """Start the trackers."""
        settings, place = self._config.tracking, self._folder.resolve()
        self._followers.start(
            Job(
                kind="evaluate",
                name=f"{place.parent.name}-{place.name}",
                project=settings.project,
                run_name=settings.run_name,
                tags=settings.tags,
                config=self._config.model_dump(mode="json", exclude={"tracking"}),
                folder=str(place),
            )
        )
        return self

    def tell(self, result: Evaluation) -> None:
        """Tell the means of all models, and show images of each.

        What lies on a curve (strengths, the shares of a sweep) is one step for each point.
        """
        # 1. Numbers. They begin at step 0, which counts as told where nothing was told before.
        told, curve = self._followers, result.curve
        told.scalars(0, {"rewards": _means(result, tuple(result.sampled))}, again=True)
        for number, (at, variant) in enumerate(zip(curve, result.variants, strict=False)):
            values = {name: by[variant].mean for name, by in result.metrics.items()}
            told.scalars(number, {"curve": {"at": at, **values}}, again=True)
        # 2. Images, which lie in the folder.
        for model, sampled in result.sampled.items():
            some = range(len(sampled.samples))[:_SHOWN]
            files = [self._folder / "images" / model / f"{i:04d}.png" for i in some]
            texts = [(sampled.samples[i].prompt, sampled.caption(i)) for i in some]
            told.image_files(0, f"images/{model}", files, texts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close them, and say what was not sent."""
        self._followers.end("finished" if error is None else "failed")


def _means(result: Evaluation, models: tuple[str, ...]) -> dict[str, Any]:
    """Return mean and, for LoRAs, difference to the base model, by reward and model."""
    found: dict[str, Any] = {}
    for name, by_model in {**result.metrics, **result.checker}.items():
        of_models = {model: by_model[model] for model in models if model in by_model}
        found[name] = {
            model: {"mean": metric.mean}
            | ({"difference": metric.paired.difference} if metric.paired else {})
            for model, metric in of_models.items()
        }
    return found
