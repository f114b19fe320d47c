"""Which folder a run is resumed in, and what a new run is called."""

from __future__ import annotations

import re
from pathlib import Path

from alignprop_cli.errors import AssetError, ConfigError

RUNS = Path("runs")
"""Where runs go that have no folder of their own."""


def run_name(preset: str | None, config: str | None) -> str:
    """Return what a run is called: after its preset or configuration file.

    The configuration of another run has the name of that run.
    """
    if config is None:
        return preset or "run"
    path = Path(config)
    return path.parent.name if path.name == "config.yaml" and path.parent.name else path.stem


def run_to_resume(
    resume: str | None, preset: str | None, config: str | None, output: str | None
) -> Path | None:
    """Return the run that `--resume` means; None where a new one is to be started.

    Args:
        resume: A run's folder, or auto: the newest run, and a new one where there is none.
        preset: What a new run would be made of.
        config: Likewise.
        output: With auto the only folder that counts; None is any in runs/.

    Raises:
        AssetError: If the folder is no run, or there is none and nothing says how to start one.
        ConfigError: If a run is named together with what would start another one.
    """
    # A new run.
    if resume is None:
        return None
    if resume == "auto":
        return _newest_run(preset, config, output)
    # A run that is named is resumed as it was; only some settings may change, by --set and flags.
    for flag, value in (("--preset", preset), ("--config", config)):
        if value is not None:
            raise ConfigError(
                f"--resume and {flag} exclude each other: a run has its own config.yaml"
            )
    if output is not None:
        raise ConfigError("--resume and --output exclude each other: a run stays where it is")
    run = Path(resume).expanduser()
    if not (run / "config.yaml").is_file():
        raise AssetError(
            f"--resume: {run} is not a run: config.yaml is missing",
            hint="give the folder that `alignprop train` printed, such as runs/tiny",
        )
    return run


def _newest_run(preset: str | None, config: str | None, output: str | None) -> Path | None:
    # With auto the same command line starts a run and, after a crash, resumes it.
    startable = preset is not None or config is not None
    if output is not None:
        run = Path(output).expanduser()
        runs = [run] if (run / "config.yaml").is_file() else []
    else:
        runs = _with_checkpoints(RUNS)
        if startable:
            # As new runs of this name are called.
            name = re.escape(run_name(preset, config))
            runs = [run for run in runs if re.fullmatch(rf"{name}(-\d+)?", run.name)]
    if not runs and not startable:
        raise AssetError(
            f"--resume auto: there is no run in {output or f'{RUNS}/'} to resume",
            hint="with --preset or --config a new one is started",
        )
    return runs[0] if runs else None


def _with_checkpoints(parent: Path) -> list[Path]:
    """Return the runs in a folder that have a checkpoint, newest first."""
    # A run without a checkpoint has nothing to resume; its folder's time says nothing, since
    # evaluations are written there too.
    found = [
        folder
        for folder in parent.glob("*")
        if (folder / "config.yaml").is_file() and any((folder / "checkpoints").glob("step-*"))
    ]
    return sorted(found, key=lambda run: (run / "checkpoints").stat().st_mtime, reverse=True)
