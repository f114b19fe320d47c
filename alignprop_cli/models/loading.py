"""Model files from the hub, and one message for whatever is wrong with model files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from alignprop_cli import hub
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import AssetError, first_line

_INDEX = "model_index.json"

_ELSEWHERE = "set model.id to a local folder or file; `--preset tiny` works without any download"


def download_index(config: ModelConfig) -> Path:
    """Return the model_index.json of a hub id.

    Raises:
        AssetError: If the hub cannot be reached or refuses, or has no such file.
    """
    with explained(config):
        return Path(hf_hub_download(config.id, _INDEX, revision=config.revision))


def download_configurations(config: ModelConfig) -> Path:
    """Return a folder with the configurations of a hub id's parts, without weights.

    Raises:
        AssetError: If the hub cannot be reached or refuses.
    """
    # One folder deep, as the parts of a pipeline are.
    with explained(config):
        return Path(
            snapshot_download(
                config.id, revision=config.revision, allow_patterns=["*/*.json", _INDEX]
            )
        )


def download(config: ModelConfig) -> Path:
    """Download a hub id and return its folder, in diffusers format.

    Raises:
        AssetError: If the hub cannot be reached or refuses.
    """
    from diffusers import DiffusionPipeline

    # A part that is passed as None is not downloaded.
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    if config.t5 == "none":
        unused |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    with explained(config):
        folder: str | Path = DiffusionPipeline.download(
            config.id, revision=config.revision, variant=config.variant, **unused
        )
        return Path(folder)


@contextmanager
def explained(config: ModelConfig, path: Path | None = None) -> Iterator[None]:
    """Turn whatever goes wrong while a model is downloaded or read into one clear error.

    Args:
        config: The `model` section.
        path: The local folder or file that is read; None while the hub is asked.

    Raises:
        AssetError: With what could not be loaded, why, and what to do.
    """
    try:
        yield
    except hub.FAILURES as error:
        # With a local path the hub was not asked, so its errors in the chain explain nothing.
        refusal = hub.find_cause(error, _REFUSALS) if path is None else None
        if refusal is not None:
            raise refusal(config) from error
        place = path or f"{config.id} from the hub"
        message = f"model.id: cannot load {place}: {first_line(error)}"
        raise AssetError(message, hint=_ELSEWHERE) from error


def _gated(config: ModelConfig) -> AssetError:
    return AssetError(
        f"model.id: {config.id} is gated: its licence has to be accepted first",
        hint=f"accept it at https://huggingface.co/{config.id}, then `hf auth login`; "
        f"or {_ELSEWHERE}",
    )


def _no_revision(config: ModelConfig) -> AssetError:
    return AssetError(f"model.revision: {config.id} has no revision {config.revision!r}")


def _no_repository(config: ModelConfig) -> AssetError:
    return AssetError(f"model.id: the hub has no model {config.id}", hint=_ELSEWHERE)


def _no_file(config: ModelConfig) -> AssetError:
    return AssetError(
        f"model.id: {config.id} is not a model in diffusers format: it has no {_INDEX}",
        hint="download its single .safetensors file and give the path to it",
    )


def _offline(config: ModelConfig) -> AssetError:
    return AssetError(f"model.id: {config.id}: {hub.OFFLINE} ({_INDEX})", hint=_ELSEWHERE)


# The error to show for each error of the hub. `find_cause` takes the first entry that matches.
_REFUSALS: dict[type[BaseException], Callable[[ModelConfig], AssetError]] = {
    # The order counts: GatedRepoError is a RepositoryNotFoundError.
    GatedRepoError: _gated,
    RevisionNotFoundError: _no_revision,
    RepositoryNotFoundError: _no_repository,
    RemoteEntryNotFoundError: _no_file,
    OfflineModeIsEnabled: _offline,
    LocalEntryNotFoundError: _offline,
}
