"""What happens to a command of a test: called in its process before it begins."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Audit events that change something on the disk, with the places of paths among their arguments.
_CHANGES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (0, 1),
    "os.symlink": (0, 1),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
}
# Of these, the place of the handle of the folder that a path is relative to. A folder that is there
# already is not made, what is gone is not removed: after a kill nothing tells before from behind.
_HANDLE = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def die_at(number: int, below: str, log: str) -> None:
    """Kill this process before its N-th change to files below a folder.

    Args:
        number: N, counted from 1; 0 never.
        below: The folder.
        log: A file that gets the name of every change.
    """
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    own = os.getpid()
    done = 0

    def change(what: str) -> None:
        nonlocal done
        # Processes of its own, as those that decode pictures, change nothing.
        if os.getpid() != own:
            return
        done += 1
        os.write(lines, f"{done} {what}\n".encode("utf-8", "replace"))
        if done == number:
            os.kill(own, signal.SIGKILL)

    def is_below(path: Any) -> bool:
        if isinstance(path, int):
            # After a file was removed its handle leads to another name.
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return False
        return os.path.abspath(os.fsdecode(path)).startswith(below)  # noqa: PTH100

    def is_nothing(event: str, arguments: tuple[Any, ...]) -> bool:
        if event not in _HANDLE:
            return False
        handle = arguments[_HANDLE[event]]
        try:
            os.stat(arguments[0], dir_fd=None if handle == -1 else handle, follow_symlinks=False)
        except OSError:
            return event != "os.mkdir"
        return event == "os.mkdir"

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if path is not None and flags & _WRITING and is_below(path):
                change(f"open {path}")
        elif event in _CHANGES:
            paths = [arguments[place] for place in _CHANGES[event]]
            if any(is_below(path) for path in paths) and not is_nothing(event, arguments):
                change(f"{event} {' '.join(map(str, paths))}")

    sys.addaudithook(heard)

    # What Python does not tell: calls of the C library, safetensors' own file, and the disk.
    from alignprop_cli import storage

    def told(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            change(f"{name} {args[0] if args else ''}"[:200])
            return function(*args, **kwargs)

        return call

    replace(storage._rename, told(storage._rename, "exchange"))
    os.fsync = told(os.fsync, "fsync")
    import safetensors.torch

    serialize = safetensors.torch.serialize_file

    def halves(*args: Any, **kwargs: Any) -> Any:
        change(f"safetensors {args[1]}")
        done = serialize(*args, **kwargs)
        # A moment with half of the file: before it is opened again.
        data = Path(args[1]).read_bytes()
        os.truncate(args[1], len(data) // 2)
        Path(args[1]).write_bytes(data)
        return done

    safetensors.torch.serialize_file = halves


def signal_at(number: int, name: str, nth: int = 1, again: int = 0) -> None:
    """Send this process a signal when it calls a function for the N-th time.

    Args:
        number: The signal.
        name: `module:function`, or `module:class.method`.
        nth: N, counted from 1.
        again: A further signal that follows at once; 0 is none.
    """
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                for each in (number, again):
                    if each:
                        os.kill(os.getpid(), each)
            return function(*args, **kwargs)

        return call

    _wrap(name, wrap)


def wait_at(name: str, flag: str, nth: int = 1) -> None:
    """Wait in the N-th call of a function for a file; meanwhile `<flag>.there` exists."""
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                Path(f"{flag}.there").touch()
                while not Path(flag).exists():
                    time.sleep(0.01)
            return function(*args, **kwargs)

        return call

    _wrap(name, wrap)


def run_at(name: str, command: str, nth: int = 1) -> None:
    """Run a command of the shell when a function is called for the N-th time."""
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.system(command)
            return function(*args, **kwargs)

        return call

    _wrap(name, wrap)


def _wrap(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, last = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    function = getattr(owner, last)
    if classes:
        setattr(owner, last, wrap(function))
    else:
        replace(function, wrap(function))


def replace(old: Any, new: Any) -> None:
    """Replace a function in every module of the program that knows it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("alignprop_cli"):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


def limit(**limits: int) -> None:
    """Set limits of the operating system by their names: FSIZE, AS, in bytes."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def limit_files(size: int) -> None:
    """Let no file become longer than this many bytes."""
    limit(FSIZE=size)


def limit_memory(size: int) -> None:
    """Let this process have at most this many bytes of addresses."""
    limit(AS=size)


def obey_permissions() -> None:
    """Let permissions of files count for this process, also where it is root's.

    Root may read and write everything only by capabilities, which a process can give up.
    """
    if os.geteuid() != 0:
        return
    # Version 3 of the interface: two words each of effective, permitted and inheritable ones.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def become(user: int) -> None:
    """Give up being root for another user."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
