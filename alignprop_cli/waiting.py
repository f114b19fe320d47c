"""How threads wait for each other on the CPU, decided before torch is imported.

A thread that is done with its part of an operator spins for about a millisecond, since the next
operator mostly comes sooner. Where another process wants that core, the threads that still have
work wait for it: two cores, one busy process beside, and a run takes twice as long as it should.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

_STATISTICS = Path("/proc/stat")
# Looks at what runs, and seconds between them: something short must not count.
_LOOKS, _PAUSE = 4, 0.005
# Turns of GNU's OpenMP library; its own default is 300,000. docs/speed.md has the measurement.
_TURNS = "1000"


def choose_waiting(statistics: Path = _STATISTICS) -> None:
    """Let threads wait without a core where others run now, and spin for a short while elsewhere.

    Does nothing where the user has set one of OpenMP's own variables for this, and where the
    operating system isn't Linux (other builds of torch have other libraries for threads).

    Args:
        statistics: Linux's statistics of the kernel.
    """
    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return
    others = _others(statistics)
    if others is None:
        return
    if others > 0:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = _TURNS


def _others(statistics: Path) -> int | None:
    """Return how many threads of others run or want to, at least; None where nobody tells."""
    least: int | None = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE)
        try:
            found = re.search(r"^procs_running (\d+)$", statistics.read_text("ascii"), re.MULTILINE)
        except OSError:
            return None
        if found is None:
            return None
        # This one runs too.
        running = int(found[1]) - 1
        least = running if least is None else min(least, running)
        if least <= 0:
            break
    return least
