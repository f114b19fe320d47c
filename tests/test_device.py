"""What the machine has: threads within the control group's limit, precision of products, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from alignprop_cli import device as machine


@pytest.mark.parametrize(
    ("limit", "processors"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", sys.maxsize)],
)
def test_the_processors_of_a_control_group_are_counted(
    tmp_path: Path, limit: str, processors: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit + "\n", encoding="utf-8")
    assert machine._processors(file) == processors


def test_without_a_control_group_there_is_no_limit(tmp_path: Path) -> None:
    assert machine._processors(tmp_path / "nothing") == sys.maxsize


@pytest.mark.parametrize(("wanted", "threads"), [(None, "1"), ("2", "2")])
def test_threads_follow_the_limit_unless_they_are_given(
    tmp_path: Path, wanted: str | None, threads: str
) -> None:
    """In a process of its own: the number of threads is the whole process's."""
    file = tmp_path / "cpu.max"
    file.write_text("100000 100000\n", encoding="utf-8")
    script = (
        "import sys, pathlib, torch; from alignprop_cli import device as machine; "
        "machine._CPU_LIMIT = pathlib.Path(sys.argv[1]); machine.limit_threads(); "
        "print(torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {} if wanted is None else {"OMP_NUM_THREADS": wanted}
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == threads


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("4096", "1096", 3200), ("4096", "4396", 0), ("4096", "4096", 200), ("max", "4096", None)],
)
def test_the_limit_of_a_control_group_counts_and_files_that_were_read_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, used: str, left: int | None
) -> None:
    for name, text in (("memory.max", limit), ("memory.current", used)):
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    (tmp_path / "memory.stat").write_text("anon 3896\nfile 300\ninactive_file 200\n")
    monkeypatch.setattr(
        machine, "_CGROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),)
    )
    size, source = machine.available(torch.device("cpu"))
    if left is None:
        assert source == "free RAM"
        assert 0 < size <= psutil.virtual_memory().total
    else:
        assert (size, source) == (left, "limit of the control group")


@pytest.mark.parametrize(
    ("dtype", "gpu", "precision"),
    [
        (torch.float32, True, "highest"),
        (torch.bfloat16, True, "high"),
        (torch.float16, True, "high"),
        (torch.bfloat16, False, "highest"),
    ],
)
def test_tf32_is_for_a_gpu_beside_a_network_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gpu: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    try:
        machine.allow_tf32(dtype)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is (precision == "high")
    finally:
        machine.allow_tf32(torch.float32)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_freed_by_a_step_is_there_for_the_next(kept: bool) -> None:
    """In a process of its own: what malloc does is the whole process's."""
    script = (
        "import resource, torch\n"
        "from alignprop_cli import device as machine\n"
        f"{'machine.keep_memory()' if kept else ''}\n"
        "def step():\n"
        "    tensors = [torch.ones(1 << 24) for _ in range(4)]\n"  # of 64 MiB
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "faults = [step() for _ in range(12)]\n"  # the first five may find no gap of the right size
        "print(faults[-1] - faults[-2])\n"
    )
    # Whoever runs the tests may have set malloc up already.
    own = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    pages = 4 * (1 << 26) / resource.getpagesize()
    assert (int(done.stdout) < pages / 100) is kept


def test_on_windows_the_peak_is_that_of_the_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Windows:
        def memory_info(self) -> object:
            return type("Info", (), {"peak_wset": 3 * 2**30})()

    monkeypatch.setattr(machine.sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", Windows)
    # There is no such module there.
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_gib(torch.device("cpu")) == 3.0


def test_the_module_needs_nothing_that_windows_lacks() -> None:
    # What it imports has been imported: on Linux others do need it.
    code = "import accelerate, psutil, sys, torch; sys.modules['resource'] = None\n"
    code += "import alignprop_cli.device"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_peak_of_a_gpu_is_counted_from_the_beginning_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What torch does: the peak falls to what is allocated then.
    bytes_now, peak, begun = 2 * 2**30, [10 * 2**30], [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[-1])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: peak.append(bytes_now)
    )
    gpu = torch.device("cuda", 0)
    assert machine.peak_gib(gpu) == 10.0
    # Where no GPU is in use yet there is nothing to forget, and torch would raise.
    machine.forget_peak(gpu)
    begun.append(True)
    machine.forget_peak(torch.device("cpu"))
    assert machine.peak_gib(gpu) == 10.0
    machine.forget_peak(gpu)
    assert machine.peak_gib(gpu) == 2.0


def test_only_a_gpu_has_memory_to_release(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(None))
    machine.release_cached(torch.device("cpu"))
    assert not released
    machine.release_cached(torch.device("cuda", 0))
    assert len(released) == 1


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_limit_is_held_without_the_number_of_the_card_and_beside_other_processes(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # torch's own function runs; only what asks the driver is replaced. Another process has 60 GiB.
    held: list[tuple[float, int]] = []
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda *given: held.append(given), raising=False
    )
    machine.hold_memory(torch.device(name), 16 * 2**30)
    # Three quarters of a GiB are for the context.
    assert held == [(pytest.approx(15.25 / 80.0), 1 if name == "cuda:1" else 0)]
