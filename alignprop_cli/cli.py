"""The command line: four commands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from alignprop_cli import __version__
from alignprop_cli.commands import evaluate, score, soup, train
from alignprop_cli.console import Console
from alignprop_cli.errors import AlignPropError, RunError, first_line

ISSUES = "please report it with the output of --debug"

app = typer.Typer(
    name="alignprop",
    help="Fine-tune text-to-image diffusion models by backpropagating a reward through sampling.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Each command imports what it needs when it runs, so that --help is quick.
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("soup")(soup.soup)
app.command("score")(score.score)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"alignprop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Fine-tune text-to-image diffusion models by backpropagating a reward through sampling."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        args: The arguments; None takes those of the process.
    """
    # Searched for by hand, since parsing itself may fail before it gets to --debug.
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    if not debug:
        _quieten_libraries()
    console = Console()
    try:
        app(arguments)
    except AlignPropError as error:
        if debug:
            traceback.print_exc()
        console.error(error)
        raise SystemExit(error.exit_code) from error
    # Training catches signals itself, to save first; elsewhere there is nothing to save.
    except KeyboardInterrupt as error:
        console.error(AlignPropError("interrupted"))
        raise SystemExit(130) from error
    # The last resort: a bug, or a shortage that may come anywhere.
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = _known(error)
        console.error(known)
        raise SystemExit(known.exit_code) from error


def _known(error: Exception) -> AlignPropError:
    """Return the error to show for an exception that nothing else has caught."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return RunError(
            f"the disk is full{where}",
            hint="checkpoints already written are whole; free some space and use --resume auto",
        )
    # By name: naming torch's own class would import torch.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return RunError(
            f"out of memory: {first_line(error)}",
            hint="set train.micro_batch=1, gradient.checkpoint_network=call and "
            "gradient.checkpoint_decoder=true, or a smaller sample.height and width",
        )
    return AlignPropError(
        f"unexpected {type(error).__name__}: {error}", hint=f"this is a bug; {ISSUES}"
    )


def _quieten_libraries() -> None:
    """Silence the warnings and progress bars of libraries; has to happen before their import."""
    warnings.simplefilter("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Else tokenizers warns whenever a process forks after it has used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
