"""Weights and files from a local path or the Hugging Face hub, and one message for all failures."""

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
from alignprop_cli.paths import user_path

_Value = TypeVar("_Value")

# Found by trying: the libraries do not document them. Some are general, because damaged files make
# readers look up or call what is not there. So put only finding and reading weights in `loading`.
FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    EOFError,
    SafetensorError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    pickle.UnpicklingError,
)
"""Errors that the libraries raise when weights cannot be found or read."""

OFFLINE = "it is not in the cache and the hub cannot be reached"

# Reasons worth more than the library's own text; the first match counts. A gated repository comes
# first, since its error is a subclass of the one for a missing repository.
_REASONS: dict[type[BaseException], str] = {
    GatedRepoError: "it is gated: accept its licence on the hub, then `hf auth login`",
    RepositoryNotFoundError: "the hub has no such repository",
    LocalEntryNotFoundError: OFFLINE,
    OfflineModeIsEnabled: OFFLINE,
}


def find_cause(error: BaseException, table: Mapping[type[BaseException], _Value]) -> _Value | None:
    """Look an error or one of its causes up in a table.

    Args:
        error: The error that was caught.
        table: Values by class of error; where several classes match, the first one counts.
    """
    # Libraries wrap the errors of the hub in their own. A chain of causes can be a circle.
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, value in table.items():
        if any(isinstance(cause, kind) for cause in causes):
            return value
    return None


@contextmanager
def loading(option: str, place: str, *, alternative: str = "") -> Iterator[None]:
    """Turn every error in finding and reading weights inside the block into one kind of error.

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
        raise  # already has a message that says more
    except FAILURES as error:
        # A local copy helps in every case: without a network, behind a proxy, or if a download is
        # damaged.
        reason = find_cause(error, _REASONS) or first_line(error)
        hint = f"set {option} to a local copy"
        hint += f", or {alternative}" if alternative else ""
        raise AssetError(f"{option}: cannot load {place}: {reason}", hint=hint) from error


def locate(place: str, filename: str, *, option: str) -> Path:
    """Return the path of a file of weights; download it if it is not in the cache.

    Args:
        place: A local file, a local folder that holds `filename`, or a hub id OWNER/NAME.
        filename: Name of the file in the folder or the repository.
        option: The option that names the place, for messages.

    Raises:
        AssetError: If there is no such file, or the hub cannot be reached or refuses.
    """
    # Local paths come first, so that a folder OWNER/NAME is never downloaded.
    path = user_path(place, option)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / filename).is_file():
            raise AssetError(f"{option}: {path} holds no {filename}")
        return path / filename
    # What cannot be a hub id is a mistyped path: do not ask the hub for it.
    if place.count("/") != 1 or place.startswith((".", "~", "/")) or path.suffix in _SUFFIXES:
        raise AssetError(f"{option}: no such file or folder: {place}")
    with loading(option, place):
        return Path(hf_hub_download(place, filename))


# Endings of weights. A hub id may hold dots, so other endings do not make it a file.
_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}


def folder_or_id(place: str, option: str) -> str:
    """Return a place for libraries, which expand no ~: the path of what is here, or a hub id.

    Raises:
        AssetError: If it can be nothing but a folder, and there is none.
        ConfigError: As `user_path`.
    """
    path = user_path(place, option)
    if not path.exists() and place.startswith((".", "~", "/")):
        raise AssetError(
            f"{option}: cannot load {place}: no such folder", hint=f"set {option} to a local copy"
        )
    return str(path) if path.exists() else place


def from_pretrained(
    kind: Any, place: str, *, option: str, dtype: torch.dtype | str = torch.float32
) -> Any:
    """Load a transformers model, frozen and in evaluation mode.

    Args:
        kind: Class of the model.
        place: A folder or a hub id.
        option: The option that names the place, for messages.
        dtype: Precision; `auto` is that of its file, for a large model that is converted later.

    Raises:
        AssetError: If it cannot be loaded, or tensors are missing.
    """
    with loading(option, place):
        found = folder_or_id(place, option)
        network, report = kind.from_pretrained(found, dtype=dtype, output_loading_info=True)
        # transformers fills missing tensors with random numbers and only logs a warning.
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"it lacks {missing[0]} ({len(missing)} tensors are missing)")
    return network.eval().requires_grad_(False)
