"""The folders of `--layout`, read as the official scorers read them.

Each reader below is written from what that scorer's code asks of the file system; hpsv2's own is
run where there is one. The prompts are the test's, in the published form.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignprop_cli import benchmarks
from alignprop_cli.commands.output import EVALUATION
from alignprop_cli.errors import ConfigError
from alignprop_cli.evaluation import layouts
from alignprop_cli.evaluation.compare import Evaluation, Identity
from alignprop_cli.evaluation.draw import Samples, choose_samples
from alignprop_cli.evaluation.results import image_path
from alignprop_cli.evaluation.scorers import Layout
from alignprop_cli.evaluation.sheet import save_image
from alignprop_cli.prompts import Entry, load_entries

HPSV2 = os.environ.get("ALIGNPROP_HPSV2", "")

GENEVAL = [
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two tést cows"},
    {
        "tag": "position",
        "include": [
            {"class": "cup", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "exclude": [{"class": "dog", "count": 2}],
        "prompt": "a dog left of a cup",
    },
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "../x"},
]
GENEVAL2 = [
    {
        "prompt": f"{word} test pigs ",
        "atom_count": 3,
        "vqa_list": [["How many pigs are in the image?", word], ["Are there any pigs?", "Yes"]],
        "skills": ["count", "object"],
    }
    for word in ("two", "three", "four")
]


def entries_of(tmp_path: Path, rows: Sequence[object]) -> list[Entry]:
    """Return the prompts of a .jsonl file, which begins with an empty prompt."""
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": ""}), *(json.dumps(row) for row in rows)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return load_entries(str(file))


def names_in(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def pixels(model: int, index: int) -> np.ndarray[Any, Any]:
    """Return an image of one colour, another one for every model and sample."""
    return np.full((8, 8, 3), 100 * model + 10 * index, dtype=np.uint8)


def laid_out(
    layout: Layout, entries: Sequence[Entry], folder: Path, *, count: int, each: int = 1
) -> Evaluation:
    """Write an evaluation of two models, its images and the layout."""
    samples = tuple(choose_samples([entry.prompt for entry in entries], count, each))
    sampled = {
        name: Samples(samples, np.stack([pixels(m, i) for i in range(len(samples))]), {})
        for m, name in enumerate(("base", "tuned"))
    }
    result = Evaluation(
        model={"id": "tiny"},
        variants={"tuned": Identity("x", "0", 1.0, [])},
        prompt_set="set",
        seed=0,
        sample={},
        axis="",
        curve=(),
        sampled=sampled,
        group_of={},
        seconds=0.0,
    )
    for name, found in sampled.items():
        (folder / "images" / name).mkdir(parents=True)
        for index, image in enumerate(found.images):
            save_image(image, folder / image_path(name, index), {})
    layouts.write(layout, result, entries, folder)
    # All of it may be replaced by --overwrite.
    for file in (path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        assert any(re.fullmatch(ours, name) for ours in EVALUATION), name
    return result


def read_as_geneval(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Return (metadata, image) of every image, as evaluate_images.py walks its folder."""
    found: list[tuple[dict[str, Any], str]] = []
    for subfolder in names_in(folder):
        place = folder / subfolder
        if not place.is_dir() or not subfolder.isdigit():
            continue
        # The whole file is one JSON value there.
        metadata = json.loads((place / "metadata.jsonl").read_text("utf-8"))
        for name in names_in(place / "samples"):
            if re.match(r"\d+\.png", name):
                found.append((metadata, str(place / "samples" / name)))
    return found


def test_geneval_reads_four_images_of_every_prompt_beside_its_line(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, GENEVAL)
    result = laid_out("geneval", entries, tmp_path / "out", count=12, each=4)
    for m, model in enumerate(("base", "tuned")):
        found = read_as_geneval(tmp_path / "out" / "geneval" / model)
        assert len(found) == 12
        for row in GENEVAL:
            shown = sorted(image for metadata, image in found if metadata == row)
            values = [int(np.asarray(Image.open(image))[0, 0, 0]) for image in shown]
            # Its samples, in the order of their noise.
            index = [i for i, s in enumerate(result.samples) if s.prompt == row["prompt"]]
            assert values == [100 * m + 10 * i for i in index]
            assert len(values) == 4
    # The number of a folder is that of the line, of which the first is empty here.
    numbers = names_in(tmp_path / "out" / "geneval" / "tuned")
    assert numbers == ["00001", "00002", "00003"]
    assert not (tmp_path / "x").exists()


