"""What this machine has and how it computes: processes, memory, threads, precision."""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import platform
import resource
import sys
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator


def make_accelerator() -> Accelerator:
    """Return the device and the processes of this run.

    Without a GPU the CPU has to be asked for: only then do several processes join up on it.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    limit_threads()
    if accelerator.num_processes > 1:
        # Left to the interpreter's end, the backend's threads can take the process down with them.
        atexit.register(accelerator.end_training)
    return accelerator


def peak_gib(device: torch.device) -> float:
    """Return the largest memory so far in GiB: allocated on CUDA, resident set otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available(device: torch.device) -> tuple[int, str]:
    """Return the bytes that can still be had on a device, and where the figure comes from.

    On CUDA what the driver says is free; elsewhere the RAM that is available, or what the limit of
    the control group leaves, if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}"
    free, source = psutil.virtual_memory().available, "free RAM"
    for folder, limit, used, cache in _CGROUPS:
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that were read count as used, and are let go when memory is wanted.
            taken = int((folder / used).read_text()) - int(stat.get(cache, 0))
            left = max(int((folder / limit).read_text()) - taken, 0)
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        if left < free:
            free, source = left, "limit of the control group"
    return free, source


_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def limit_threads() -> None:
    """Use no more threads than the control group gives processors to.

    In a container torch counts the processors of the machine, and threads that share one wait for
    each other. What OMP_NUM_THREADS says is left alone.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), _processors(_CPU_LIMIT))))


_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def _processors(limit: Path) -> int:
    """Return how many processors a limit file allows: microseconds of work in a period of them."""
    try:
        work, period = limit.read_text().split()
        return math.ceil(int(work) / int(period))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return sys.maxsize


def keep_memory() -> None:
    """Let what one step frees be there for the next, where glibc hands out the RAM.

    Else large tensors go back to the kernel, which gives and clears their pages anew in every step
    (what that takes: tests/benchmarks/results/step_epyc-2-cores_202611.md). The process then holds
    on to the most memory that it needed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # No tensor is mapped by itself, to be unmapped when freed; the heap keeps its end.
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the frozen weights; `auto` depends on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def allow_tf32(dtype: torch.dtype) -> None:
    """Let a GPU multiply float32 numbers as TF32 where the network itself is coarser.

    That are the LoRA's and the rewards' products. TF32 keeps 10 bits of a number's digits, float16
    too, bfloat16 7. Beside a network in float32, which was asked for, everything stays float32.

    Args:
        dtype: Of the network.
    """
    coarser = dtype in (torch.bfloat16, torch.float16) and torch.cuda.is_available()
    torch.set_float32_matmul_precision("high" if coarser else "highest")
    torch.backends.cudnn.allow_tf32 = coarser
