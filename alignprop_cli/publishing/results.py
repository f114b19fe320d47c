"""The end of a command whose result leaves this machine: card, exports, upload.

The result itself is on the disk before any of it begins, and stays there whatever fails.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.device import is_first
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError, explained
from alignprop_cli.lora import files
from alignprop_cli.lora.files import BEST, LORA_FILE
from alignprop_cli.lora.tensor_file import save_tensors
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text
from alignprop_cli.publishing import export, push, shared
from alignprop_cli.publishing.card import Card
from alignprop_cli.publishing.request import (
    CARD,
    EXPORT,
    HUB,
    IMAGES,
    UPLOAD,
    Kind,
    Published,
    Request,
)
from alignprop_cli.storage import sweep, write_text, write_whole

# Of the header of a LoRA file, what diffusers reads.
_DIFFUSERS = ("format", "lora_adapter_metadata")


def check(request: Request, *, dora: bool = False, model: ModelConfig | None = None) -> None:
    """Refuse what cannot be done, before anything is trained, sampled or mixed.

    Raises:
        AlignPropError: As `export.check` and `push.check`.
    """
    export.check(request.exports, dora=dora, model=model)
    # Last, as it asks the hub.
    if request.hub_id is not None:
        push.check(request.hub_id)


def write_card(folder: Path, card: Card, images: Path | None = None) -> Path:
    """Write the card beside an adapter.

    Args:
        folder: That of the adapter.
        card: What it says.
        images: Images for it.

    Returns:
        The file.
    """
    # What a process left that was killed while it wrote the card. This one holds the lock of the
    # run or of the soup, so that nobody else writes it now.
    sweep(folder, CARD, is_ours=True)
    write_text(folder / CARD, card.text("THIS-FOLDER", _relative(images, folder)))
    return folder / CARD


def publish(
    request: Request,
    adapter: Path,
    model: ModelConfig | None,
    folder: Path,
    title: str,
    card: Card | None = None,
    images: Path | None = None,
) -> Published:
    """Write the exports, and upload.

    Args:
        request: What is asked for.
        adapter: The LoRA file.
        model: The base model, for merged models.
        folder: Of the result; exports go there.
        title: Name of the result.
        card: Uploaded with the adapter.
        images: Images for the card.
    """
    values: dict[str, Any] = {}
    lines: list[str] = []
    try:
        # 1. Files for other programs.
        if request.exports:
            made = export.write(request.exports, files.read(adapter), model, folder, title)
            values["exports"] = {one.kind: str(one.path.resolve()) for one in made}
            lines += [f"export   {one.path}{f' ({one.note})' if one.note else ''}" for one in made]
        # 2. The hub: first a folder here, from which it can be tried again.
        if request.hub_id is not None:
            assert card is not None
            _prepare(folder / HUB, adapter, card, images, request.hub_id)
            told = _upload(request.hub_id, folder)
            values |= told.values
            lines += told.lines
    # The result is on the disk and still to be shown, so nothing is raised here that can be told.
    except (AlignPropError, OSError, RuntimeError, MemoryError, SafetensorError) as error:
        failure = error if isinstance(error, AlignPropError) else explained(error)
        if failure is None:
            raise  # a bug
        return Published(values, lines, failure)
    return Published(values, lines)


def _upload(hub_id: str, folder: Path) -> Published:
    """Upload what lies prepared in the folder of a result, and note there that it has arrived."""
    _note_upload(folder, hub_id, None)
    address = push.upload(hub_id, folder / HUB)
    _note_upload(folder, hub_id, address)
    return Published({"hub": address}, [f"hub      {address} (private, if it is new)"])


def _note_upload(folder: Path, hub_id: str, address: str | None) -> None:
    values = {"id": hub_id, "address": address}
    write_text(folder / UPLOAD, json.dumps(values) + "\n")


def _upload_of(folder: Path) -> tuple[str | None, bool]:
    """Return for which id an upload was prepared, and whether it has arrived there."""
    try:
        found = read_json(read_text(folder / UPLOAD, "hub"))
        return str(found["id"]), found["address"] is not None
    # None was begun, or by an earlier version.
    except (AssetError, ParseError, LookupError, TypeError):
        return None, False


def catch_up(request: Request, run: Path, *, dora: bool) -> Published:
    """Return what was asked of a run that is done; upload what was prepared and has not arrived.

    Args:
        request: What is asked for.
        run: A run that has done all its steps.
        dora: As in `refuse_unpublished`.

    Raises:
        AssetError: If the upload fails again.
        ConfigError: As `refuse_unpublished`.
    """
    prepared, has_arrived = _upload_of(run)
    refuse_unpublished(request, run, dora=dora)
    if request.hub_id is None or prepared != request.hub_id or has_arrived:
        return Published()
    # Of several processes one uploads, and the others have nothing to say.
    return _upload(request.hub_id, run) if is_first() else Published({"hub": None})


def refuse_unpublished(request: Request, run: Path, *, dora: bool) -> None:
    """Refuse to call a run done that lacks what is asked for.

    Args:
        request: What is asked for.
        run: A run that has done all its steps.
        dora: Whether its adapter is a DoRA, which `soup` does not take.

    Raises:
        ConfigError: With the command that makes what is missing.
    """
    exports: tuple[Kind, ...] = tuple(
        kind for kind in request.exports if not (run / EXPORT / kind).is_dir()
    )
    # What is prepared for another id says so in its card.
    prepared = (run / HUB).is_dir() and _upload_of(run)[0] == request.hub_id
    hub_id = None if prepared else request.hub_id
    missing = Request(exports, hub_id)
    if missing.is_empty:
        return
    # Where the guard has stopped the run its best checkpoint is the result, which has the card.
    best, last = run / "checkpoints" / BEST, files.checkpoints(run)
    is_last = bool(last) and (last[-1] / CARD).is_file()
    adapter = shlex.quote(str(best if (best / CARD).is_file() and not is_last else last[-1]))
    command = f"alignprop {'evaluate' if dora else 'soup'} {adapter}{missing.words}"
    # `evaluate` uploads nothing.
    known = not (dora and hub_id)
    raise ConfigError(
        f"{run}: the run has done all its steps, but lacks what{missing.words} asks for",
        hint=command if known else None,
    )


def _prepare(folder: Path, adapter: Path, card: Card, images: Path | None, hub_id: str) -> None:
    """Write a folder with what is uploaded and nothing else, so that it can be looked at."""
    found = files.read_header(adapter)
    header = {key: found[key] for key in _DIFFUSERS if key in found} | shared.header(found)

    def write(made: Path) -> None:
        # Written again rather than copied, since its header goes with it.
        save_tensors(made / LORA_FILE, load_file(adapter), header)
        text = card.text(hub_id, None if images is None else IMAGES)
        (made / CARD).write_text(text, encoding="utf-8")
        if images is not None:
            shutil.copyfile(images, made / IMAGES)

    write_whole(folder, write)


def _relative(images: Path | None, folder: Path) -> str | None:
    """Return the path of the images from the folder of the card."""
    if images is None:
        return None
    # As a link: a blank or a bracket would end it.
    return quote(Path(os.path.relpath(images.resolve(), folder.resolve())).as_posix())
