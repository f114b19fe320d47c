"""Random inputs to the command line: the fixed few of every run of the tests.

`nox -s fuzz` tries many more. What has failed once is in corpus.py, and is tried first.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import assets, law
from tests.fuzz.corpus import CORPUS, Example
from tests.fuzz.domains import DOMAINS
from tests.fuzz.run import LIMIT, plan, try_one
from tests.warm import Warm

COUNT = 80
SEED = 1


@pytest.fixture(scope="module")
def made(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> assets.Assets:
    return assets.make(warm, tmp_path_factory.mktemp("made") / "assets")


@pytest.mark.parametrize("example", CORPUS, ids=lambda example: example.name)
def test_what_has_failed_once_holds(
    warm: Warm, made: assets.Assets, tmp_path: Path, example: Example
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    args = example.make(place, made)
    before = law.hidden(place)
    ended = warm.run(*args, cwd=place, seconds=law.PATIENCE, before=[LIMIT])
    assert law.broken(args, ended, before, place) is None, ended.err
    assert ended.code in example.codes, ended.err
    assert example.says in ended.err


@pytest.mark.long
@pytest.mark.parametrize("domain", DOMAINS)
def test_random_inputs_end_as_documented(
    warm: Warm, made: assets.Assets, tmp_path: Path, domain: str
) -> None:
    numbers = [number for name, number in plan(COUNT) if name == domain]
    results = [try_one(warm, made, tmp_path / str(n), domain, SEED, n) for n in numbers]
    broken = [str(result) for result in results if result.broken]
    assert not broken, "\n\n".join(broken)
