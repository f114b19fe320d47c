"""How long a run will take, said as soon as it can be known."""

from __future__ import annotations

from alignprop_cli.training.callbacks import Callback, Run
from alignprop_cli.training.record import StepRecord

# The first step of a session is warming up, and the number of calls may differ between steps.
_WARM_UP, _TIMED = 1, 2
# With fewer steps left nobody needs to know.
_FEWEST_LEFT = 5


class Forecast(Callback):
    """Says after the third step how long the rest of the run will take.

    Steps are counted as the two before took; images to sample, during training and after it, as the
    samples of the base model took.
    """

    def before_training(self, run: Run) -> None:
        """Begin to count; of the images, those of the base model are drawn."""
        self._run, self._seconds = run, list[float]()

    def after_step(self, record: StepRecord) -> None:
        """Say it once."""
        self._seconds.append(record.seconds)
        if len(self._seconds) != _WARM_UP + _TIMED:
            return
        # 1. What is left: steps, and images.
        config, now = self._run.config, record.step
        left, every = config.train.steps - now, config.eval.every
        times = config.train.steps // every - now // every if every else 0
        images = times * len(self._run.samples) + len(self._run.held_out)
        # 2. What that takes, as long as everything goes on as it has begun.
        pace = sum(self._seconds[_WARM_UP:]) / _TIMED
        seconds = left * pace + images * self._run.image_seconds
        if left >= _FEWEST_LEFT:
            self._run.console.note(
                f"about {duration(seconds)} left: {left} steps of {pace:.1f} s, and {images} "
                "images to compare"
            )


def duration(seconds: float) -> str:
    """Return a time in words: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
