"""The options of `train` that say which GPUs to plan for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from alignprop_cli.errors import ConfigError

GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", help="use at most this: 12GB; with --dry-run of any GPUs: 12GB,24GB"
    ),
]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", help="plan for this card: rtx4090, ...; with --dry-run only")
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=1, help="plan for so many; with --dry-run only")
]


def checked(
    dry_run: bool, gpu_memory: str | None, gpu: str | None, gpus: int | None
) -> dict[str, Any]:
    """Return the GPUs to plan for; refuse a real run for GPUs of another machine."""
    sizes = () if gpu_memory is None else tuple(gpu_memory.split(","))
    if len(sizes) > 1 and (gpu is not None or not dry_run):
        raise ConfigError(
            f"--gpu-memory: {len(sizes)} sizes are compared by --dry-run alone, without --gpu",
            hint="give one size",
        )
    # Else a run would be planned for cards that this machine does not have.
    for flag, value in (("--gpu", gpu), ("--gpus", gpus)):
        if value is not None and not dry_run:
            raise ConfigError(
                f"{flag} plans for GPUs that need not be here: it goes with --dry-run"
            )
    if gpus is not None and gpu_memory is None and gpu is None:
        raise ConfigError("--gpus needs to know which: give --gpu-memory or --gpu as well")
    if gpu_memory is not None and not dry_run:
        from alignprop_cli.device import has_gpu

        if not has_gpu():
            raise ConfigError(
                "--gpu-memory: there is no GPU here",
                hint="with --dry-run it plans for one elsewhere; train.memory_limit limits the RAM",
            )
    return {"gpu_memory": sizes, "gpu": gpu, "gpus": gpus}
