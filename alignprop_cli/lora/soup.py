"""Make a soup of LoRA files: find and check the members, mix them, write the result.

mixing.py does the arithmetic, recipe.py reads what the user asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignprop_cli import __version__
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import files, formats, mixing
from alignprop_cli.lora.factors import is_dora
from alignprop_cli.lora.files import LORA_FILE, Adapter
from alignprop_cli.lora.recipe import RANKED, Recipe
from alignprop_cli.paths import user_path
from alignprop_cli.storage import sha256, write_whole

BASE = "base"
"""The base model's name as a member; a folder of that name has to be written ./base."""


@dataclass(frozen=True)
class Member:
    """One of the models that are mixed.

    Args:
        name: As the user typed it.
        label: Its short name in the names of folders.
        adapter: Its LoRA; None is the base model.
    """

    name: str
    label: str
    adapter: Adapter | None


@dataclass(frozen=True)
class Mix:
    """One mix of the members.

    Args:
        folder: Where it is written.
        coefficients: The share of each member.
        share: Along a sweep the first member's share; None for a single mix.
    """

    folder: Path
    coefficients: Sequence[float]
    share: float | None = None


@dataclass(frozen=True)
class Soup:
    """Members that fit together, and the mixes to make of them.

    Args:
        members: At least one of them is not the base model.
        folder: Where everything is written.
        mixes: A single mix, in that folder, or those of a sweep, in folders inside it.
        recipe: How they are mixed.
    """

    members: Sequence[Member]
    folder: Path
    mixes: Sequence[Mix]
    recipe: Recipe

    def contents(self, evaluation: Sequence[str]) -> list[str]:
        """Return what is written into the folder, and may be replaced, as regular expressions.

        Args:
            evaluation: Those of the files of an evaluation, which goes into a folder inside.
        """
        # Of a sweep only the folders of its own shares: another sweep's results are not replaced.
        parts = [mix.folder.name for mix in self.mixes if mix.share is not None]
        mixes = [re.escape(f"{part}/{name}") for part in parts for name in (LORA_FILE, "README.md")]
        return [re.escape(LORA_FILE), *(f"evaluation/({name})" for name in evaluation), *mixes]

    @property
    def source(self) -> files.Located:
        """Return the first member that records how to sample with it, or else the first one."""
        adapters = self._adapters
        # Only a LoRA that alignprop trained has its configuration in the header.
        recorded = (a for a in adapters if "alignprop.config" in a.header)
        return files.Located(next(recorded, adapters[0]).file)

    @property
    def header(self) -> dict[str, str]:
        """Return what the mixes record about their base model and how to sample with it."""
        return _recorded(self._adapters)

    @property
    def rewards(self) -> list[str]:
        """Return the rewards that the members record that they were trained on, each once."""
        named = (a.header.get("alignprop.rewards", "") for a in self._adapters)
        return list(dict.fromkeys(name for text in named for name in text.split(",") if name))

    @property
    def _adapters(self) -> list[Adapter]:
        return [member.adapter for member in self.members if member.adapter is not None]

    @property
    def left_out(self) -> list[str]:
        """Return messages about parts of the members' files that go into no mix."""
        what = "layers of the text encoder are left out"
        return [f"{a.file}: its {a.left_out} {what}" for a in self._adapters if a.left_out]

    @property
    def remarks(self) -> list[str]:
        """Return messages about unusual shares of a single mix."""
        if self.mixes[0].share is not None:
            return []
        total, least = sum(self.mixes[0].coefficients), min(self.mixes[0].coefficients)
        if total < 0.999 or total > 1.001:
            return [f"the shares add up to {total:g}: the mix is not an average"]
        return ["a share is negative: the mix lies beyond a member"] if least < 0.0 else []

    def make(
        self, *, replace: bool, also: Callable[[Soup, Mix, Path], object] = lambda *_: None
    ) -> tuple[dict[str, Any], list[str]]:
        """Write the mixes.

        Args:
            also: Writes more into the folder of a mix before that has its name.
            replace: Whether folders of their names are replaced, also those that appear meanwhile.

        Returns:
            For a single mix: what was made, for programs and for people. For a sweep nothing.

        Raises:
            ConfigError: If the method cannot mix the members.
            RunError: If a number of a mix is too large for float32; nothing is written then.
        """
        # Of a sweep each mix is computed twice: all of them before the first is written, and again
        # for its file, as all together may not fit the memory.
        for mix in self.mixes if len(self.mixes) > 1 else ():
            _mixed(mix, self.members, self.recipe)
        made = [_make(self, mix, replace=replace, also=also) for mix in self.mixes]
        return made[0] if self.mixes[0].share is None else ({}, [])