def read_as_geneval2(folder: Path, data: Path) -> list[tuple[dict[str, Any], Path]]:
    """Return (line, image) of every prompt, as evaluation.py does if started in `folder`."""
    images = json.loads((folder / "images.json").read_text("utf-8"))
    lines = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    missing = [line["prompt"] for line in lines if line["prompt"] not in images]
    assert not missing, "the scorer raises here"
    return [(line, folder / images[line["prompt"]]) for line in lines]


@pytest.mark.parametrize("count", [3, 2])
def test_geneval2_finds_an_image_by_every_prompt(tmp_path: Path, count: int) -> None:
    entries = entries_of(tmp_path, GENEVAL2)
    result = laid_out("geneval2", entries, tmp_path / "out", count=count)
    place = tmp_path / "out" / "geneval2"
    # Moved, as to another machine with the scorer on it.
    place = place.rename(tmp_path / "moved")
    for m, model in enumerate(("base", "tuned")):
        found = read_as_geneval2(place / model, place / "geneval2_data.jsonl")
        assert [line for line, _ in found] == [GENEVAL2[s.prompt_index] for s in result.samples]
        values = [int(np.asarray(Image.open(image))[0, 0, 0]) for _, image in found]
        assert values == [100 * m + 10 * i for i in range(count)]


def hpd(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> list[Entry]:
    """Return the prompts of a small copy of the dataset of HPDv2, whose files are in `folder`."""
    (folder / "benchmark").mkdir(parents=True)
    for style in (*benchmarks.HPD_STYLES, "drawbench"):
        # One is empty, which must not shift the numbers of those after it.
        texts = [f"{style} test {i}" if i != 1 else "" for i in range(4)]
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps(texts), encoding="utf-8")
    monkeypatch.setattr(
        benchmarks, "hf_hub_download", lambda repository, file, repo_type: str(folder / file)
    )
    return load_entries(name)


def read_as_hpsv2(prompts: Path, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return (prompt, image) by style, as hpsv2's `evaluate` finds them: by number, as .jpg."""
    found: dict[str, list[tuple[str, str]]] = {}
    for style in names_in(folder):
        texts = json.loads((prompts / f"{style}.json").read_text("utf-8"))
        places = [folder / style / f"{number:05d}.jpg" for number in range(len(texts))]
        found[style] = [
            (text, str(place)) for text, place in zip(texts, places, strict=True) if place.exists()
        ]
    return found


# The package's own class, for the folders and files named on standard input. What its module takes
# from that of the training is not used by it, and would need packages that nothing else here needs.
OFFICIAL = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
training = types.SimpleNamespace(calc_ImageReward=None, inversion_score=None)
data = types.SimpleNamespace(ImageRewardDataset=None, collate_rank=None, RankingDataset=None)
sys.modules.update({"hpsv2.src.training.train": training, "hpsv2.src.training.data": data})
from hpsv2.evaluation import BenchmarkDataset
found = {}
for style, meta, folder in json.loads(sys.stdin.read()):
    data = BenchmarkDataset(meta, folder, None, None)
    found[style] = list(zip(data.prompts, data.files))
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["hpd", "hpd:photo"])
def test_hpsv2_finds_every_image_by_the_number_of_its_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    entries = hpd(monkeypatch, tmp_path / "hub", name)
    result = laid_out("hpsv2", entries, tmp_path / "out", count=len(entries))
    for m, model in enumerate(("base", "tuned")):
        folder = tmp_path / "out" / "hpsv2" / model
        found = read_as_hpsv2(tmp_path / "hub" / "benchmark", folder)
        assert set(found) == ({"photo"} if ":" in name else set(benchmarks.HPD_STYLES))
        images = dict(pair for pairs in found.values() for pair in pairs)
        assert set(images) == {entry.prompt for entry in entries}
        for index, sample in enumerate(result.samples):
            with Image.open(images[sample.prompt]) as image:
                assert image.format == "JPEG"
                value = int(np.asarray(image)[0, 0, 0])
            assert abs(value - 100 * m - 10 * index) <= 1
        if HPSV2 and (name, model) == ("hpd", "tuned"):
            assert read_by_hpsv2(tmp_path / "hub" / "benchmark", folder) == found


