"""What both sides of a comparison run in: a process of its own that answers in lines of JSON.

Imports nothing but torch, so that it also works where alignprop is not installed.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROMPTS = ("a photo of a cat", "a red dog")
RANK = 4
GUIDANCE = 7.5


@dataclass(frozen=True)
class Case:
    """What both sides of `step.py` compute a step of.

    Args:
        model: Folder in diffusers format.
        steps: T, network calls of one chain.
        batch_size: Images of a step.
        peer_batch: Images that TRL takes at once; the rest is accumulated.
        device: `cpu` or `cuda`.
        dtype: Of the frozen weights.
        threads: Of the processor.
    """

    model: str
    steps: int
    batch_size: int = 2
    peer_batch: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2

    def encoded(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_command_line() -> Case:
        case = Case(**json.loads(sys.argv[1]))
        torch.set_num_threads(case.threads)
        return case


def reward(images: torch.Tensor, prompts: object) -> torch.Tensor:
    """Return minus the mean squared distance from grey, shape (B,): next to no work."""
    return -((images - 0.5) ** 2).mean(dim=(1, 2, 3))


def lora_values(names: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, torch.Tensor]:
    """Return the same LoRA for both sides: a function of the names and shapes alone."""
    generator = torch.Generator().manual_seed(1234)
    values: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        drawn = torch.randn(names[name], generator=generator)
        values[name] = drawn / rank if ".lora_A." in name else 0.02 * drawn
    return values


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests from standard input until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request["command"]](**request["arguments"])
        print("answer " + json.dumps(answer), flush=True)


def versions(*packages: Any) -> dict[str, str]:
    """Return what a side runs on: packages, and the GPU if it sees one."""
    found = {package.__name__: package.__version__ for package in packages}
    if torch.cuda.is_available():
        found["on"] = torch.cuda.get_device_name()
    return found


def timed(step: Callable[[], object]) -> dict[str, float]:
    """Return the wall-clock and processor seconds of one step."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def turn(step: Callable[[], object], device: str) -> dict[str, float]:
    """Time one step between two of the other side; on a GPU also return its peak memory in GiB.

    There the other side finds the memory free, so a step that is not timed fills torch's cache
    first, as the steps before would have done in a training.
    """
    if device != "cuda":
        return timed(step)
    step()

    def finished() -> None:
        step()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = timed(finished)
    found["allocated"] = torch.cuda.max_memory_allocated() / 2**30
    found["reserved"] = torch.cuda.max_memory_reserved() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    return found


class Side:
    """The other end of `serve`.

    Args:
        python: Interpreter of the side's environment.
        script: That ends in `serve`.
        arguments: Of the script.
        environment: Variables of the process.
    """

    def __init__(
        self, python: str, script: Path, arguments: list[str], environment: dict[str, str]
    ) -> None:
        self._script = script.name
        self._process = subprocess.Popen(
            [python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a request and wait for its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
        stdin.flush()
        for line in stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        code = self._process.wait()
        raise RuntimeError(f"{self._script} ended with status {code}; see what it printed above")

    def kill(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def environment(threads: int, path: str | None = None, device: str = "cpu") -> dict[str, str]:
    """Return the variables of a side's process.

    Args:
        threads: Of the processor.
        path: PYTHONPATH of its packages; None is that of this process.
        device: On which it runs: with `cpu` it sees no GPU.
    """
    path = os.environ.get("PYTHONPATH", "") if path is None else path
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
    }


def write_model(name: str, folder: Path, device: str = "cpu") -> Path:
    """Write a model of random_models.py: `small`, `mid` or `sd-1.5`."""
    command = [sys.executable, str(HERE / "random_models.py"), name, str(folder)]
    subprocess.run(command, check=True, env=environment(os.cpu_count() or 1, device=device))
    return folder


class Report:
    """Lines that are printed as they come, and appended to a file where one is given.

    Args:
        title: The first line.
        output: The file.
    """

    def __init__(self, title: str, output: Path | None) -> None:
        self._output = output
        script = Path(sys.argv[0]).name
        command = " ".join(["python", f"tests/benchmarks/{script}", *sys.argv[1:]])
        self.add(f"# {title}", "", f"`{command}`", "")

    def add(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            if self._output is not None:
                with self._output.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def words(versions: Mapping[str, Any]) -> str:
    """Return names and versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def machine() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} logical cores)" if names else platform.machine()
