"""What this program writes: whole or not at all, on the disk before it counts, by one at a time."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignprop_cli.errors import AssetError, ConfigError, RunError

try:
    import fcntl
except ImportError as error:
    # Everything that writes comes here, from the command line and from Python.
    raise AssetError(
        "alignprop runs on Linux and macOS: this system has no POSIX file locks (fcntl)",
        hint="on Windows install it in WSL",
    ) from error

# What names of temporary folders and files end in, and how much of the final name they keep.
_SUFFIX = ".unfinished"
_LONGEST = 100
# Seconds after which a temporary file counts as left behind.
_OLD = 60.0
# Of a fingerprint: what belongs to a model, bytes of a block, and blocks of a file.
_MODEL_FILES = {".safetensors", ".bin", ".json", ".txt", ".model"}
_BLOCK, _SAMPLED = 2**16, 256
# Of Linux's renameat2.
_NO_REPLACE, _EXCHANGE = 1, 2
_HERE = -100  # AT_FDCWD
# What a file system answers that has no locks, or a kernel that has no such renaming.
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)


def write_whole(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` fill a temporary folder, then give it the name `path`.

    At every moment there is the old folder or the new one, also after a power cut. What killed
    processes have left of such folders is removed.

    Args:
        path: The folder. Where it is a link, what it points to is written.
        write: Called with the temporary folder.
        replace: Whether a folder of this name is replaced.

    Raises:
        ConfigError: If there is one and `replace` is false.
        OSError: From the operating system; nothing is left then.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    # In the same parent: renaming works within one file system only.
    made = tempfile.mkdtemp(prefix=f".{path.name[:_LONGEST]}-", suffix=_SUFFIX, dir=path.parent)
    temporary = Path(made)
    # Held while it is filled: what nobody holds was left by a process that is gone.
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write(temporary)
        # mkdtemp and safetensors make what only the owner can read.
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644 if file.is_file() else 0o755)
        _sync_below(temporary)
        _exchange(temporary, path, replace=replace)
        _sync(path.parent)
    finally:
        os.close(handle)
        # After an exchange this is the old folder, or a file that had the name.
        if temporary.is_file():
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder whole or not at all: a killed process leaves no half of it.

    Raises:
        OSError: From the operating system.
    """
    # Under this name it is what `sweep` removes.
    unnamed = folder.with_name(f".{folder.name[:_LONGEST]}-{os.getpid()}{_SUFFIX}")
    folder.rename(unnamed)
    shutil.rmtree(unnamed)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id, since several processes may write the same file.
    temporary = path.with_name(f".{path.name[:_LONGEST]}-{os.getpid()}{_SUFFIX}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(parent: Path, name: str | None = None, *, is_ours: bool = False) -> None:
    """Remove the temporary folders and files that killed processes have left in a folder.

    Args:
        parent: The folder.
        name: Of what they were to become; None sweeps all.
        is_ours: Whether nobody else writes there now, since this process holds its lock. If not,
            only files that were left some time ago are removed.
    """
    start = ".+" if name is None else re.escape(name[:_LONGEST])
    for left in parent.glob(f".*{_SUFFIX}"):
        if not re.fullmatch(rf"\.{start}-[a-z0-9_]+{re.escape(_SUFFIX)}", left.name):
            continue
        if left.is_dir() and _is_free(left):
            shutil.rmtree(left, ignore_errors=True)
        # A text is written in no time. (By its age, since another machine may be writing it.)
        elif left.is_file() and (is_ours or time.time() - left.stat().st_mtime > _OLD):
            left.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock while the block runs; when this process ends, however it ends, it is free.

    Args:
        file: The lock, made and removed here; its folder must exist.
        what: What is being written, for the message.

    Raises:
        ConfigError: If another process holds it.
    """
    handle = _lock(file, what)
    try:
        yield
    finally:
        if handle is not None:
            # Removed while it is held, or it might be another process's by now.
            file.unlink(missing_ok=True)
            os.close(handle)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse a big write that the disk has no space for, before it begins.

    Args:
        folder: Existing, on that disk.
        needed: Bytes.
        what: What is written, for the message.

    Raises:
        RunError: If there is less space.
    """
    free = shutil.disk_usage(folder).free
    # A little more: headers, small files, blocks.
    if free < needed + needed // 100 + 2**20:
        raise RunError(
            f"{folder.parent}: {what} needs {needed / 2**30:.2f} GiB, and the disk has "
            f"{free / 2**30:.2f} GiB left",
            hint="make room, or choose another disk with --output",
        )


def sha256(file: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Return a hash that tells whether a file, or a model's file in a folder, is another one now.

    Large files are sampled: weights of many gigabytes that were trained on differ everywhere.
    """
    hashed = hashlib.sha256()
    below = (p for p in path.rglob("*") if p.suffix in _MODEL_FILES and p.is_file())
    files = [path] if path.is_file() else sorted(below)
    for file in files:
        size = file.stat().st_size
        hashed.update(f"{'' if file == path else file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            # The whole file, or blocks at equal distances and the last one.
            stride = max(size // _SAMPLED, _BLOCK)
            for start in (*range(0, size, stride), max(size - _BLOCK, 0)):
                opened.seek(start)
                hashed.update(opened.read(_BLOCK))
    return hashed.hexdigest()


def _lock(file: Path, what: str) -> int | None:
    """Return the handle of a lock; None where the file system has no locks."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the file after it was opened here.
            if file.stat().st_ino != os.fstat(handle).st_ino:
                os.close(handle)
                continue
        except FileNotFoundError:
            os.close(handle)
            continue
        except BlockingIOError as error:
            owner = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            who = f" (process {owner})" if owner.isdigit() else ""
            raise ConfigError(
                f"{what}: another alignprop{who} is writing it",
                hint="wait for it, or choose another place with --output",
            ) from error
        except OSError as error:
            os.close(handle)
            if error.errno in _NOT_SUPPORTED:
                file.unlink(missing_ok=True)
                return None
            raise
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        return handle


def _exchange(made: Path, path: Path, *, replace: bool) -> None:
    """Give `made` the name `path`; what had it gets the other name, where it may be replaced."""
    try:
        _rename(made, path, _NO_REPLACE)
        return
    except FileExistsError as error:
        # An empty folder holds nothing that could be lost.
        if not replace and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path} has appeared meanwhile", hint="choose another place with --output"
            ) from error
    _rename(made, path, _EXCHANGE)


def _rename(source: Path, target: Path, flag: int) -> None:
    """Rename as Linux's renameat2 does; in two steps where there is no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag) == 0:
            return
        number = ctypes.get_errno()
        if number not in _NOT_SUPPORTED:
            raise OSError(number, os.strerror(number), str(target))
    # Elsewhere a folder cannot be exchanged in one call: there is a moment without either.
    if flag == _NO_REPLACE:
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
        return
    old = source.with_name(f"{source.name}.old")
    target.rename(old)
    source.rename(target)
    old.rename(source)


def _sync_below(folder: Path) -> None:
    """Bring a folder and all in it to the disk, so that its new name never comes before it."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    if sys.platform == "win32":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder.
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(handle)


def _is_free(folder: Path) -> bool:
    """Return whether no process is filling a temporary folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
