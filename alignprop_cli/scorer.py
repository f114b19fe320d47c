"""Measure pictures from files: find them, find the prompt of each, decode, score in batches.

Pictures are read one batch at a time, so that memory does not grow with their number. Consecutive
pictures of the same size share a batch. What cannot be measured is told, never silently left out.
"""

from __future__ import annotations

import csv
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.composite import Mixture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROMPT_COLUMNS = ("prompt", "text", "caption")
_METADATA = ("metadata.jsonl", "metadata.csv")

# What Pillow raises for files that are no pictures, cut short, or too large to be one.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Pixels = NDArray[np.uint8]
Table = dict[str, str]
"""Prompt by file name as written, with forward slashes."""


@dataclass(frozen=True)
class Found:
    """A picture file, and the folder it was found through."""

    path: Path
    root: Path


@dataclass(frozen=True)
class Scored:
    """One measured picture.

    Args:
        path: The file.
        prompt: What it was measured with; None where no reward needed one.
        prompt_source: Where the prompt is from: flag, file, metadata, sidecar, picture or none.
        rewards: By name.
    """

    path: Path
    prompt: str | None
    prompt_source: str
    rewards: dict[str, float]


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be measured, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class _Ready:
    found: Found
    pixels: Pixels
    prompt: str | None
    source: str


def find_pictures(names: Iterable[str]) -> list[Found]:
    """Return the pictures of files and folders, folders with everything below, sorted.

    Files that are named are taken whatever their ending; no picture comes twice.

    Raises:
        AssetError: If a name is neither a file nor a folder.
    """
    found: dict[Path, Found] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            found.setdefault(path.resolve(), Found(path, path.parent))
        elif path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            for picture in sorted(inside):
                found.setdefault(picture.resolve(), Found(picture, path))
        else:
            raise AssetError(f"{name}: no such file or folder")
    return list(found.values())


def read_picture(path: Path) -> tuple[Pixels, dict[str, str]]:
    """Decode a picture upright, as RGB bytes, transparent parts on white.

    Returns:
        Pixels, shape (H, W, 3), uint8, and the texts that a PNG carries.

    Raises:
        ValueError: If it cannot be read or is animated; says why.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"animated, {getattr(image, 'n_frames', 0)} frames")
            image.load()
            texts = {
                k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)
            }
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_flatten(upright)), texts
    except _UNREADABLE as error:
        lines = str(error).strip().splitlines()
        raise ValueError(lines[0] if lines else type(error).__name__) from error


def _flatten(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB, transparent parts white."""
    if image.mode.startswith("I"):
        # 16 bits; Pillow's own conversion would clip instead of scale.
        values = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def read_table(path: Path) -> Table:
    """Read which prompt belongs to which file, from .jsonl or .csv.

    Each line or row has `file_name`, and the prompt as `prompt`, `text` or `caption`.

    Raises:
        AssetError: If it cannot be read.
        ConfigError: If it is of another kind, or a line lacks something; names the line.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"prompts: {path}: expected a .jsonl or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"prompts: cannot read {path}: {error}") from error
    table: Table = {}
    for line, row in readers[path.suffix.lower()](text, path):
        name = row.get("file_name")
        prompt = next((row[c] for c in PROMPT_COLUMNS if row.get(c) is not None), None)
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise ConfigError(
                f"prompts: {path}:{line}: expected file_name and one of "
                f"{', '.join(PROMPT_COLUMNS)} as texts, got {', '.join(map(str, row)) or 'nothing'}"
            )
        table[name.replace("\\", "/").removeprefix("./")] = prompt
    return table


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines: a JSON text may hold other line separators than \n.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"prompts: {path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"prompts: {path}:{number}: expected an object, got {line.strip()!r}")
        yield number, cast(Mapping[str, Any], row)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(text.splitlines(keepends=True))
    for row in rows:
        yield rows.line_num, row


@dataclass
class PromptFinder:
    """Finds the prompt of a picture: flag, file, folder's metadata, sidecar, the picture itself.

    Args:
        prompt: One for all pictures.
        table: A file that says which prompt belongs to which picture.

    Raises:
        AssetError, ConfigError: As `read_table`.
    """

    prompt: str | None = None
    table: Path | None = None
    _tables: dict[Path, Table] = field(default_factory=dict[Path, Table], repr=False)

    def find(self, found: Found, texts: Mapping[str, str]) -> tuple[str | None, str]:
        """Return the prompt and where it is from.

        Args:
            found: The picture.
            texts: What the picture itself carries.

        Returns:
            The prompt, None where there is none, and flag, file, metadata, sidecar, picture, none.

        Raises:
            AssetError, ConfigError: As `read_table`, for a metadata file beside the picture.
        """
        if self.prompt is not None:
            return self.prompt, "flag"
        if self.table is not None:
            prompt = self._look_up(self.table, found.path, (found.root, self.table.parent))
            if prompt is not None:
                return prompt, "file"
        for folder in _upwards(found.path.parent, found.root):
            for name in _METADATA:
                if (folder / name).is_file():
                    prompt = self._look_up(folder / name, found.path, (folder,))
                    if prompt is not None:
                        return prompt, "metadata"
        sidecar = found.path.with_suffix(".txt")
        if sidecar.is_file():
            text = sidecar.read_text(encoding="utf-8-sig", errors="replace").strip()
            if text:
                return text, "sidecar"
        own = texts.get("prompt", "").strip()
        # ComfyUI puts its whole graph under the same key.
        if own and not own.startswith("{"):
            return own, "picture"
        return None, "none"

    def _look_up(self, file: Path, picture: Path, roots: Iterable[Path]) -> str | None:
        if file not in self._tables:
            self._tables[file] = read_table(file)
        table, resolved = self._tables[file], picture.resolve()
        names = [resolved.as_posix()]
        for root in roots:
            if resolved.is_relative_to(root.resolve()):
                names.append(resolved.relative_to(root.resolve()).as_posix())
        return next((table[name] for name in names if name in table), None)


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    """Yield a folder and those above it, up to the root."""
    while True:
        yield folder
        if folder == root or not folder.is_relative_to(root):
            return
        folder = folder.parent


def needs_prompt(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a reward looks at the prompt; of those of others it is supposed."""
    spec = registry.SHIPPED.get(name)
    if spec is None:
        return True
    return spec.reads_prompt and (spec.instead is None or options.get(spec.instead) is None)


