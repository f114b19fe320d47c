"""Run many random inputs through the command line, and count how it ends.

    python -m tests.fuzz.run --count 20000 --seed 0 --workers 2
    python -m tests.fuzz.run --domain loras --seed 0 --number 17     one again, with what it printed

Failures are kept in a folder each: the files, and command.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import assets, law
from tests.fuzz.domains import DOMAINS
from tests.warm import Ended, Warm


@dataclass(frozen=True)
class Result:
    """What came of one input.

    Args:
        domain: The kind of input.
        number: Which one.
        args: The command.
        ended: How it ended.
        broken: Which law it has broken; None where all hold.
    """

    domain: str
    number: int
    args: list[str]
    ended: Ended
    broken: str | None

    def __str__(self) -> str:
        end = self.ended.err.strip()[-600:]
        return f"{self.domain} {self.number}: {self.broken}: alignprop {self.args!r}\n{end}"


def plan(count: int) -> list[tuple[str, int]]:
    """Return so many inputs, by domain and number, in an order that mixes the domains."""
    found = [
        (domain, number)
        for domain, (_, share) in DOMAINS.items()
        for number in range(max(1, round(share * count)))
    ]
    # By how far each is through its domain.
    sizes = Counter(domain for domain, _ in found)
    return sorted(found, key=lambda each: each[1] / sizes[each[0]])


def try_one(
    warm: Warm, made: assets.Assets, place: Path, domain: str, seed: int, number: int
) -> Result:
    """Make an input in a folder that does not exist yet, and run its command there."""
    place.mkdir(parents=True)
    args = DOMAINS[domain][0](Random(f"{domain} {seed} {number}"), place, made)
    before = law.hidden(place)
    ended = warm.run(*args, cwd=place, seconds=law.PATIENCE, before=[LIMIT])
    return Result(domain, number, args, ended, law.broken(args, ended, before, place))


# Above what the law allows, so that more is seen as such; far more would harm the machine.
LIMIT = ("tests.crash.hooks:limit_memory", 12 * 2**30)


def _work(
    wanted: Sequence[tuple[str, int]], seed: int, folder: Path, made: assets.Assets, keep: Path
) -> Iterator[Result]:
    warm = Warm(folder / "streams")
    try:
        for domain, number in wanted:
            place = folder / f"{domain}-{number}"
            result = try_one(warm, made, place, domain, seed, number)
            if result.broken:
                _keep(result, place, keep / f"{domain}-{seed}-{number}")
            shutil.rmtree(place, ignore_errors=True)
            yield result
    finally:
        warm.close()


def _keep(result: Result, place: Path, target: Path) -> None:
    # Pipes and links as they are: reading a pipe would wait.
    target.mkdir(parents=True, exist_ok=True)
    described = {
        "args": result.args,
        "broken": result.broken,
        "code": result.ended.code,
        "seconds": result.ended.seconds,
        "peak": result.ended.peak,
        "out": result.ended.out[-5000:],
        "err": result.ended.err[-20000:],
    }
    text = json.dumps(described, indent=1)
    (target / "command.json").write_text(text, encoding="utf-8", errors="replace")
    for path in place.rglob("*"):
        if path.is_file() and path.stat().st_size < 2**20:
            copy = target / "files" / path.relative_to(place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _in_process(queue: object, *arguments: object) -> None:
    try:
        for result in _work(*arguments):  # type: ignore[arg-type]
            queue.put(result)  # type: ignore[attr-defined]
    finally:
        queue.put(None)  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--domain", choices=DOMAINS)
    parser.add_argument("--number", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        warm = Warm(folder / "streams")
        made = assets.make(warm, folder / "assets")
        if options.number is not None:
            place = folder / "place"
            one = try_one(warm, made, place, options.domain, options.seed, options.number)
            print(one, one.ended.out, one.ended, sep="\n")
            if one.broken:
                _keep(one, place, options.output / f"{one.domain}-{options.seed}-{one.number}")
            return int(one.broken is not None)
        warm.close()
        wanted = [each for each in plan(options.count) if options.domain in (None, each[0])]
        results: list[Result] = []
        # What has been tried counts, also where somebody has had enough.
        with contextlib.suppress(KeyboardInterrupt):
            results.extend(_all(wanted, options, folder, made))
    print(_table(results))
    return int(any(result.broken for result in results))


def _all(
    wanted: Sequence[tuple[str, int]],
    options: argparse.Namespace,
    folder: Path,
    made: assets.Assets,
) -> Iterator[Result]:
    queue = multiprocessing.get_context("spawn").Queue()
    workers = [
        multiprocessing.get_context("spawn").Process(
            target=_in_process,
            args=(
                queue,
                wanted[n :: options.workers],
                options.seed,
                folder / f"w{n}",
                made,
                options.output,
            ),
        )
        for n in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    left, done, started = len(workers), 0, time.monotonic()
    while left:
        result = queue.get()
        if result is None:
            left -= 1
            continue
        done += 1
        if result.broken:
            print(result, flush=True)
        if done % 500 == 0:
            print(f"{done} of {len(wanted)}, {time.monotonic() - started:.0f} s", flush=True)
        yield result


def _table(results: Sequence[Result]) -> str:
    codes = sorted({result.ended.code for result in results})
    lines = [["inputs", "count", *map(str, codes), "broken", "mean s", "longest s", "most MiB"]]
    for domain in (*DOMAINS, "all"):
        here = [r for r in results if domain in (r.domain, "all")]
        if not here:
            continue
        counts = Counter(r.ended.code for r in here)
        lines.append(
            [
                domain,
                str(len(here)),
                *(str(counts[code]) for code in codes),
                str(sum(r.broken is not None for r in here)),
                f"{sum(r.ended.seconds for r in here) / len(here):.2f}",
                f"{max(r.ended.seconds for r in here):.1f}",
                f"{max(r.ended.peak for r in here):.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
