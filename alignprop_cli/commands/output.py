"""Where a command may write a folder: not over what is somebody else's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from alignprop_cli.errors import ConfigError
from alignprop_cli.paths import reason
from alignprop_cli.storage import locked

EVALUATION = (
    r"results\.(json|csv)|report\.html|(sheet|curve)\.png",
    r"images/[^/]+/\d{4,}\.png",
    r"tensorboard/events\.out\.tfevents\.[^/]+",
    # Of `--layout`.
    r"geneval/[^/]+/\d{5,}/(metadata\.jsonl|samples/\d{4,}\.png)",
    r"geneval2/(geneval2_data\.jsonl|[^/]+/(images\.json|\d{5,}\.png))",
    r"hpsv2/[^/]+/([a-z-]+/)?\d{5,}\.jpg",
)
"""The files that an evaluation writes into its folder, as regular expressions."""

_HINT = "choose another place with --output, or give --overwrite"


def check_output(
    folder: Path, *, overwrite: bool, ours: Sequence[str], sign: str | None = None
) -> None:
    """Refuse to replace a folder, unless asked to and nothing in it is foreign.

    Args:
        folder: Where the result is to be written.
        overwrite: Whether the user agreed to replace what is there.
        ours: Regular expressions for the files that the command itself writes into such a folder.
        sign: One of these that a result always has.

    Raises:
        ConfigError: If it is a file, is not empty and `overwrite` is not given, holds anything but
            `ours` or lacks the sign, or if nothing can be written there.
    """
    if folder.exists():
        if not folder.is_dir():
            raise ConfigError(f"--output: {folder} is a file, expected a folder", hint=_HINT)
        inside = _files(folder)
        if inside and not overwrite:
            raise ConfigError(f"--output: {folder} exists and is not empty", hint=_HINT)
        # Replacing removes the folder, so it must not hold anything that is not ours.
        foreign = [name for name in inside if not any(re.fullmatch(one, name) for one in ours)]
        hint = "choose another folder with --output, or remove it yourself"
        if foreign:
            what = f"holds {foreign[0]}, which --overwrite would remove"
            raise ConfigError(f"--output: {folder} {what}", hint=hint)
        if inside and sign is not None and sign not in inside:
            what = f"has no {sign}, so it is no result that --overwrite may replace"
            raise ConfigError(f"--output: {folder} {what}", hint=hint)
    _check_writable(folder)


@contextmanager
def claimed(
    folder: Path, *, overwrite: bool, ours: Sequence[str], sign: str | None = None
) -> Iterator[None]:
    """Check a folder as `check_output` does, and let no other alignprop write it in the block.

    Raises:
        ConfigError: As `check_output`; also if another process is writing the folder.
    """
    check_output(folder, overwrite=overwrite, ours=ours, sign=sign)
    # One of several processes writes, and takes the lock for all.
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_name(f".{place.name[:100]}.lock"), f"--output: {folder}"):
        # Another may have written it between the check and the lock.
        check_output(folder, overwrite=overwrite, ours=ours, sign=sign)
        yield


def _files(folder: Path) -> list[str]:
    """Return the files in a folder and in those inside it, and links, relative and sorted."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [str((Path(place) / name).relative_to(folder)) for name in (*files, *links)]
    return sorted(found)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made. Better now than after hours of sampling."""
    # It is written beside the old one and renamed. So the folder around it counts, of what is
    # there already, and the only sure way to know is to make something there.
    around = folder.resolve().parent
    while not around.exists():
        around = around.parent
    try:
        # By a name that is swept, should this process be killed just now.
        with TemporaryDirectory(prefix=f".{folder.name[:100]}-", suffix=".unfinished", dir=around):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output: {folder} cannot be written: {around}: {reason(error)}", hint=_HINT
        ) from error
