"""Find the folder of the run to resume, and name and make that of a new run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.paths import user_path

RUNS = Path("runs")
"""The parent folder of runs without `--output`."""

LOCK = ".lock"
"""The file in a run folder that its process holds."""


def run_name(preset: str | None, config: object) -> str:
    """Return the name of a run, which is that of its preset or configuration file.

    For the configuration of another run it is the name of that run.

    Args:
        preset: Name of the preset.
        config: The file; anything else, such as its values, names nothing.
    """
    if not isinstance(config, str):
        return preset or "run"
    path = Path(config)
    return path.parent.name if path.name == "config.yaml" and path.parent.name else path.stem


def run_to_resume(
    resume: str | None,
    preset: str | None,
    config: object,
    output: str | None,
    checkpoint: str | None = None,
) -> Path | None:
    """Return the run that `--resume` means; None to start a new one.

    Args:
        resume: A run's folder, or `auto`: the newest run, or a new one if there is none.
        preset: The preset of a new run.
        config: The configuration of a new run; None for none.
        output: With `auto` the only folder that is looked at; None looks at all in runs/.
        checkpoint: Which checkpoint of the run is wanted; None is the newest.

    Raises:
        AssetError: If the folder is no run, or there is none and nothing says how to start one.
        ConfigError: If options for a new run are given together with the run to resume.
    """
    if checkpoint is not None and resume in (None, "auto"):
        raise ConfigError("--checkpoint goes with --resume and the folder of a run")
    if resume is None:
        return None
    if resume == "auto":
        return _newest_run(preset, config, output)
    # A named run has its own configuration. Some settings may change, by --set and single flags.
    for flag, value in (("--preset", preset), ("--config", config)):
        if value is not None:
            raise ConfigError(
                f"--resume and {flag} exclude each other: a run has its own config.yaml"
            )
    if output is not None:
        raise ConfigError("--resume and --output exclude each other: a run stays where it is")
    run = user_path(resume, "--resume")
    if not (run / "config.yaml").is_file():
        raise AssetError(
            f"--resume: {run} is not a run: config.yaml is missing",
            hint="give the folder that `alignprop train` printed, such as runs/tiny",
        )
    return run


def _newest_run(preset: str | None, config: object, output: str | None) -> Path | None:
    # With `auto` one command line starts a run and, after a crash, resumes it: for job schedulers.
    startable = preset is not None or config is not None
    if output is not None:
        run = user_path(output, "--output")
        runs = [run] if (run / "config.yaml").is_file() else []
    else:
        runs = _with_checkpoints(RUNS)
        if startable:
            # The names that `checkpoint.new_run` gives: name, name-2, name-3 ...
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
    # A run without a checkpoint has nothing to resume. The time is that of checkpoints/, since
    # evaluations change that of the run's folder.
    found = [
        folder
        for folder in parent.glob("*")
        if (folder / "config.yaml").is_file() and any((folder / "checkpoints").glob("step-*"))
    ]
    return sorted(found, key=lambda run: (run / "checkpoints").stat().st_mtime, reverse=True)


def new_run(wanted: str | None, name: str) -> Path:
    """Choose the folder of a new run; `make_run` makes it.

    Args:
        wanted: The folder that the user asked for; None is runs/<name>, or runs/<name>-2 and so on
            if that exists.
        name: Name of the preset or the config file.

    Raises:
        AssetError, ConfigError: If the wanted folder is no path, or exists and is not empty.
    """
    if wanted is not None:
        run = user_path(wanted, "--output")
        # An empty folder is fine: it may have been made for this run. So is one of hidden files
        # alone, which a run leaves that is killed at its beginning.
        full = run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir())
        if full or (run.exists() and not run.is_dir()):
            raise ConfigError(
                f"--output: {run} exists and is not empty",
                hint="choose another folder, remove it, or resume the run with --resume",
            )
        return run
    number = 1
    while (run := RUNS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return run


def make_run(wanted: str | None, name: str) -> Path:
    """Make the folder of a new run, which `new_run` chooses.

    Raises:
        AssetError, ConfigError: As `new_run`; also if it cannot be made.
    """
    while True:
        run = new_run(wanted, name)
        try:
            run.mkdir(parents=True, exist_ok=wanted is not None)
            return run
        except FileExistsError:
            # Another run has taken the number since.
            if wanted is not None:
                raise ConfigError(f"--output: {run} is a file, expected a folder") from None
        except OSError as error:
            raise ConfigError(f"--output: cannot make the folder {run}: {error}") from error


@contextmanager
def removed_if_empty(run: Path) -> Iterator[None]:
    """Remove the folder if the block fails before anything is written into it."""
    try:
        yield
    except BaseException:
        # rmdir fails, and should, if the folder is not empty.
        with suppress(OSError):
            run.rmdir()
        raise
