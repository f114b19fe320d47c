"""Calls that several processes make: what the others do when the main one fails at its end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

# The main process fails after the others are done, as when its disk is full; its caller catches
# that and goes on. `%s` is what it does then.
SCRIPT = """
import os, sys, time
from alignprop_cli.api import functions
from alignprop_cli.device import make_accelerator
from alignprop_cli.errors import RunError
main = os.environ["RANK"] == "0"
for number in (0, 1):
    try:
        with functions._command(None, None, False) as (console, _):
            make_accelerator()
            if main:
                console.values = {"of": "main"}
                time.sleep(0.5)
            if main and number == 1:
                %s
        print(number, console.values, flush=True)
    except RunError as error:
        print(number, error.message, flush=True)
if main:
    time.sleep(300)
os._exit(0)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ("raise RunError('the disk is full')", "of this call failed: the disk is full"),
        ("raise KeyError('x')", "of this call failed: KeyError: 'x'"),
        ("os._exit(3)", "the main process of this call has ended"),
    ],
)
def test_the_others_end_when_the_main_process_fails_at_its_end(ends: str, told: str) -> None:
    # A KeyError is a bug, and passes.
    ends = f"try:\n                    {ends}\n                except KeyError as e:\n"
    ends = ends + "                    time.sleep(0)\n                    raise\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT % ends],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        # Both have to import torch; what is bounded is the wait after that.
        out, err = processes[1].communicate(timeout=120)
    finally:
        processes[0].kill()
        processes[0].communicate()
        processes[1].kill()
    lines = out.splitlines()
    assert lines[0] == "0 {'of': 'main'}", err
    assert lines[1].startswith("1 "), err
    assert told in lines[1]
