"""What `alignprop evaluate` does once the configuration is known.

Imported only when needed: it brings torch and diffusers with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignprop_cli import __version__, adapter, checkpoint, evaluator, lora, report
from alignprop_cli.adapter import Located
from alignprop_cli.commands.drawing import draw
from alignprop_cli.config import Config
from alignprop_cli.console import Console, table
from alignprop_cli.errors import ConfigError
from alignprop_cli.evaluator import Drawn, Paired
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.models.registry import load_model
from alignprop_cli.rewards.composite import build_mixture
from alignprop_cli.trainer import make_accelerator

_SHEET_CELLS = 60
"""More would make the sheet too large to look at; all pictures are in the folder."""


@dataclass(frozen=True)
class Evaluation:
    """What was drawn and measured.

    Args:
        config: The complete configuration.
        model: The base model's name and fingerprint.
        adapter: The LoRA's file and hash; empty for the base model alone.
        drawn: Pictures by what they were drawn with: base, and tuned where there is a LoRA.
        paired: The comparison by reward; empty for the base model alone.
        checker: Shares of pictures that are as their prompt says, by part of the prompt and by
            what they were drawn with; empty where the checker does not know the prompts.
        seconds: Wall-clock time.
    """

    config: Config
    model: Mapping[str, str]
    adapter: Mapping[str, str]
    drawn: Mapping[str, Drawn]
    paired: Mapping[str, Paired]
    checker: Mapping[str, Mapping[str, float]]
    seconds: float


def run_evaluation(
    config: Config, console: Console, located: Located | None, prompts: list[str], folder: Path
) -> None:
    """Draw, measure, compare, write the folder, and print the result.

    Args:
        config: The complete configuration.
        console: For people and for the result.
        located: The LoRA; None draws the base model alone.
        prompts: The prompt set.
        folder: Where the result goes; replaced where it exists.

    Raises:
        AlignPropError: Whatever is wrong with the model, the LoRA, the rewards or the pictures.
    """
    started = time.perf_counter()
    device = make_accelerator().device
    model = load_model(config.model, device)
    if located is not None:
        _load_lora(console, model, located)
    mixture = build_mixture(config.reward, config.loss, device)
    pictures = evaluator.choose(prompts, config.eval.images)
    with lora.disabled(model.network):
        drawn = {"base": draw(config, console, model, mixture, pictures, "base model")}
    if located is not None:
        drawn["tuned"] = draw(config, console, model, mixture, pictures, "with the LoRA")
    result = Evaluation(
        config,
        {"id": model.id, "fingerprint": model.fingerprint},
        {} if located is None else _identity(located.file),
        drawn,
        _compare(drawn),
        evaluator.check_shares(drawn),
        time.perf_counter() - started,
    )
    checkpoint.write_whole(folder, lambda made: _write(result, made))
    _print(console, result, folder)


def _identity(file: Path) -> dict[str, str]:
    return {"file": str(file.resolve()), "sha256": adapter.sha256(file)}


def _load_lora(console: Console, model: DiffusionModel, located: Located) -> None:
    """Put the LoRA into the network, if it says nothing else about its base model."""
    header = adapter.read_header(located.file)
    recorded = header.get("alignprop.base_fingerprint")
    trained_on = header.get("alignprop.base_model")
    if recorded and recorded != model.fingerprint:
        raise ConfigError(
            f"{located.file}: this LoRA was trained on {trained_on}, whose layers are not those "
            f"of {model.id}",
            hint="give the model it was trained on with --model",
        )
    if trained_on and trained_on != model.id:
        console.warn(f"{located.file} was trained on {trained_on}, and is drawn with {model.id}")
    model.load_lora(located.file)


def _compare(drawn: Mapping[str, Drawn]) -> dict[str, Paired]:
    if "tuned" not in drawn:
        return {}
    base, tuned = drawn["base"], drawn["tuned"]
    return {
        name: evaluator.compare(base.pictures, values, tuned.rewards[name])
        for name, values in base.rewards.items()
    }


def _write(result: Evaluation, folder: Path) -> None:
    """Write pictures, the sheet and results.json."""
    for name, drawn in result.drawn.items():
        images = folder / "images" / name
        images.mkdir(parents=True)
        for index, image in enumerate(drawn.images):
            metadata = _metadata(result, name, drawn, index)
            report.save_picture(image, images / f"{index:04d}.png", metadata)
    titles = tuple(result.drawn)
    cells = [
        report.Cell(
            picture.prompt,
            tuple(result.drawn[name].images[i] for name in titles),
            tuple(result.drawn[name].caption(i) for name in titles),
        )
        for i, picture in enumerate(result.drawn["base"].pictures[:_SHEET_CELLS])
    ]
    report.contact_sheet(cells, folder / "sheet.png", titles=titles)
    text = json.dumps({"schema": "alignprop.evaluate/1", **_values(result)}, indent=2)
    checkpoint.write_text(folder / "results.json", text + "\n")


def _metadata(result: Evaluation, name: str, drawn: Drawn, index: int) -> dict[str, str]:
    """Return what a picture says of itself; `alignprop score` reads `prompt` back."""
    picture, sample = drawn.pictures[index], result.config.sample
    texts = {
        "prompt": picture.prompt,
        "seed": str(result.config.eval.seed),
        "prompt_index": str(picture.prompt_index),
        "image_index": str(picture.image_index),
        "model": result.model["id"],
        "num_inference_steps": str(sample.num_inference_steps),
        "guidance_scale": str(sample.guidance_scale),
        "eta": str(sample.eta),
        "rewards": json.dumps({k: float(v[index]) for k, v in drawn.rewards.items()}),
        "Software": f"alignprop {__version__}",
    }
    if name == "tuned":
        texts["adapter_sha256"] = result.adapter["sha256"]
    return texts


def _values(result: Evaluation) -> dict[str, Any]:
    """Return everything that results.json holds."""
    base = result.drawn["base"]
    return {
        "version": __version__,
        "model": dict(result.model),
        "adapter": dict(result.adapter) or None,
        "prompts": result.config.eval.prompts,
        "seed": result.config.eval.seed,
        "sample": result.config.sample.model_dump(mode="json"),
        "images": len(base.pictures),
        "rewards": {name: _reward_values(result, name) for name in base.rewards},
        "checker": {part: dict(shares) for part, shares in result.checker.items()},
        "seconds": result.seconds,
        "pictures": [
            {
                "number": i,
                **asdict(picture),
                "rewards": {
                    name: {k: float(v[i]) for k, v in drawn.rewards.items()}
                    for name, drawn in result.drawn.items()
                },
            }
            for i, picture in enumerate(base.pictures)
        ],
    }


def _reward_values(result: Evaluation, name: str) -> dict[str, float]:
    """Return the figures of one reward: means, deviations, and the paired comparison."""
    values: dict[str, float] = {}
    for which, drawn in result.drawn.items():
        values[which] = float(drawn.rewards[name].mean())
        values[f"{which}_std"] = float(drawn.rewards[name].std())
    return values | (asdict(result.paired[name]) if name in result.paired else {})


def _print(console: Console, result: Evaluation, folder: Path) -> None:
    """Print tables for people or one object for programs."""
    values = {**_values(result), "output": str(folder.resolve())}
    values["sheet"] = str((folder / "sheet.png").resolve())
    count = len(result.drawn["base"].pictures)
    title = f"{count} pictures ({result.config.eval.prompts}), seed {result.config.eval.seed}"
    parts: list[Any] = []
    if result.paired:
        rows = [_paired_row(name, paired) for name, paired in result.paired.items()]
        columns = ("", "base", "tuned", "difference", "95 % interval", "higher", "equal")
        rows += [_check_row(part, shares) for part, shares in result.checker.items()]
        parts.append(table(title, columns, rows))
    else:
        base = result.drawn["base"].rewards
        rows = [(name, f"{v.mean():.4f}", f"{v.std():.4f}") for name, v in base.items()]
        rows += [(f"{p} right", f"{s['base']:.0%}", "") for p, s in result.checker.items()]
        parts.append(table(title, ("", "mean", "std"), rows))
    parts += ["", f"results  {folder / 'results.json'}", f"pictures {folder / 'sheet.png'}"]
    if count > _SHEET_CELLS:
        parts.append(f"the sheet shows the first {_SHEET_CELLS} of {count} pictures")
    console.result("alignprop.evaluate/1", values, parts)


def _paired_row(name: str, paired: Paired) -> tuple[str, ...]:
    return (
        name,
        f"{paired.base:.4f}",
        f"{paired.tuned:.4f}",
        f"{paired.difference:+.4f}",
        f"{paired.low:+.4f} to {paired.high:+.4f}",
        f"{paired.wins:.0%}",
        f"{paired.ties:.0%}",
    )


def _check_row(part: str, shares: Mapping[str, float]) -> tuple[str, ...]:
    base, tuned = shares["base"], shares["tuned"]
    return (f"{part} right", f"{base:.0%}", f"{tuned:.0%}", f"{tuned - base:+.0%}", "", "", "")
