"""The embeddings of all prompts of a run: in memory up to a budget, beyond it in a file on disk.

The text encoders are dropped before training, so what they made has to stay: 0.3 MB a prompt of
Stable Diffusion XL, 7.9 MB of FLUX.2-klein, of which a set of 3,200 prompts has 25 GB.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_cli.device import available
from alignprop_cli.errors import RunError
from alignprop_cli.guidance import Embeds

SHARE = 0.25
"""Share of the machine's free memory that embeddings take; the processes on it share that."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def budget() -> int:
    """Return the bytes of embeddings that a process keeps in memory."""
    free, _ = available(torch.device("cpu"))
    # Every process has all prompts, since any image may fall to it.
    return int(SHARE * free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def folder() -> Path:
    """Return where the file goes: TMPDIR, or the system's folder for large temporary files."""
    # /tmp is in memory on many systems; /var/tmp is not.
    if not any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")):
        large = Path("/var/tmp")
        if os.access(large, os.W_OK):
            return large
    return Path(tempfile.gettempdir())


@dataclass(frozen=True)
class _Place:
    """Where in the file a tensor is."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class EmbedsCache(Mapping[str, Embeds]):
    """Embeddings by prompt, on the CPU; what comes after the budget is read from disk when needed.

    What is read has the same bits as what was added. The file has no name: it is gone when the
    process ends, however it ends.

    Args:
        budget: Bytes to keep in memory.
    """

    def __init__(self, budget: int) -> None:
        self.held_bytes = self.filed_bytes = 0
        self._budget = budget
        self._kept: dict[str, Embeds | dict[str, _Place]] = {}
        self._by_size: dict[int, str] = {}
        self._file: Any = None

    def add(self, prompt: str, embeds: Embeds) -> None:
        """Keep the embeddings of a prompt, without a batch dimension.

        Raises:
            RunError: If the disk has no room for them.
        """
        size = sum(t.numel() * t.element_size() for t in embeds.tensors.values())
        self._by_size.setdefault(size, prompt)
        if self.held_bytes + size <= self._budget:
            self._kept[prompt] = embeds
            self.held_bytes += size
            return
        try:
            if self._file is None:
                # Unnamed from the beginning, and open until it is dropped with this object.
                # Unbuffered: what a full disk left in a buffer would be written again at the end.
                self._file = tempfile.TemporaryFile(dir=folder(), buffering=0)  # noqa: SIM115
            self._kept[prompt] = {n: self._write(t) for n, t in embeds.tensors.items()}
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise RunError(
                f"{folder()} has no room for the embeddings of the prompts: {len(self)} take "
                f"{(self.held_bytes + self.filed_bytes) / 2**30:.2f} GiB, and more are to come",
                hint="set TMPDIR to a folder on a larger disk, or use fewer prompts",
            ) from error

    @property
    def longest(self) -> str | None:
        """Return a prompt whose embeddings are the largest; None where all have one size."""
        return self._by_size[max(self._by_size)] if len(self._by_size) > 1 else None

    def describe(self) -> str:
        """Return how many prompts there are and how much they take, in words."""
        held, filed = self.held_bytes / 2**30, self.filed_bytes / 2**30
        where = f", {filed:.2f} GiB in a temporary file in {folder()}" if self.filed_bytes else ""
        return f"embeddings of {len(self)} prompts: {held:.2f} GiB in memory{where}"

    def __getitem__(self, prompt: str) -> Embeds:
        kept = self._kept[prompt]
        if isinstance(kept, Embeds):
            return kept
        return Embeds({name: self._read(place) for name, place in kept.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def _write(self, tensor: Tensor) -> _Place:
        place = _Place(self.filed_bytes, tensor.shape, tensor.dtype)
        rest = _bytes_of(tensor.cpu().contiguous())
        while rest:
            written = self._file.write(rest)
            self.filed_bytes += written
            rest = rest[written:]
        return place

    def _read(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        rest, start = _bytes_of(tensor), place.start
        while rest:
            # By place, without moving the file's own position.
            read = os.preadv(self._file.fileno(), [rest], start)
            if read == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder()))
            rest, start = rest[read:], start + read
        return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor of any precision as bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
