"""A process that has imported everything, and forks a child for every command.

Starting Python and importing torch takes seconds, forking takes milliseconds. Every command still
has a process of its own: its own exit code, streams, limits and signals, and nothing of one is seen
by the next. Nothing that the program reads or builds is kept but what the texts of the shipped
presets say.

The processes of pytest-xdist share it. It speaks JSON, a line each, over a socket to each of them,
and ends with the last:

    to it      {"id", "args", "cwd", "seconds", "before": [["module:function", arguments], ...]}
    from it    {"id", "pid"}, and at the end {"id", "status", "seconds", "peak", "late"}
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import hashlib
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Args:
        code: As a shell has it: the exit code, or 128 + N where signal N ended the process.
        out: Standard output.
        err: Standard error.
        seconds: How long a processor worked on it.
        peak: Most memory that it had, in MiB.
        late: Whether it was killed since it took too long.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: float
    late: bool


class Running:
    """A command that runs. Use `Warm.start`."""

    def __init__(self, warm: Warm, number: int, pid: int, streams: Path) -> None:
        self.pid = pid
        self._warm, self._number, self._streams = warm, number, streams

    def ended(self) -> bool:
        """Return whether it has ended."""
        return self._warm.has_ended(self._number)

    def err(self) -> str:
        """Return what it has written to standard error so far."""
        return self._read("err")

    def wait(self) -> Ended:
        """Wait for its end."""
        reply = self._warm.wait_for(self._number)
        status = reply["status"]
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        out, err = self._read("out"), self._read("err")
        for name in ("out", "err"):
            self._streams.with_suffix(f".{name}").unlink()
        return Ended(code, out, err, reply["seconds"], reply["peak"], reply["late"])

    def _read(self, name: str) -> str:
        data = self._streams.with_suffix(f".{name}").read_bytes()
        return data.decode("utf-8", "surrogateescape")


class Warm:
    """The process, as its user sees it.

    Args:
        streams: A folder for what the commands print.
        shared: A folder; those who name the same one use the same process. None: none do.
    """

    def __init__(self, streams: Path, shared: Path | None = None) -> None:
        self._streams, self._number = streams, 0
        streams.mkdir(parents=True, exist_ok=True)
        self._started: dict[int, int] = {}
        self._ended: dict[int, dict[str, Any]] = {}
        # So that ~ is nobody's.
        self._home = streams / "home"
        self._home.mkdir(exist_ok=True)
        place = shared or streams
        # A name that is no file, whose path would have to be short.
        address = f"\0alignprop-{hashlib.sha256(str(place).encode()).hexdigest()[:32]}"
        self._channel = socket.socket(socket.AF_UNIX)
        with (place / "warm.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._channel.connect(address)
            except ConnectionRefusedError:
                self._begin(address)
                self._channel.connect(address)

    def _begin(self, address: str) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "NO_COLOR": "1",
            "COLUMNS": "100",
            "HOME": str(self._home),
            "PYTHONPATH": str(ROOT),
        }
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(listener.fileno())],
                cwd=ROOT,
                env=environment,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def start(
        self,
        args: Sequence[str],
        cwd: Path,
        *,
        seconds: float = 120.0,
        before: Sequence[Sequence[Any]] = (),
        stdin: Path | None = None,
        leave: bool = False,
    ) -> Running:
        """Start `alignprop` with these arguments.

        Args:
            args: Its arguments.
            cwd: The working folder.
            seconds: When to kill it.
            before: `module:function` with arguments, called in the child before the program.
            stdin: The file that is standard input; None is empty.
            leave: Whether processes that it leaves behind live on, for a test that looks for them.
        """
        self._number += 1
        number, streams = self._number, self._streams / f"{self._number}"
        job: dict[str, Any] = {
            "id": number,
            "args": list(args),
            "cwd": str(cwd),
            "seconds": seconds,
            "before": [list(call) for call in before],
            "stdin": str(stdin or os.devnull),
            "streams": str(streams),
            "home": str(self._home),
            "leave": leave,
        }
        self._channel.sendall(json.dumps(job).encode() + b"\n")
        while number not in self._started:
            self._take()
        return Running(self, number, self._started.pop(number), streams)

    def run(self, *args: Any, cwd: Path, **options: Any) -> Ended:
        """Run `alignprop` with these arguments to its end."""
        return self.start([str(arg) for arg in args], cwd, **options).wait()

    def close(self) -> None:
        """End what was started, and with the last of those who share it the process."""
        # At the end of its input it kills what is running for us.
        self._channel.close()

    def has_ended(self, number: int) -> bool:
        """Return whether a command has ended."""
        while select.select([self._channel], [], [], 0)[0]:
            self._take()
        return number in self._ended

    def wait_for(self, number: int) -> dict[str, Any]:
        """Return the last message about a command."""
        while number not in self._ended:
            self._take()
        return self._ended.pop(number)

    def _take(self) -> None:
        # A byte at a time from the socket, so that select() sees what is left.
        line = b""
        while not line.endswith(b"\n"):
            byte = self._channel.recv(1)
            if not byte:
                raise RuntimeError("the process that starts the commands has ended")
            line += byte
        reply = json.loads(line)
        if "pid" in reply:
            self._started[reply["id"]] = reply["pid"]
        else:
            self._ended[reply["id"]] = reply


def serve(listener: socket.socket) -> None:
    """Start commands for those who connect, until the last has closed its channel."""
    _import_everything()
    channels = {listener.accept()[0]: b""}  # what of a line has come
    running: dict[int, tuple[socket.socket, int, int, float]] = {}  # pidfd: ..., id, pid, deadline
    late, leaving = set[int](), set[int]()  # of pids
    while channels:
        waits = [end - time.monotonic() for _, _, _, end in running.values()]
        timeout = max(0.0, min(waits)) if waits else None
        ready, _, _ = select.select([listener, *channels, *running], [], [], timeout)
        # 1. Commands that are over, or take too long.
        for handle, (channel, number, pid, end) in list(running.items()):
            if handle not in ready and time.monotonic() > end:
                late.add(pid)
                _kill(pid)
                ready.append(handle)
            if handle not in ready:
                continue
            _, status, usage = os.wait4(pid, 0)
            if pid not in leaving:
                _kill(pid)  # what it has left in its session
            os.close(handle)
            del running[handle]
            reply = {"id": number, "status": status, "late": pid in late}
            reply |= {"seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1024}
            late.discard(pid)
            leaving.discard(pid)
            _send(channel, reply)
        # 2. New ones.
        for channel in [channel for channel in channels if channel in ready]:
            data = channel.recv(65536)
            if not data:
                _end(channel, running)
                del channels[channel]
                continue
            *lines, channels[channel] = (channels[channel] + data).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    for each in (listener, *channels):
                        each.close()
                    _child(job)
                if job["leave"]:
                    leaving.add(pid)
                end = time.monotonic() + job["seconds"]
                running[os.pidfd_open(pid)] = (channel, job["id"], pid, end)
                _send(channel, {"id": job["id"], "pid": pid})
        # 3. New channels.
        while select.select([listener], [], [], 0)[0]:
            channels[listener.accept()[0]] = b""


def _end(channel: socket.socket, running: dict[int, tuple[socket.socket, int, int, float]]) -> None:
    """Kill what runs for a channel that is closed."""
    for handle, (its, _, pid, _) in list(running.items()):
        if its is channel:
            _kill(pid)
            os.waitpid(pid, 0)
            os.close(handle)
            del running[handle]
    channel.close()


def _send(channel: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever does not listen any more is seen to be gone later
        channel.sendall(json.dumps(message).encode() + b"\n")


def _kill(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _child(job: Mapping[str, Any]) -> None:
    """Be a process that was started with some arguments; never returns."""
    code = 70
    try:
        # 1. What a shell sets up.
        os.setsid()
        os.environ["HOME"] = job["home"]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        reading = os.open(job["stdin"], os.O_RDONLY)
        os.dup2(reading, 0)
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            os.dup2(os.open(f"{job['streams']}.{name}", flags, 0o644), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(job["cwd"])
        sys.argv = ["alignprop", *job["args"]]
        # Else the usage would be that of `python -m tests.warm`.
        sys.modules["__main__"].__package__ = None
        # 2. What the test wants to happen.
        for name, *arguments in job["before"]:
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)(*arguments)
        # 3. The program, and what Python does at its end.
        from alignprop_cli.cli import main

        try:
            main(job["args"])
            code = 0
        except SystemExit as end:
            code = _code(end.code)
        threading._shutdown()
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = 120
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _code(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def _import_everything() -> None:
    import alignprop_cli
    from alignprop_cli import cli

    cli._quieten_libraries()
    for found in pkgutil.walk_packages(alignprop_cli.__path__, "alignprop_cli."):
        if not found.name.startswith("alignprop_cli.tiny.make") and "__main__" not in found.name:
            importlib.import_module(found.name)
    # What is imported where it is first used.
    for name in (
        "matplotlib.pyplot",
        "open_clip",
        "pyarrow.parquet",
        "scipy.stats",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.schedulers.scheduling_ddim",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.tokenization_clip",
        "torch._dynamo",
        "peft",
        "diffusers.guiders",
        "diffusers.schedulers",
        "kornia",
        "matplotlib.backends.backend_agg",
        "plotly.offline",
        "transformers.models.aimv2",
    ):
        importlib.import_module(name)
    # A table of a library, of a thousand patterns, that it makes for the first model it loads.
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("clip_text_model")
    from alignprop_cli.config import presets

    for name in presets.names():
        presets.read(presets.preset_path(name), presets.Layers())
    # Matplotlib looks for its fonts when it draws for the first time.
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.subplots().plot([0.0, 1.0])
    figure.savefig(io.BytesIO())
    # What every child has anyway need not be searched for garbage by each.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