def prepare(
    names: Sequence[str],
    coefficients: Sequence[float],
    shares: Sequence[float] | None,
    output: str | None,
    recipe: Recipe,
) -> Soup:
    """Read and check the members of a soup, and choose where its mixes are written.

    Args:
        names: The members as typed: runs, checkpoints, LoRA files or folders, or `base`.
        coefficients: The share of each member in a single mix.
        shares: Along a sweep the shares of the first of two members; None for a single mix.
        output: The folder that the user named; None for the default.
        recipe: How the members are mixed.

    Raises:
        AlignPropError: As `files.locate` and `files.read`.
        ConfigError: If the members are of different base models or of different layers, one is a
            DoRA, or all are the base model.
    """
    if all(name == BASE for name in names):
        raise ConfigError("soup: all members are the base model: there is nothing to mix")
    # 1. The members. All are found before any is read, so that a mistyped name fails quickly.
    located = [None if name == BASE else files.locate(name, "soup") for name in names]
    members = [
        Member(name, found.label, files.read(found.file)) if found else Member(name, "base", None)
        for name, found in zip(names, located, strict=True)
    ]
    for member in members:
        if member.adapter is not None and is_dora(member.adapter.layers):
            raise ConfigError(
                f"soup: {member.adapter.file} is a DoRA: its update of a weight is no sum, so it "
                "can be neither mixed nor written for ComfyUI",
                hint="evaluate it, train it further with lora.init, or load it in diffusers",
            )
    _check_members([m.adapter for m in members if m.adapter is not None], recipe.allow_missing)
    # 2. The folders: one for a single mix, for a sweep one per share inside it.
    labels = [member.label for member in members]
    default = _default_name(labels, None if shares is not None else coefficients)
    folder = Path(default) if output is None else user_path(output, "--output")
    if shares is None:
        return Soup(members, folder, [Mix(folder, coefficients)], recipe)
    mixes = [Mix(folder / f"share-{share:g}", [share, 1.0 - share], share) for share in shares]
    return Soup(members, folder, mixes, recipe)


def _default_name(labels: list[str], coefficients: Sequence[float] | None) -> str:
    """Return the folder's name, soup-<label>-<share>-...; with two members the first share only."""
    # Cut off, since file systems allow 255 bytes in a name.
    if coefficients is None:
        return "-".join(["soup", *labels, "sweep"])[:200]
    if len(labels) == 2 and abs(sum(coefficients) - 1.0) < 1e-9:
        return f"soup-{labels[0]}-{labels[1]}-{coefficients[0]:g}"
    pairs = zip(labels, coefficients, strict=True)
    return "-".join(["soup", *(f"{label}-{share:g}" for label, share in pairs)])[:200]


def _check_members(adapters: Sequence[Adapter], allow_missing: bool) -> None:
    """Refuse LoRAs of different base models or of different layers."""
    # Comparing each with the first is enough: all have to agree with it.
    first = adapters[0]
    for other in adapters[1:]:
        # 1. By the fingerprints of the whole networks, where both files have one: the few layers of
        #    two LoRAs may have equal shapes by chance.
        prints = [a.header.get("alignprop.base_fingerprint") for a in (first, other)]
        if all(prints) and prints[0] != prints[1]:
            models = [a.header.get("alignprop.base_model", "unknown") for a in (first, other)]
            raise ConfigError(
                f"soup: different base models: {first.file} belongs to {models[0]}, "
                f"{other.file} to {models[1]}",
                hint="only LoRAs of the same base model can be mixed",
            )
        # 2. By the shapes of the layers, which any file has.
        difference = mixing.other_shape(first.layers, other.layers)
        if difference:
            raise ConfigError(
                f"{other.file}: {difference}", hint="members need the same base model"
            )
        lacking = mixing.missing(first.layers, other.layers)
        if lacking and not allow_missing:
            raise ConfigError(
                f"{other.file}: {lacking}",
                hint="they were trained with other lora.target_modules; with --allow-missing a "
                "member changes nothing in a layer that it lacks",
            )


