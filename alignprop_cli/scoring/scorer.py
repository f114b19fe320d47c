"""Measure image files: decode them in worker processes, and score them chunk by chunk.

Chunks have a fixed number of files, so that the same images share a batch however often a run is
resumed. Images are not kept in memory, only their rewards and digests, a few hundred bytes each.
An image that cannot be measured is reported, never silently left out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from alignprop_cli.errors import RunError
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.scoring.captions import Caption, PromptFinder
from alignprop_cli.scoring.files import Decoded, Found, named, read_image

CHUNK = 16
"""Consecutive files that are decoded together, and measured as one batch for each image size."""

# A chunk of larger images is measured in parts, so that no more pixels than these are in memory, or
# one image: 16 images of 1024 x 1024, 48 MiB as bytes.
_MOST_PIXELS = CHUNK * 1024**2

# Images that each worker decodes ahead.
_AHEAD = 4

# Of Linux's prctl: the signal that a process gets when its parent ends.
_SET_PARENT_DEATH_SIGNAL = 1

Known = MutableMapping[tuple[str, str | None], dict[str, float]]
"""Rewards by content and prompt."""


@dataclass(frozen=True)
class Scored:
    """One measured image.

    Args:
        path: The file.
        prompt: Its prompt; None where there is none and no reward needed one.
        prompt_source: Where the prompt comes from, one of `captions.SOURCES`.
        content: Digest of the pixels; see `Decoded.digest`.
        rewards: All metrics by name.
        again: Whether the same pixels with the same prompt were measured before.
        remark: What was done to the image before; see `Decoded`.
        why: Why there is no prompt, where something could not be read or taken.
    """

    path: Path
    prompt: str | None
    prompt_source: str
    content: str
    rewards: dict[str, float]
    again: bool = False
    remark: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class Skipped:
    """An image that could not be measured, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class _Ready:
    """A decoded image with its prompt, ready to be measured."""

    found: Found
    decoded: Decoded
    digest: str
    caption: Caption

    @property
    def pixels(self) -> int:
        return self.decoded.pixels.shape[0] * self.decoded.pixels.shape[1]

    @property
    def key(self) -> tuple[str, str | None]:
        return self.digest, self.caption.prompt


class _Files(Dataset[tuple[Decoded, str] | str]):
    """Decodes one file at a time: the image with its digest, or why it cannot be read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Decoded, str] | str:
        return _decode(self.paths[index])


def _decode(path: Path) -> tuple[Decoded, str] | str:
    # Errors are returned, not raised: one in a worker would end the whole loader.
    try:
        decoded = read_image(path)
    except ValueError as error:
        return str(error)
    return decoded, decoded.digest()


def _unchanged(read: Any) -> Any:
    return read


def chunks(found: Sequence[Found], done: Collection[str] = ()) -> list[list[Found]]:
    """Divide files into chunks of `CHUNK`, then leave out those that are done.

    In this order, so that a file is in the same chunk whatever is done.

    Args:
        found: All files.
        done: Absolute names, see `files.named`.

    Returns:
        The chunks that are not empty.
    """
    divided = (found[i : i + CHUNK] for i in range(0, len(found), CHUNK))
    left = ([each for each in chunk if named(each.path) not in done] for chunk in divided)
    return [chunk for chunk in left if chunk]


def needs_prompt(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a reward reads the prompt; one that is not shipped is assumed to."""
    spec = registry.SHIPPED.get(name)
    if spec is None:
        return True
    return spec.reads_prompt and (spec.instead is None or options.get(spec.instead) is None)