def read_by_hpsv2(prompts: Path, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return what the package itself finds."""
    asked = [[s, str(prompts / f"{s}.json"), str(folder / s)] for s in names_in(folder)]
    paths = os.pathsep.join([HPSV2, *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-c", OFFICIAL],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    return {style: [tuple(pair) for pair in pairs] for style, pairs in found.items()}


def test_hpsv2_reads_drawbench_without_styles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = hpd(monkeypatch, tmp_path / "hub", "drawbench")
    layouts.check("hpsv2", "drawbench", entries, 3, 1)
    laid_out("hpsv2", entries, tmp_path / "out", count=3)
    # Its mode `drawbench` takes the folder of all models.
    root = tmp_path / "out" / "hpsv2"
    assert {model: names_in(root / model) for model in names_in(root)} == {
        model: ["00000.jpg", "00002.jpg", "00003.jpg"] for model in ("base", "tuned")
    }


@pytest.mark.parametrize(
    ("layout", "rows", "message"),
    [
        ("geneval", ["a text"], "has no 'prompt'"),
        ("geneval", [{"text": "x", "tag": "a", "include": []}], "has no 'prompt'"),
        ("geneval", [{**GENEVAL[0], "tag": 3}], "has no 'tag'"),
        ("geneval", [GENEVAL[0], {**GENEVAL[1], "include": [{"class": "x"}]}], "no 'include' of"),
        ("geneval", [{**GENEVAL[1], "exclude": "dogs"}], "has no 'exclude' of objects"),
        ("geneval", GENEVAL2, "'two test pigs' has no 'tag'"),
        ("geneval2", GENEVAL, "has no 'vqa_list'"),
        ("geneval2", [{**GENEVAL2[0], "vqa_list": [["one"]]}], "has no 'vqa_list'"),
        ("geneval2", [{**GENEVAL2[0], "vqa_list": []}], "has no 'vqa_list'"),
        ("geneval2", [GENEVAL2[0], GENEVAL2[0]], "have one twice"),
        ("hpsv2", ["a text"], "are not of hpd"),
    ],
)
def test_prompts_of_another_kind_are_refused(
    tmp_path: Path, layout: Layout, rows: Sequence[object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"--layout {layout}: the prompts of it .*{message}"):
        layouts.check(layout, "it", entries_of(tmp_path, rows), 1, 1)


def test_several_images_are_refused_where_one_is_scored(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, GENEVAL2)
    layouts.check("geneval2", "it", entries, 3, 1)
    with pytest.raises(ConfigError, match=r"GenEval 2 scores one image .* got --images-per-pr"):
        layouts.check("geneval2", "it", entries, 3, 2)
    # Else the fourth would be written into the file of the first, of which there is one.
    with pytest.raises(ConfigError, match=r"scores one image .* got --images 4 for 3 prompts"):
        layouts.check("geneval2", "it", entries, 4, 1)
    layouts.check("geneval", "it", entries_of(tmp_path, GENEVAL), 12, 2)


def test_less_than_the_published_images_is_told() -> None:
    texts = [str(number) for number in range(10)]
    assert layouts.remark("geneval", choose_samples(texts, 40, 4), 10) is None
    assert layouts.remark("hpsv2", choose_samples(texts, 10), 10) is None
    said = layouts.remark("geneval", choose_samples(texts, 8, 4), 10)
    assert said is not None
    assert "8 images of 2 of the 10 prompts" in said
    assert layouts.remark("geneval", choose_samples(texts, 10, 1), 10) is not None
    assert layouts.remark("geneval2", choose_samples(texts, 20), 10) is not None
