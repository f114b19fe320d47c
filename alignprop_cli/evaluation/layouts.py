"""The folders that the official scorers of published benchmarks read, one for every model.

    geneval/MODEL/00000/metadata.jsonl      geneval/MODEL/00000/samples/0000.png
    geneval2/MODEL/images.json              geneval2/MODEL/00000.png    geneval2/geneval2_data.jsonl
    hpsv2/MODEL/anime/00000.jpg

Numbers are those of the prompts in their set. No name in a file of prompts becomes a name here.
Source: the scorers' own code, at djghosh13/geneval af4902f (evaluation/evaluate_images.py),
facebookresearch/GenEval2 a6e82d2 (evaluation.py) and hpsv2 1.2.0 (evaluation.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from alignprop_cli.benchmarks import HPD_STYLES
from alignprop_cli.errors import ConfigError
from alignprop_cli.evaluation.compare import Evaluation
from alignprop_cli.evaluation.draw import Sample, Samples
from alignprop_cli.evaluation.results import image_path
from alignprop_cli.evaluation.scorers import SCORERS, Layout
from alignprop_cli.prompts import Entry
from alignprop_cli.storage import write_text

# hpsv2 reads this set too, from a folder without styles.
_DRAWBENCH = "drawbench"


def check(
    layout: Layout, prompt_set: str, entries: Sequence[Entry], images: int, per_prompt: int
) -> None:
    """Refuse prompts that the scorer could not score.

    Args:
        layout: The folder that is wanted.
        prompt_set: Name or file of the prompts, for messages.
        entries: Its prompts.
        images: Images of all prompts.
        per_prompt: Images of each; with more images than that gives, prompts come again.

    Raises:
        ConfigError: If they are of another benchmark, or the scorer reads one image of a prompt.
    """
    scorer = SCORERS[layout]
    # It has one place for each prompt, where the next image would replace the one before.
    if not scorer.takes_several and (per_prompt > 1 or images > len(entries)):
        got = f"--images {images} for {len(entries)} prompts"
        got = f"--images-per-prompt {per_prompt}" if per_prompt > 1 else got
        raise ConfigError(
            f"--layout {layout}: {scorer.title} scores one image of each prompt, got {got}",
            hint="evaluate with other seeds into other folders: --seed 1 --output ...",
        )
    if layout == "hpsv2":
        fits = prompt_set == _DRAWBENCH or all(entry.style in HPD_STYLES for entry in entries)
        problem = None if fits else "are not of hpd"
    else:
        problem = _first_problem(_PROBLEMS[layout], entries)
    # Its scorer looks images up by their prompt.
    if problem is None and layout == "geneval2" and len({e.prompt for e in entries}) < len(entries):
        problem = "have one twice"
    if problem is not None:
        # Named by its own option, since a run or a file may have named it.
        raise ConfigError(
            f"--layout {layout}: the prompts of {prompt_set} {problem}",
            hint=f"give --prompts {scorer.prompts}, or a local copy of its file"
            if layout != "hpsv2"
            else "give --prompts hpd, one of its styles such as hpd:photo, or drawbench",
        )


def remark(layout: Layout, samples: Sequence[Sample], prompts: int) -> str | None:
    """Return how the images differ from those of published figures; None if they do not.

    Args:
        layout: The folder.
        samples: What will be sampled.
        prompts: How many prompts the set has.
    """
    scorer, used = SCORERS[layout], len({sample.prompt_index for sample in samples})
    if used == prompts and len(samples) == prompts * scorer.images_per_prompt:
        return None
    return (
        f"--layout {layout}: {len(samples)} images of {used} of the {prompts} prompts; published "
        f"figures of {scorer.title} are of {scorer.images_per_prompt} of every prompt"
    )


def write(layout: Layout, result: Evaluation, entries: Sequence[Entry], folder: Path) -> None:
    """Write the images of every model as the scorer reads them, below `folder`/`layout`.

    Args:
        layout: What to write.
        result: An evaluation whose images are written already, by `results.write`.
        entries: The prompts that its samples are numbered by, once checked.
        folder: That of the evaluation.
    """
    place = folder / layout
    if layout == "geneval2":
        # The questions of the prompts that were sampled, since its scorer wants an image of each.
        used = sorted({sample.prompt_index for sample in result.samples})
        rows = [json.dumps(dict(entries[index].values)) for index in used]
        write_text(place / "geneval2_data.jsonl", "\n".join(rows) + "\n")
    for name, sampled in result.sampled.items():
        images = [folder / image_path(name, index) for index in range(len(sampled.samples))]
        _WRITERS[layout](sampled, entries, images, place / name)


def _geneval(
    sampled: Samples, entries: Sequence[Entry], images: Sequence[Path], place: Path
) -> None:
    for sample, image in zip(sampled.samples, images, strict=True):
        entry = entries[sample.prompt_index]
        folder = place / f"{entry.number:05d}"
        if not folder.is_dir():
            (folder / "samples").mkdir(parents=True)
            line = json.dumps(dict(entry.values)) + "\n"
            (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
        _link(image, folder / "samples" / f"{sample.image_index:04d}.png")


def _geneval2(
    sampled: Samples, entries: Sequence[Entry], images: Sequence[Path], place: Path
) -> None:
    place.mkdir(parents=True)
    files: dict[str, str] = {}
    for sample, image in zip(sampled.samples, images, strict=True):
        entry = entries[sample.prompt_index]
        # Relative, so that the folder can be moved; the scorer is started in it.
        name = f"{entry.number:05d}.png"
        files[entry.values["prompt"]] = name
        _link(image, place / name)
    write_text(place / "images.json", json.dumps(files, indent=2) + "\n")


def _hpsv2(sampled: Samples, entries: Sequence[Entry], images: Sequence[Path], place: Path) -> None:
    del images  # PNG; its scorer reads JPEG alone
    for sample, pixels in zip(sampled.samples, sampled.images, strict=True):
        entry = entries[sample.prompt_index]
        folder = place / entry.style
        folder.mkdir(parents=True, exist_ok=True)
        # With Pillow's own quality, as its authors save the images that they score.
        Image.fromarray(pixels).save(folder / f"{entry.number:05d}.jpg", format="JPEG")


_Writer = Callable[[Samples, Sequence[Entry], Sequence[Path], Path], None]
_WRITERS: Mapping[Layout, _Writer] = {"geneval": _geneval, "geneval2": _geneval2, "hpsv2": _hpsv2}


def _link(image: Path, place: Path) -> None:
    """Give a file a second name, or copy it where the file system has none."""
    try:
        os.link(image, place)
    except OSError:
        shutil.copyfile(image, place)


def _first_problem(
    problem: Callable[[Mapping[str, Any]], str | None], entries: Sequence[Entry]
) -> str | None:
    """Return what is wrong with the first entry that the scorer could not read."""
    for entry in entries:
        # A prompt that is called `text` would be read here, and not there.
        found = problem(entry.values) if entry.values.get("prompt") else "has no 'prompt'"
        if found is not None:
            return f"cannot be scored: {entry.prompt[:60]!r} {found}"
    return None


def _geneval_problem(values: Mapping[str, Any]) -> str | None:
    """Return what GenEval's scorer would stumble over in a line."""
    if not isinstance(values.get("tag"), str):
        return "has no 'tag'"
    for key in ("include", "exclude"):
        clauses = values.get(key, [] if key == "exclude" else None)
        named = isinstance(clauses, list) and all(
            isinstance(clause, dict)
            and isinstance(cast(Any, clause).get("class"), str)
            and isinstance(cast(Any, clause).get("count"), int)
            for clause in cast(list[Any], clauses)
        )
        if not named:
            return f"has no '{key}' of objects with 'class' and 'count'"
    return None


def _geneval2_problem(values: Mapping[str, Any]) -> str | None:
    """Return what GenEval 2's scorer would stumble over in a line."""
    pairs: Any = values.get("vqa_list")
    asked = isinstance(pairs, list) and all(
        isinstance(pair, list)
        and len(cast(list[Any], pair)) == 2
        and all(isinstance(text, str) for text in cast(list[Any], pair))
        for pair in cast(list[Any], pairs)
    )
    return None if asked and pairs else "has no 'vqa_list' of questions with their answers"


_PROBLEMS: Mapping[Layout, Callable[[Mapping[str, Any]], str | None]] = {
    "geneval": _geneval_problem,
    "geneval2": _geneval2_problem,
}
