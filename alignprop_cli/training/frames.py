"""The fixed-seed samples of a run as small images with their rewards, kept for its report.

Each file is of one step, in `samples/` beside the sheet of that step, so that a resumed run shows
what it sampled before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignprop_cli.evaluation import draw, page
from alignprop_cli.storage import write_text

SHOWN = 16
"""Images of a step that a report shows."""

# Steps of which a report shows images, and the bytes that they may have together: a page is mailed,
# and written within a second.
_MOST_STEPS = 32
_MOST_TOGETHER = 2**24
# Bytes of a file: sixteen images have at most a tenth of it.
_MOST_BYTES = 2**23
# The folder of a run may be somebody else's: only images inside the page are addresses here.
_Source = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$")]


class Frame(BaseModel):
    """What was sampled after one step.

    Args:
        step: The step; 0 is the base model.
        prompts: Of the images that are shown, P.
        images: These images, as `data:` addresses, P.
        size: Width and height of a small image, in pixels.
        rewards: By name, of all N samples; the first P are those of the images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: Annotated[int, Field(ge=0)]
    prompts: list[str]
    images: list[_Source]
    size: tuple[int, int]
    rewards: dict[str, list[float]]

    def shown(self, best: int | None) -> dict[str, Any]:
        """Return what the page's script needs; `best` is the best step, if there is one."""
        count = len(self.images)
        return {
            "step": self.step,
            "images": self.images,
            "size": self.size,
            "is_small": page.is_small(self.size),
            "is_best": self.step == best,
            "rewards": {name: values[:count] for name, values in self.rewards.items()},
        }


def make(step: int, found: draw.Samples) -> Frame:
    """Return the frame of a step."""
    small = [page.thumbnail(image) for image in found.images[:SHOWN]]
    return Frame(
        step=step,
        prompts=[sample.prompt for sample in found.samples[:SHOWN]],
        images=[each.source for each in small],
        size=(small[0].width, small[0].height),
        rewards={name: values.tolist() for name, values in found.rewards.items()},
    )


def write(folder: Path, frame: Frame) -> None:
    """Write a frame into the samples of a run."""
    # Not its parents: a run that was moved away meanwhile would go on in half a folder.
    folder.mkdir(exist_ok=True)
    write_text(_file(folder, frame.step), frame.model_dump_json() + "\n")


def read(folder: Path, steps: Sequence[int], like: Frame) -> list[Frame]:
    """Return the frames of some of the steps, evenly chosen.

    Args:
        folder: The samples of a run.
        steps: Those that were sampled, rising.
        like: One of now. Frames of other prompts are left out, and so is what cannot be read: the
            settings of the samples may change when a run is resumed.
    """
    # Chosen before they are read: a long run has thousands.
    known = [step for step in steps if _file(folder, step).is_file()]
    largest = max((_file(folder, step).stat().st_size for step in known), default=1)
    most = max(min(_MOST_STEPS, _MOST_TOGETHER // max(largest, 1)), 2)
    frames = [_read(_file(folder, step)) for step in _spread(known, most)]
    return [f for f in frames if f is not None and _alike(f, like)]


def _alike(frame: Frame, other: Frame) -> bool:
    # The page's script takes one image and one reward for each prompt.
    counts = {len(frame.prompts), len(frame.images)}
    enough = all(len(values) >= len(frame.images) for values in frame.rewards.values())
    return frame.prompts == other.prompts and len(counts) == 1 and enough


def _read(file: Path) -> Frame | None:
    try:
        if file.stat().st_size > _MOST_BYTES:
            return None
        return Frame.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most so many of them, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(i * last / (most - 1))] for i in range(most)]


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.json"
