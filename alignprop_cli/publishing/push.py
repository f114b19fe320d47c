"""Upload a prepared folder to the Hugging Face hub, and say what is wrong where that fails.

The token is huggingface_hub's: of the environment (HF_TOKEN) or of `hf auth login`. It is given to
the hub alone, and no message repeats it. New repositories are private, as nobody has read the card
yet; one that is there keeps what it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import (
    HFValidationError,
    disable_progress_bars,
    get_token,
    validate_repo_id,
)

from alignprop_cli.errors import AssetError, ConfigError, first_line
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.publishing.request import CARD, IMAGES

# What a repository that is pushed to may hold: what is replaced, and what the hub puts there.
_OURS = {CARD, IMAGES, LORA_FILE, ".gitattributes"}
_LOGIN = "`hf auth login`, or set HF_TOKEN; the token needs the right to write"
# The class of all that goes wrong on the way to the hub and back; hub errors are of it too.
_TRANSPORT: type[Exception] = cast(Any, errors).HTTPError


def check(hub_id: str) -> None:
    """Refuse an upload that cannot succeed, before anything is trained or mixed.

    Args:
        hub_id: OWNER/NAME, or NAME for one's own.

    Raises:
        AssetError: If there is no token, the hub does not take it, or cannot be reached.
        ConfigError: If it is no id, or a repository of this name holds anything else.
    """
    # 1. The id, without asking anybody.
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ConfigError(
            f"--push-to-hub: {hub_id[:100]!r} is no id of the hub: {first_line(error)[:200]}",
            hint="expected OWNER/NAME",
        ) from error
    # 2. The token, and what is there already.
    with explained(hub_id):
        if get_token() is None:
            raise AssetError(f"--push-to-hub {hub_id}: there is no token of the hub", hint=_LOGIN)
        api = HfApi()
        owner = api.whoami()["name"]
        _refuse_foreign(api, hub_id if "/" in hub_id else f"{owner}/{hub_id}")


def upload(hub_id: str, folder: Path) -> str:
    """Upload a folder as one commit, into a private repository if there is none yet.

    Args:
        hub_id: As in `check`.
        folder: Holds nothing that is not to be uploaded.

    Returns:
        The address of the repository.

    Raises:
        AssetError: If it fails, with the command that tries again.
        ConfigError: As `check`.
    """
    # They would be drawn into the result.
    disable_progress_bars()
    api = HfApi()
    # For a shell, where a folder's name may have a blank.
    again = shlex.join(["hf", "upload", hub_id, str(folder), ".", "--private"])
    with explained(hub_id, again):
        made = api.create_repo(hub_id, private=True, exist_ok=True)
        # Again, as hours may have passed.
        _refuse_foreign(api, made.repo_id)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload with alignprop"
        )
        return str(made)


def _refuse_foreign(api: HfApi, repo_id: str) -> None:
    """Refuse a repository that holds anything but what is written there."""
    try:
        found = api.list_repo_files(repo_id)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        # A gated repository counts as a missing one there.
        if isinstance(error, errors.GatedRepoError):
            raise
        return  # there is none, or nothing in it
    foreign = sorted(set(found) - _OURS)
    if foreign:
        raise ConfigError(
            f"--push-to-hub {repo_id}: this repository exists, and holds {foreign[0][:100]!r}, "
            "which is no file of a LoRA made here",
            hint="choose another id",
        )


@contextmanager
def explained(hub_id: str, again: str | None = None) -> Iterator[None]:
    """Turn whatever goes wrong with the hub into one clear error.

    Args:
        hub_id: The repository.
        again: The command that tries it again, where there is something to upload.
    """
    try:
        yield
    except (
        _TRANSPORT,
        errors.OfflineModeIsEnabled,
        errors.OIDCError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        reason, hint = _reason(error)
        retry = f"{hint}; " if hint and again else hint
        raise AssetError(
            f"--push-to-hub {hub_id}: {reason}",
            hint=f"{retry}upload it again with: {again}" if again else hint or None,
        ) from error


def _reason(error: Exception) -> tuple[str, str]:
    """Return what went wrong, and what to do; an empty text where nothing is known."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is not asked, as HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated for this token", "ask its owner for access"
    # By the status; the class of the error depends on the address that was asked.
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return "the hub does not take this token (401)", _LOGIN
    if status == 403:
        return "this token may not write there (403)", _LOGIN
    if status is not None:
        said = str(getattr(error, "server_message", None) or "")
        return f"the hub refuses it ({status}){': ' if said else ''}{said[:200]}", ""
    if isinstance(error, _TRANSPORT):
        return f"the hub cannot be reached: {first_line(error)[:200]}", "check the network"
    return first_line(error)[:200], ""
