"""Published weights and files: a local path or a file of the hub; one message when it fails."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from alignprop_cli.errors import AlignPropError, AssetError, first_line

_Told = TypeVar("_Told")

FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    SafetensorError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    pickle.UnpicklingError,
)
"""What the libraries raise when weights cannot be found or read."""

OFFLINE = "it is not in the cache and the hub cannot be reached"

_REASONS: dict[type[BaseException], str] = {
    GatedRepoError: "it is gated: accept its licence on the hub, then `hf auth login`",
    RepositoryNotFoundError: "the hub has no such repository",
    LocalEntryNotFoundError: OFFLINE,
    OfflineModeIsEnabled: OFFLINE,
}


def find_cause(error: BaseException, table: Mapping[type[BaseException], _Told]) -> _Told | None:
    """Return what a table has for an error or for one of its causes.

    The libraries raise errors of their own from those of the hub.

    Args:
        error: As it was caught.
        table: By class of error; where several match, the first one counts.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, told in table.items():
        if any(isinstance(cause, kind) for cause in causes):
            return told
    return None


@contextmanager
def loading(option: str, place: str, *, alternative: str = "") -> Iterator[None]:
    """Turn whatever goes wrong inside the block, while weights are found and read, into one error.

    Args:
        option: The option that names the weights, such as reward.hps.weights.
        place: Its value: a path or a hub id.
        alternative: What else the option may be set to.

    Raises:
        AssetError: With the reason, and what to do without a network.
    """
    try:
        yield
    except AlignPropError:
        raise
    except FAILURES as error:
        reason = find_cause(error, _REASONS) or first_line(error)
        hint = f"set {option} to a local copy"
        hint += f", or {alternative}" if alternative else ""
        raise AssetError(f"{option}: cannot load {place}: {reason}", hint=hint) from error


def locate(place: str, filename: str, *, option: str) -> Path:
    """Return a file of weights, downloaded (with a progress bar) where it is not there yet.

    Args:
        place: A local file, a local folder that holds `filename`, or a hub id OWNER/NAME.
        filename: Of the file in the folder or the repository.
        option: The option that names the place, for the messages.

    Raises:
        AssetError: If there is no such file, or the hub cannot be reached or refuses.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / filename).is_file():
            raise AssetError(f"{option}: {path} holds no {filename}")
        return path / filename
    if place.count("/") != 1 or place.startswith((".", "~", "/")) or path.suffix in _SUFFIXES:
        raise AssetError(f"{option}: no such file or folder: {place}")
    with loading(option, place):
        return Path(hf_hub_download(place, filename))


_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}


def from_pretrained(kind: Any, place: str, *, option: str) -> Any:
    """Return a network of transformers, frozen, in float32.

    Args:
        kind: Its class.
        place: A folder or a hub id.
        option: The option that names the place, for the messages.

    Raises:
        AssetError: If it cannot be had, or tensors are missing: transformers would fill them with
            random numbers and go on.
    """
    with loading(option, place):
        network, report = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"it lacks {missing[0]} ({len(missing)} tensors are missing)")
    return network.eval().requires_grad_(False)
