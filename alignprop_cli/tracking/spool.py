"""What a run and the processes of its trackers share: a folder that each side writes files in.

    job.json          who the run is, written once
    feed.jsonl        what it tells, one event a line
    0000-00.png ...   images that events name
    end               written last: how the run ended
    running-NAME      there while the process of the tracker NAME runs
    left              there once the run waits for none of them any more
    NAME.json         what the tracker NAME has done, unless the job names another place

Files rather than a pipe: a run never waits for a reader, and a reader that is late loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignprop_cli.errors import AlignPropError
from alignprop_cli.parsing import read_json
from alignprop_cli.paths import read_text

JOB, FEED, END, LEFT = "job.json", "feed.jsonl", "end", "left"


@dataclass(frozen=True)
class Job:
    """Who a run is.

    Args:
        kind: `train` or `evaluate`.
        name: Its name, unless the tracker's environment names it.
        project: Its project; None leaves it to the tracker's environment.
        run_name: The name that the user has chosen; None for none.
        tags: Its tags.
        config: The complete configuration, as plain values.
        folder: Its folder: TensorBoard writes into it.
        states: Where the trackers' states are kept from one start to the next; None for nowhere.
        resumed: The step at which a resumed run goes on; 0 for a new one.
    """

    kind: str
    name: str
    project: str | None
    run_name: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    folder: str
    states: str | None = None
    resumed: int = 0

    def write(self, spool: Path) -> None:
        """Write it into a folder."""
        (spool / JOB).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, spool: Path) -> Job:
        """Read it from a folder."""
        # Written by this program a moment ago, so that it is not checked.
        values = json.loads((spool / JOB).read_text(encoding="utf-8"))
        return cls(**{**values, "tags": tuple(values["tags"])})


@dataclass
class State:
    """What a tracker has done, written by its process.

    Args:
        nonce: A random text, made when the run was new.
        step: The last step that was sent.
        taken: Events of this start that it has worked through.
        lost: Events among them that the tracker did not take.
        url: Where the run can be seen; None where that is not known.
        error: Why the last lost event was lost, or the tracker has ended; secrets are masked.
        done: Whether all was sent and closed.
    """

    nonce: str = field(default_factory=lambda: os.urandom(16).hex())
    step: int = 0
    taken: int = 0
    lost: int = 0
    url: str | None = None
    error: str | None = None
    done: bool = False

    def write(self, file: Path) -> None:
        """Write it whole or not at all; not synced, since nothing depends on it."""
        temporary = file.with_name(f".{file.name}-{os.getpid()}.unfinished")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(file)

    @classmethod
    def read(cls, file: Path) -> State:
        """Read it; a new one where there is none that can be read."""
        try:
            # Within bounds and from a regular file: a pipe would keep the run waiting for ever.
            found = read_json(read_text(file, "trackers", most=10_000))
            # It may be somebody else's: plain values of the right kind, or nothing.
            return cls(
                str(found["nonce"])[:100],
                int(found["step"]),
                url=_text(found.get("url")),
                error=_text(found.get("error")),
                taken=int(found["taken"]),
                lost=int(found["lost"]),
                done=found["done"] is True,
            )
        except (AlignPropError, OSError, ArithmeticError, ValueError, LookupError, TypeError):
            return cls()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def running(spool: Path, tracker: str) -> Path:
    """Return the file that is there while the process of a tracker runs."""
    return spool / f"running-{tracker}"


def state_file(spool: Path, job: Job, tracker: str) -> Path:
    """Return the file of a tracker's state."""
    return (spool if job.states is None else Path(job.states)) / f"{tracker}.json"


def identity(job: Job, nonce: str) -> str:
    """Return the id of a run at its trackers, which nobody can choose.

    It is a hash of where the run is and of a random text. A folder from elsewhere may hold any
    random text, but there is none that gives the id of another run of the user's.
    """
    # Resolved: the same folder has one name.
    where = str(Path(job.folder).resolve())
    return hashlib.sha256(f"{nonce}\0{where}".encode()).hexdigest()[:20]
