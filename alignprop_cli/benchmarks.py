"""Prompt sets that others have published: which files they are, and where those come from.

The texts are theirs, so none is shipped. Files of the hub are in the hub's cache; those of GitHub
are of one commit, are checked by their SHA-256, and lie beside that cache.
"""

from __future__ import annotations

import http.client
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled

from alignprop_cli import hub
from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.storage import sha256

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""Styles of the HPDv2 benchmark: `hpd:anime` etc., and `hpd` for all four."""

GITHUB = "https://raw.githubusercontent.com"

# Seconds without a byte, after which a server counts as gone.
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Source:
    """One file of a published set.

    Args:
        file: Its path in the repository.
        prompts: How many it holds; known here, so that prompts can be counted without a download.
        dataset: Id of the dataset on the hub; empty for a file of GitHub.
        commit: `owner/name/commit` on GitHub, for such a file.
        sha256: Of such a file.
        size: Of such a file, in bytes.
        style: The part of the set that it is; empty if it is the whole.
    """

    file: str
    prompts: int
    dataset: str = ""
    commit: str = ""
    sha256: str = ""
    size: int = 0
    style: str = ""

    @property
    def address(self) -> str:
        """Return what it is called in messages: the address, or the file of a dataset."""
        if self.commit:
            return f"{GITHUB}/{self.commit}/{self.file}"
        return f"{self.file} of the dataset {self.dataset}"


_HPD = "zhwang/HPDv2"
PUBLISHED: Mapping[str, tuple[Source, ...]] = {
    # Human Preference Dataset v2, whose prompts come from COCO and DiffusionDB.
    "hpd": tuple(Source(f"benchmark/{s}.json", 800, _HPD, style=s) for s in HPD_STYLES),
    # The file that the authors of HPSv2 score with.
    "drawbench": (Source("benchmark/drawbench.json", 200, _HPD),),
    "parti": (Source("PartiPrompts.tsv", 1632, "nateraw/parti-prompts"),),
    # The two below are published on GitHub alone. Each at its newest commit of November 2026.
    "geneval": (
        Source(
            "prompts/evaluation_metadata.jsonl",
            553,
            commit="djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f",
            sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            size=85_209,
        ),
    ),
    "geneval2": (
        Source(
            "geneval2_data.jsonl",
            800,
            commit="facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3",
            sha256="09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
            size=423_220,
        ),
    ),
}
"""The sets by name."""

NAMES = (*PUBLISHED, *(f"hpd:{style}" for style in HPD_STYLES))
"""All that may be asked for."""


def is_published(name: str) -> bool:
    """Return whether a name is of these sets, also with an unknown style."""
    return name in PUBLISHED or name.partition(":")[0] == "hpd"


def sources(name: str) -> tuple[Source, ...]:
    """Return the files of a set, or of one style of it.

    Raises:
        ConfigError: If `hpd` has no such style.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    style = name.partition(":")[2]
    found = tuple(source for source in PUBLISHED["hpd"] if not style or source.style == style)
    if not found:
        raise ConfigError(
            f"prompts: unknown style '{style}' of hpd.{did_you_mean(style, HPD_STYLES)}",
            hint=f"styles: {', '.join(HPD_STYLES)}",
        )
    return found


def fetch(source: Source) -> Path:
    """Return a file of a set; download it if it is not in the cache.

    Raises:
        AssetError: If it cannot be reached, or is not the published file.
    """
    with hub.loading("prompts", source.address):
        if not source.commit:
            return Path(hf_hub_download(source.dataset, source.file, repo_type="dataset"))
        # Where the hub's library has a place for what other libraries download.
        folder = Path(constants.HF_ASSETS_CACHE) / "alignprop" / source.commit.replace("/", "--")
        path = folder / Path(source.file).name
        # One that was damaged since is downloaded again.
        if not path.is_file() or sha256(path) != source.sha256:
            _download(source, path)
    return path


def _download(source: Source, path: Path) -> None:
    """Download a file of GitHub, whole and checked or not at all."""
    # The hub's own switch, since who sets it means all of the network.
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled(source.address)
    try:
        with urllib.request.urlopen(source.address, timeout=_TIMEOUT) as answer:
            # Never more than the file has, whatever the server sends.
            data: bytes = answer.read(source.size + 1)
            missing: int = answer.length or 0
    except http.client.HTTPException as error:
        raise OSError(f"the answer is cut short or no HTTP: {type(error).__name__}") from error
    # Read in part, http.client takes the end of a connection for the end of the answer.
    if missing and len(data) <= source.size:
        raise OSError(f"the answer is cut short: {len(data)} of {len(data) + missing} bytes")
    path.parent.mkdir(parents=True, exist_ok=True)
    # By the process's number, since several may download it.
    made = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        made.write_bytes(data)
        if sha256(made) != source.sha256:
            raise AssetError(
                f"prompts: {source.address} is not the file that was published: its SHA-256 is not "
                f"{source.sha256}",
                hint="set prompts to a local copy that you trust",
            )
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