def _make(
    soup: Soup, mix: Mix, *, replace: bool, also: Callable[[Soup, Mix, Path], object]
) -> tuple[dict[str, Any], list[str]]:
    """Mix the members, write the folder whole or not at all, and return what was made."""
    members, recipe = soup.members, soup.recipe
    # 1. The arithmetic.
    mixed = _mixed(mix, members, recipe)
    pairs = list(zip(members, mix.coefficients, strict=True))
    adapters = [member.adapter for member in members if member.adapter is not None]
    # 2. The header says what the mix is made of, with hashes, since files are renamed.
    made_of: list[dict[str, Any]] = [
        {"name": m.name, "sha256": m.adapter.sha256 if m.adapter else None, "coefficient": c}
        for m, c in pairs
    ]
    header = {
        "alignprop.version": __version__,
        "alignprop.merged_from": json.dumps(made_of),
        "alignprop.merged_by": json.dumps(asdict(recipe)),
        **_recorded(adapters),
    }
    weights, metadata = formats.packed(mixed.layers)
    prefix = adapters[0].prefix

    def save(folder: Path) -> None:
        if recipe.format == "comfyui":
            file, title = folder / LORA_FILE, mix.folder.name
            files.save_for_comfyui(file, mixed.layers, header, prefix=prefix, title=title)
        else:
            files.save(folder, weights, header, prefix=prefix, adapter_metadata=metadata)
        also(soup, mix, folder)

    write_whole(mix.folder, save, replace=replace)
    return _describe(mix.folder, made_of, mixed, recipe)


def _mixed(mix: Mix, members: Sequence[Member], recipe: Recipe) -> mixing.Mixed:
    """Return the mix of the members. The base model adds nothing."""
    pairs = zip(members, mix.coefficients, strict=True)
    present = [(m.adapter, c) for m, c in pairs if m.adapter is not None]
    try:
        return mixing.mix(
            [adapter.layers for adapter, _ in present],
            [c for _, c in present],
            recipe.method,
            rank=recipe.rank,
            density=0.5 if recipe.density is None else recipe.density,
            seed=recipe.seed,
        )
    except ValueError as error:
        raise ConfigError(f"soup: {error}", hint="the default method, exact, mixes any") from error


def _recorded(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return what the members record about their base model and how to sample with it."""
    header: dict[str, str] = {}
    for key in ("alignprop.base_model", "alignprop.base_fingerprint"):
        known = [a.header[key] for a in adapters if a.header.get(key)]
        header |= {key: known[0]} if known else {}
    # Of the member that says which model it is.
    named = next((a.header for a in adapters if a.header.get("alignprop.base_model")), {})
    if "alignprop.base_is_local" in named:
        header["alignprop.base_is_local"] = named["alignprop.base_is_local"]
    configs = [files.recorded_config(a.header, a.file) for a in adapters]
    config = next((c for c in configs if c is not None), None)
    if config is not None:
        # A soup was not trained: only the sections that evaluation reads are true of it.
        kept = {k: config[k] for k in ("model", "sample", "reward", "loss", "eval") if k in config}
        header["alignprop.config"] = json.dumps(kept, sort_keys=True)
    return header


def _describe(
    folder: Path, made_of: list[dict[str, Any]], mixed: mixing.Mixed, recipe: Recipe
) -> tuple[dict[str, Any], list[str]]:
    """Return what was made, for programs and for people."""
    file = folder / LORA_FILE
    ranks = sorted({factors.rank for factors in mixed.layers.values()})
    values: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "adapter": str(file.resolve()),
        "sha256": sha256(file),
        "members": made_of,
        "method": recipe.method,
        "error": mixed.error,
        "layers": len(mixed.layers),
        "ranks": ranks,
        "bytes": file.stat().st_size,
    }
    rank = " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))
    sources = " + ".join(f"{m['coefficient']:g} x {m['name']}" for m in made_of)
    lines = [
        f"soup     {sources}",
        f"adapter  {file}",
        f"{len(mixed.layers)} layers of rank {rank}, {file.stat().st_size / 2**20:.2f} MiB",
    ]
    if recipe.method in RANKED:
        lines.append(f"the rank leaves out {mixed.error:.2%} of the mix (relative L2 distance)")
    return values, lines
