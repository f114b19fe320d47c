"""Paths that come from outside: from the command line, a configuration, or the header of a file."""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path

from alignprop_cli.errors import AssetError, ConfigError

MOST_TEXT = 256 * 2**20
"""Most bytes of a text file; larger ones are refused before they are read."""

# What a text may begin with, longest first: UTF-32's mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def user_path(name: str, where: str) -> Path:
    """Return a path with ~ expanded. Asking whether it exists cannot fail afterwards.

    Args:
        name: As the user or a file has it.
        where: The option or key, for messages.

    Raises:
        AssetError: If this user may not look at it.
        ConfigError: If it can be no path: empty, too long, with a NUL, the home of nobody.
    """
    if not name:
        raise ConfigError(f"{where}: expected a path, got an empty text")
    path = Path(name)
    try:
        path = path.expanduser()
        status = path.stat()
        # Else whatever is looked for inside would raise.
        if stat.S_ISDIR(status.st_mode) and not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError):
        # Whoever asks says what is missing.
        return path
    except OSError as error:
        kind = AssetError if error.errno in (errno.EACCES, errno.EPERM, errno.EIO) else ConfigError
        raise kind(f"{where}: {_short(name)}: {reason(error)}") from error
    # expanduser: no such user. stat: a NUL, or half of a surrogate pair.
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}: {_short(name)}: is no path: {error}") from error
    return path


def read_bytes(path: Path, where: str, *, most: int = MOST_TEXT) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        AssetError: If it is missing, larger, cannot be read, or is no regular file: reading a pipe
            or a device may never end.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise AssetError(f"{where}: {path} is {kind}, expected a file")
        if status.st_size > most:
            raise AssetError(
                f"{where}: {path} has {status.st_size / 2**20:.0f} MiB; "
                f"at most {most / 2**20:.0f} are read"
            )
        # One byte more than it may have: it may grow, and some have no size, as those of /proc.
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise AssetError(f"{where}: cannot read {path}: {reason(error)}") from error
    if len(data) > most:
        raise AssetError(f"{where}: {path} has more than {most / 2**20:.0f} MiB")
    return data


def read_text(path: Path, where: str, *, most: int = MOST_TEXT) -> str:
    """Return the text of a file: UTF-8, or what its byte order mark says.

    Raises:
        AssetError: As `read_bytes`, and if it is not such a text.
    """
    data = read_bytes(path, where, most=most)
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    try:
        return data[len(mark) :].decode(_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        raise AssetError(
            f"{where}: {path} is not UTF-8: byte {error.start} is {data[error.start]:#04x}",
            hint="save it as UTF-8",
        ) from error


def reason(error: Exception) -> str:
    """Return what an error says, without the number and the file name of the operating system."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:100]}... ({len(name)} characters)"
