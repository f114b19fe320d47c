"""What a failed download is told as."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from alignprop_cli import hub
from alignprop_cli.errors import AssetError, ConfigError

RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GatedRepoError("no", response=RESPONSE), "it is gated"),
        (RepositoryNotFoundError("no", response=RESPONSE), "the hub has no such repository"),
        (LocalEntryNotFoundError("no"), "it is not in the cache and the hub"),
        (OfflineModeIsEnabled("no"), "it is not in the cache and the hub"),
        (EOFError(), "EOFError"),
        (KeyError("weight"), "'weight'"),
    ],
)
@pytest.mark.parametrize("wrapped", ["not", "from", "while"])
def test_an_error_is_explained_by_its_cause(error: Exception, reason: str, wrapped: str) -> None:
    """Transformers and diffusers raise errors of their own, from the hub's or while handling it."""

    def fail() -> None:
        if wrapped == "not":
            raise error
        try:
            raise error
        except Exception as cause:
            if wrapped == "from":
                raise OSError("theirs") from cause
            raise OSError("theirs")  # noqa: B904

    with pytest.raises(AssetError) as caught, hub.loading("reward.x", "a/b", alternative="c"):
        fail()
    # Of an error that says nothing about the hub the outermost one speaks.
    if wrapped != "not" and isinstance(error, (EOFError, KeyError)):
        reason = "theirs"
    assert caught.value.message.startswith(f"reward.x: cannot load a/b: {reason}")
    assert caught.value.hint == "set reward.x to a local copy, or c"


def test_our_own_errors_pass_unchanged() -> None:
    mine = ConfigError("mine")
    with pytest.raises(ConfigError) as caught, hub.loading("reward.x", "a/b"):
        raise mine
    assert caught.value is mine


def test_a_chain_of_causes_that_bites_its_tail_ends() -> None:
    first, second = OSError("first"), OSError("second")
    first.__context__, second.__context__ = second, first
    assert hub.find_cause(first, {ValueError: "no"}) is None
    assert hub.find_cause(first, {ValueError: "no", OSError: "yes"}) == "yes"


def test_a_place_is_given_to_libraries_without_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.folder_or_id("~/model", "reward.x") == str(tmp_path / "home" / "model")
    assert hub.folder_or_id("owner/name", "reward.x") == "owner/name"
    for missing in ("~/other", "./other", "/none/other"):
        with pytest.raises(AssetError, match=f"^reward.x: cannot load {missing}: no such folder"):
            hub.folder_or_id(missing, "reward.x")