def score(
    divided: Sequence[Sequence[Found]],
    mixture: Mixture,
    finder: PromptFinder,
    *,
    needing: Sequence[str],
    device: torch.device,
    workers: int = 0,
    known: Known | None = None,
) -> Iterator[Scored | Skipped]:
    """Measure images one chunk after the other, in their order.

    Args:
        divided: As `chunks` returns them.
        mixture: The rewards, on the device.
        finder: Finds the prompts.
        needing: Names of the rewards that need a prompt; see `needs_prompt`.
        device: The device that the rewards are on.
        workers: Number of processes that decode ahead; 0 decodes in this one.
        known: Rewards that are known already; new ones are added. The same pixels with the same
            prompt are never measured twice.

    Yields:
        For every image its rewards, or the reason why it has none.

    Raises:
        ConfigError, AssetError: If a table of prompts is invalid or a reward returns a wrong shape.
        RunError: If a reward is not finite, or a worker process dies.
    """
    # 1. Workers decode all files in order, one at a time: `DataLoader` without batches.
    known = {} if known is None else known
    loader = DataLoader(
        _Files([found.path for chunk in divided for found in chunk]),
        batch_size=None,
        num_workers=workers,
        # Arrays stay arrays: tensors would go through /dev/shm, which is small in containers.
        collate_fn=_unchanged,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_end_with_parent,
    )
    decoded = _watched(loader)
    # 2. Chunk by chunk: find the prompts, then measure.
    for chunk in divided:
        prepared: list[_Ready | Skipped] = []
        pixels = 0
        for found in chunk:
            each = _prepare(found, next(decoded), finder, needing)
            more = each.pixels if isinstance(each, _Ready) else 0
            # Before decoded images fill the memory, measure those that there are.
            if pixels and pixels + more > _MOST_PIXELS:
                yield from _results(prepared, known, mixture, device)
                prepared, pixels = [], 0
            prepared.append(each)
            pixels += more
        yield from _results(prepared, known, mixture, device)


def _results(
    prepared: Sequence[_Ready | Skipped], known: Known, mixture: Mixture, device: torch.device
) -> Iterator[Scored | Skipped]:
    """Measure the images that are new, and yield the results of all images in their order."""
    # The first image with some pixels and prompt is measured; the others are marked `again`.
    ready = [each for each in prepared if isinstance(each, _Ready)]
    new: dict[tuple[str, str | None], _Ready] = {}
    for each in ready:
        if each.key not in known:
            new.setdefault(each.key, each)
    for batch in _batches(list(new.values())):
        known.update(_measure(batch, mixture, device))
    for each in prepared:
        if isinstance(each, Skipped):
            yield each
            continue
        yield Scored(
            each.found.path,
            each.caption.prompt,
            each.caption.source,
            each.digest,
            known[each.key],
            again=new.get(each.key) is not each,
            remark=each.decoded.remark,
            why=each.caption.why,
        )


def _end_with_parent(_worker: int) -> None:
    """Let this worker be killed when the process that started it is gone, however it ended."""
    # A worker that waits for a full pipe, of which another worker holds the reading end as well,
    # would never notice by itself.
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _watched(loader: DataLoader[Any]) -> Iterator[tuple[Decoded, str] | str]:
    """Yield from a loader, with an error of our own if one of its workers dies."""
    try:
        yield from loader
    except RuntimeError as error:
        # torch has no class for this error, only its text.
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"a process that decodes images ended: {str(error).splitlines()[0]}",
            hint="most often memory has run out: try --workers 0",
        ) from error


def _prepare(
    found: Found,
    read: tuple[Decoded, str] | str,
    finder: PromptFinder,
    needing: Sequence[str],
) -> _Ready | Skipped:
    """Find the prompt of a decoded image."""
    if isinstance(read, str):
        return Skipped(found.path, read)
    decoded, digest = read
    caption = finder.find(found, decoded.texts, fetch=bool(needing))
    if caption.prompt is None and needing:
        why = f": {caption.why}" if caption.why else ""
        return Skipped(found.path, f"no prompt found, which {', '.join(needing)} needs{why}")
    return _Ready(found, decoded, digest, caption)


def _batches(ready: Sequence[_Ready]) -> Iterator[list[_Ready]]:
    """Yield the images of each size as one batch."""
    sizes: dict[tuple[int, ...], list[_Ready]] = defaultdict(list)
    for each in ready:
        sizes[each.decoded.pixels.shape].append(each)
    yield from sizes.values()


@torch.no_grad()
def _measure(
    batch: Sequence[_Ready], mixture: Mixture, device: torch.device
) -> dict[tuple[str, str | None], dict[str, float]]:
    """Return the rewards of a batch of images of one size, by their keys."""
    # Copied to the device as bytes, a quarter of float32, and converted there.
    stacked = torch.from_numpy(np.stack([ready.decoded.pixels for ready in batch]))  # (B, H, W, 3)
    # Pinned memory is copied without waiting; other devices have no use for it.
    if device.type == "cuda":
        stacked = stacked.pin_memory()
    images = stacked.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255.0
    # An image without a prompt is only here if no reward reads prompts: see `_prepare`.
    scores = mixture.score(images, [ready.caption.prompt or "" for ready in batch])
    columns = {name: values.tolist() for name, values in scores.items()}
    return {
        ready.key: {name: values[index] for name, values in columns.items()}
        for index, ready in enumerate(batch)
    }
