"""Where TRL's side of a comparison finds its packages: an environment of its own, or a folder.

TRL 0.22.2 is the last release that has AlignPropTrainer; these versions work together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

PACKAGES = (
    "trl==0.22.2",
    "torch==2.13.0",
    "diffusers==0.39.0",
    "transformers==4.57.6",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "huggingface_hub==0.36.2",
    "datasets==5.0.1",
    "numpy==2.4.6",
)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options that `python_and_path` reads."""
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(tempfile.gettempdir()) / name,
        help="where TRL's environment is, or will be made",
    )
    parser.add_argument(
        "--peer-path",
        metavar="PATH",
        help="PYTHONPATH with TRL's packages for this interpreter, instead of --environment",
    )


def python_and_path(
    arguments: argparse.Namespace, packages: Sequence[str] = PACKAGES
) -> tuple[str, str]:
    """Return the interpreter of TRL's side and the PYTHONPATH of its packages."""
    if arguments.peer_path is not None:
        return sys.executable, arguments.peer_path
    folder: Path = arguments.environment
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python), ""
