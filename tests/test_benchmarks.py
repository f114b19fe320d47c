"""Published prompt sets: what is asked of the hub and of GitHub, and what is kept of it.

Their texts are others', so the tests have files of the same form.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from alignprop_cli import benchmarks
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.prompts import SETS, count_prompts, hashes, load_entries, load_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a test cow"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two test cows"},
]


class GitHub:
    """A server in place of raw.githubusercontent.com, with what it has and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        # Bytes after which the connection ends.
        self.most = 10**9


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GitHub]:
    found = GitHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            data = found.files.get(self.path)
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write((data or b"")[: found.most])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(benchmarks, "GITHUB", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, github: GitHub, data: bytes) -> None:
    """Put a small file in the place of GenEval's, with its own hash."""
    source = benchmarks.PUBLISHED["geneval"][0]
    digest = hashlib.sha256(data).hexdigest()
    small = replace(source, prompts=2, sha256=digest, size=len(data))
    monkeypatch.setattr(benchmarks, "PUBLISHED", {**benchmarks.PUBLISHED, "geneval": (small,)})
    github.files[f"/{source.commit}/{source.file}"] = data


def groups(name: str) -> dict[str, str]:
    """Return the group of each prompt of a set that has one."""
    return {entry.prompt: entry.group for entry in load_entries(name) if entry.group}


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_set_of_github_is_downloaded_once(
    monkeypatch: pytest.MonkeyPatch, github: GitHub
) -> None:
    publish(monkeypatch, github, lines(GENEVAL))
    assert load_prompts("geneval") == ["a test cow", "two test cows"]
    assert groups("geneval") == {"a test cow": "single_object", "two test cows": "counting"}
    assert [dict(entry.values) for entry in load_entries("geneval")] == GENEVAL
    source = benchmarks.PUBLISHED["geneval"][0]
    assert hashes("geneval") == {source.address: source.sha256}
    commit = source.commit
    assert github.asked == [f"/{commit}/prompts/evaluation_metadata.jsonl"]
    # What the file has become on this disk is noticed, and put right.
    path = benchmarks.fetch(benchmarks.PUBLISHED["geneval"][0])
    path.write_bytes(path.read_bytes().replace(b"cow", b"dog"))
    assert load_prompts("geneval") == ["a test cow", "two test cows"]
    assert len(github.asked) == 2
    assert [file.name for file in path.parent.iterdir()] == ["evaluation_metadata.jsonl"]
    # And no network is needed any more.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(load_prompts("geneval")) == 2


@pytest.mark.parametrize("change", ["other", "longer", "cut", "empty"])
def test_a_file_that_is_not_the_published_one_is_refused_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, github: GitHub, tmp_path: Path, change: str
) -> None:
    data = lines(GENEVAL)
    publish(monkeypatch, github, data)
    (place,) = github.files
    sent = {"other": data.replace(b"two", b"ten"), "longer": data + b"x", "cut": data[:-9]}
    github.files[place] = sent.get(change, b"")
    with pytest.raises(AssetError, match="is not the file that was published"):
        load_prompts("geneval")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_connection_that_ends_too_early_is_not_taken_for_another_file(
    monkeypatch: pytest.MonkeyPatch, github: GitHub, tmp_path: Path
) -> None:
    data = lines(GENEVAL)
    publish(monkeypatch, github, data)
    github.most = 40
    with pytest.raises(AssetError, match=rf"the answer is cut short: 40 of {len(data)} bytes"):
        load_prompts("geneval")
    assert not list(tmp_path.rglob("*"))
    github.most = 10**9
    assert len(load_prompts("geneval")) == 2


def test_a_set_that_is_not_there_and_not_cached_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, github: GitHub
) -> None:
    with pytest.raises(AssetError, match=r"cannot load http://127\S+/prompts/\S+: HTTP Error 404"):
        load_prompts("geneval")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(github.asked)
    with pytest.raises(AssetError, match="not in the cache and the hub cannot be") as told:
        load_prompts("geneval2")
    assert "local copy" in (told.value.hint or "")
    assert len(github.asked) == asked


def test_the_sets_of_the_hub_are_read_by_their_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {
        # As published: Notepad's dialect of TSV, with quotes around what holds quotes.
        "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\nan atom\tAbstract\tBasic\t\n"
        '"the word ""HI"" on a wall"\tOutdoor Scenes\tComplex\ta note\n',
        "benchmark/drawbench.json": json.dumps(["A red test.", "A blue test."]),
    }
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, file: str, *, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        path = tmp_path / Path(file).name
        path.write_text(files[file], encoding="utf-8")
        return str(path)

    monkeypatch.setattr(benchmarks, "hf_hub_download", download)
    assert load_prompts("parti") == ["an atom", 'the word "HI" on a wall']
    assert set(groups("parti").values()) == {"Abstract", "Outdoor Scenes"}
    assert load_prompts("drawbench") == ["A red test.", "A blue test."]
    assert set(asked) == {
        ("nateraw/parti-prompts", "PartiPrompts.tsv", "dataset"),
        ("zhwang/HPDv2", "benchmark/drawbench.json", "dataset"),
    }


def test_published_sets_are_counted_without_a_network() -> None:
    assert count_prompts(["geneval"]) == 553
    assert count_prompts(["geneval2", "parti", "drawbench", "hpd"]) == 800 + 1632 + 200 + 3200
    assert {"geneval", "geneval2", "drawbench", "parti", "hpd", "hpd:photo"} <= set(SETS)
    with pytest.raises(ConfigError, match="Did you mean 'geneval'"):
        load_prompts("genevl")


def test_a_local_copy_of_a_published_set_has_its_groups(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(GENEVAL))
    assert set(groups(str(tmp_path / "a.jsonl")).values()) == {"single_object", "counting"}
    rows = [{"prompt": f"{n} atoms", "atom_count": n, "skills": []} for n in (3, 10)]
    (tmp_path / "b.jsonl").write_bytes(lines(rows))
    assert list(groups(str(tmp_path / "b.jsonl")).values()) == ["03 atoms", "10 atoms"]
    # Of a group only a text or a number makes a name.
    (tmp_path / "c.jsonl").write_bytes(lines([{"prompt": "x", "tag": ["1girl", "solo"]}]))
    assert groups(str(tmp_path / "c.jsonl")) == {}
    (tmp_path / "d.tsv").write_text("prompt\tgroup\nlonely\n\t\na cat\tpets\tmore\n")
    assert groups(str(tmp_path / "d.tsv")) == {"a cat": "pets"}
    assert [entry.number for entry in load_entries(str(tmp_path / "d.tsv"))] == [0, 2]
