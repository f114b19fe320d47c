"""The training state of a stage, in a file, so that an interrupted build can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save(file: Path, step: int, **parts: Any) -> None:
    """Write the states of a model, its optimizer and the like, and the number of steps done.

    Args:
        file: Overwritten.
        step: Steps done so far.
        parts: Objects with `state_dict()`, by name.
    """
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, file)


def restore(file: Path, device: torch.device, **parts: Any) -> int:
    """Load what `save` wrote into the same parts, and return the number of steps done.

    0 if there is no file; the parts are then unchanged.
    """
    if not file.is_file():
        return 0
    # map_location: averaged weights stay on the device on which they are loaded.
    state = torch.load(file, weights_only=True, map_location=device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
