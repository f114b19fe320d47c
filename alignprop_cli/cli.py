"""The command line: four commands, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from alignprop_cli import __version__
from alignprop_cli.commands import evaluate, score, soup, train
from alignprop_cli.console import Console
from alignprop_cli.errors import AlignPropError, Terminated, explained
from alignprop_cli.waiting import choose_waiting

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
    _prepare_streams()
    _catch_signals()
    choose_waiting()
    console = Console()
    try:
        app(arguments)
    except SystemExit as end:
        # Typer turns a closed pipe into exit code 1 by itself, and Ctrl+C and all other signals
        # into 130.
        hidden = end.__context__
        if isinstance(hidden, OSError) and hidden.errno == errno.EPIPE:
            _end_at_closed_pipe(hidden)
        if hidden is not None and isinstance(hidden.__cause__, KeyboardInterrupt):
            _end_by_signal(console, hidden.__cause__)
        raise
    except AlignPropError as error:
        if debug:
            traceback.print_exc()
        console.error(error)
        raise SystemExit(error.exit_code) from error
    # Training catches signals itself, to save first; elsewhere there is nothing to save.
    except KeyboardInterrupt as error:
        _end_by_signal(console, error)
    except BrokenPipeError as error:
        _end_at_closed_pipe(error)
    # The last resort: a bug, or a shortage that may come anywhere.
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = explained(error) or AlignPropError(
            f"unexpected {type(error).__name__}: {error}", hint=f"this is a bug; {ISSUES}"
        )
        console.error(known)
        raise SystemExit(known.exit_code) from error


def _prepare_streams() -> None:
    """Let any text be printed, whatever the encoding of the terminal or the pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _catch_signals() -> None:
    """Let the signals that end a program do so as Ctrl+C does, so that it cleans up."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated(number)

    # Handlers belong to the main thread, and `nohup` asks to ignore SIGHUP, which Windows lacks.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)


def _end_by_signal(console: Console, error: KeyboardInterrupt) -> NoReturn:
    """End as a program that a signal has ended, with a word about it."""
    number = error.number if isinstance(error, Terminated) else signal.SIGINT
    console.error(AlignPropError(f"interrupted by {signal.Signals(number).name}"))
    raise SystemExit(128 + number) from error


def _end_at_closed_pipe(error: OSError) -> NoReturn:
    """End as a program that SIGPIPE has ended: who read the output wants no more of it."""
    # Python flushes standard output at exit, and would complain about the pipe again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(128 + signal.SIGPIPE) from error


def _quieten_libraries() -> None:
    """Silence the warnings and progress bars of libraries; has to happen before their import."""
    warnings.simplefilter("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Else tokenizers warns whenever a process forks after it has used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
