"""The machine: its processes, memory and threads, and the precision it computes in."""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast_object_list

# Of a card's memory, what a process takes beside its tensors. On an H200 the context took 0.52 GiB,
# and what libraries loaded while a step ran 0.14 more.
_BESIDE_TENSORS = 3 * 2**30 // 4


def make_accelerator() -> Accelerator:
    """Return the device and the processes of this run."""
    # Without a GPU `cpu=True` is needed: otherwise several processes do not form a group.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    limit_threads()
    if accelerator.num_processes > 1:
        # Ended explicitly: at interpreter exit the backend's threads may crash the process.
        atexit.register(accelerator.end_training)
    return accelerator


def is_first() -> bool:
    """Return whether this is the first of several processes, also before they have met."""
    return os.environ.get("RANK", "0") == "0"


def peak_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of CUDA since `forget_peak`, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    # Only imported here, since Windows has no such module.
    import resource

    # getrusage counts in kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak(device: torch.device) -> None:
    """Let `peak_gib` count from now on: from Python, a run may not be the first of its process.

    Only on CUDA; the peak of the resident set is that of the whole process.
    """
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)


def release_cached(device: torch.device) -> None:
    """Return the memory that torch keeps for later to the GPU; elsewhere nothing happens."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available(device: torch.device) -> tuple[int, str]:
    """Return the bytes that are free on a device, and where the number comes from.

    On CUDA it is the driver's number; elsewhere the available RAM, or what the limit of the control
    group leaves, if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}"
    free, source = psutil.virtual_memory().available, "free RAM"
    for folder, limit, used, cache in _CGROUPS:
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # The cache of files counts as used, but is given up when memory is needed.
            taken = int((folder / used).read_text()) - int(stat.get(cache, 0))
            left = max(int((folder / limit).read_text()) - taken, 0)
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        if left < free:
            free, source = left, "limit of the control group"
    return free, source


# Where a container's limit is, for versions 2 and 1 of control groups: folder, then the files of
# the limit and the usage, then the key of the file cache in memory.stat.
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
    """Use no more threads than the control group has processors; OMP_NUM_THREADS is respected."""
    # In a container torch counts the processors of the whole machine, and threads that share a
    # processor wait for each other.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), _processors(_CPU_LIMIT))))


_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def _processors(limit: Path) -> int:
    """Return how many processors a limit file allows."""
    # Two numbers: microseconds of work allowed in a period, and the length of the period.
    try:
        work, period = limit.read_text().split()
        return math.ceil(int(work) / int(period))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return sys.maxsize


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the kernel.

    The kernel would have to provide and clear the pages of large tensors again in every step (its
    cost: tests/benchmarks/results/step_epyc-2-cores_202611.md). The price is that the process keeps
    its peak memory until it ends.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # No tensor gets a mapping of its own, which would be unmapped when freed, and the end of
        # the heap is never given back.
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


def give_back_memory() -> None:
    """Undo `keep_memory`, for a process that goes on with something else."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # glibc's own values, which it does not tell.
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


# The numbers of M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def has_accelerator() -> bool:
    """Return whether this process has made an `Accelerator`; all that it makes share one state."""
    return bool(PartialState._shared_state)


def forget_accelerator() -> None:
    """Let the next `Accelerator` of this process choose its device anew; not among several."""
    if has_accelerator() and PartialState().num_processes == 1:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


def from_main(value: Any) -> Any:
    """Return what the main process passes here, in all processes."""
    # Among several processes this is a place where they meet.
    if not has_accelerator() or PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def hold_memory(device: torch.device, limit: int) -> None:
    """Let this process use no more than `limit` bytes of a GPU; elsewhere nothing is held.

    What torch allocates is held, to the limit less what a process has on a card besides: its
    context and the kernels that libraries load as they go. What other processes use does not count.
    """
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        # torch takes no device without a number, which the only one of a machine is.
        index = torch.cuda.current_device() if device.index is None else device.index
        share = min(max((limit - _BESIDE_TENSORS) / total, 0.0), 1.0)
        torch.cuda.set_per_process_memory_fraction(share, index)


def has_gpu() -> bool:
    """Return whether there is a GPU that torch can use."""
    return torch.cuda.is_available()


def set_deterministic(device: torch.device, *, wanted: bool) -> None:
    """Choose between kernels that repeat bit for bit and the fastest ones.

    On a GPU an operator without a deterministic kernel then raises a RuntimeError when it is used.
    """
    on_gpu = device.type == "cuda"
    if wanted and on_gpu:
        # cuBLAS is only repeatable with a workspace of a fixed size, which it reads when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The backward pass of these two attention kernels is not; flash attention's is.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted, warn_only=not on_gpu)
    # By default every new tensor is filled then, which finds reads of memory that nobody wrote. It
    # cost 968 launches in one call of SD 1.5's network on a GPU.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the frozen weights; `auto` depends on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # float16 only on older cards, which emulate bfloat16 slowly: it overflows and needs loss
        # scaling.
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has else torch.float16
    return torch.float32


def allow_tf32(dtype: torch.dtype) -> None:
    """Let a GPU multiply float32 matrices in TF32 if the network has a lower precision anyway.

    This concerns the products of the LoRA and the rewards. TF32 has 10 bits of mantissa, as
    float16; bfloat16 has 7. With a network in float32 everything stays in float32.

    Args:
        dtype: Precision of the network.
    """
    coarser = dtype in (torch.bfloat16, torch.float16) and torch.cuda.is_available()
    torch.set_float32_matmul_precision("high" if coarser else "highest")
    torch.backends.cudnn.allow_tf32 = coarser