@torch.no_grad()
def score(
    pictures: Iterable[Found],
    mixture: Mixture,
    finder: PromptFinder,
    *,
    asking: Sequence[str],
    device: torch.device,
    batch_size: int,
) -> Iterator[Scored | Skipped]:
    """Measure pictures one batch after the other, in their order.

    Args:
        pictures: As `find_pictures` returns them.
        mixture: The rewards, on the device.
        finder: Of the prompts.
        asking: Names of the rewards that cannot do without one; see `needs_prompt`.
        device: Where the rewards are.
        batch_size: At most so many consecutive pictures of one size are measured at once.

    Yields:
        For every picture its rewards or the reason why there are none.

    Raises:
        ConfigError, AssetError: If a metadata file is wrong or a reward answers in a wrong shape.
        RunError: If a reward is not finite.
    """
    batch: list[_Ready] = []
    for found in pictures:
        ready = _prepare(found, finder, asking)
        fits = isinstance(ready, _Ready) and (
            not batch or ready.pixels.shape == batch[0].pixels.shape
        )
        if batch and (not fits or len(batch) == batch_size):
            yield from _measure(batch, mixture, device)
            batch = []
        if isinstance(ready, Skipped):
            yield ready
        else:
            batch.append(ready)
    if batch:
        yield from _measure(batch, mixture, device)


def _prepare(found: Found, finder: PromptFinder, asking: Sequence[str]) -> _Ready | Skipped:
    """Decode a picture and find its prompt."""
    try:
        pixels, texts = read_picture(found.path)
    except ValueError as error:
        return Skipped(found.path, str(error))
    prompt, source = finder.find(found, texts)
    if prompt is None and asking:
        return Skipped(found.path, f"no prompt found, which {', '.join(asking)} needs")
    return _Ready(found, pixels, prompt, source)


def _measure(batch: Sequence[_Ready], mixture: Mixture, device: torch.device) -> Iterator[Scored]:
    stacked = torch.from_numpy(np.stack([ready.pixels for ready in batch]))
    images = stacked.to(device).permute(0, 3, 1, 2).float() / 255.0
    scores = mixture.score(images, [ready.prompt or "" for ready in batch])
    for index, ready in enumerate(batch):
        rewards = {name: float(values[index]) for name, values in scores.items()}
        yield Scored(ready.found.path, ready.prompt, ready.source, rewards)
