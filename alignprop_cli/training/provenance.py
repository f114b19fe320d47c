"""What a report says about where a run came from: environment, nearest preset, commands."""

from __future__ import annotations

import json
import platform
import shlex
from importlib import metadata
from typing import Any, cast

import psutil
import torch

from alignprop_cli import __version__
from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config
from alignprop_cli.config.section import differences
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora.files import BEST
from alignprop_cli.planning import window
from alignprop_cli.shipped import next_command, python_call
from alignprop_cli.training.callbacks import Run

Rows = list[tuple[str, ...]]

# What decides most about a result, besides the settings.
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch")
# Of no preset: where a run is written, and what is measured on its own base model.
_OWN = ("output.dir", "base_mean", "base_std")
# Characters of a value.
_LONGEST = 200


def environment(run: Run) -> Rows:
    """Return the machine and the versions."""
    device = run.accelerator.device
    name = str(device)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device}), CUDA {torch.version.cuda}"
    rows = [
        ("device", name),
        ("processes", str(run.accelerator.num_processes)),
        ("threads of a process", str(torch.get_num_threads())),
        ("memory of the machine", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"),
        ("system", platform.platform()),
        ("Python", platform.python_version()),
        ("alignprop", __version__),
    ]
    for library in _LIBRARIES:
        try:
            rows.append((library, metadata.version(library)))
        except metadata.PackageNotFoundError:
            continue  # imported from a folder of its own
    return rows


def plan(run: Run) -> Rows:
    """Return what is trained, and how a step is divided."""
    config, trainer = run.config, run.trainer
    values = sum(p.numel() for p in trainer.model.network.module.parameters() if p.requires_grad)
    # Numbers that say more than the names of the settings, which are further down.
    steps, estimator = config.sample.num_inference_steps, trainer.settings.estimator
    covered, _ = window.describe(trainer.schedule, estimator)
    gradient = f"{config.gradient.method}: {estimator.mean(steps):.3g} of {steps} calls on average"
    sample = f"{steps} steps, guidance {config.sample.guidance_scale:g}"
    rows = [
        ("base model", config.model.id),
        ("rewards", ", ".join(f"{n} x {r.weight:g}" for n, r in config.reward.items())),
        ("prompts", f"{config.train.prompts}; held out: {config.eval.prompts}"),
        ("samples", f"{sample}, seed {config.train.seed}"),
        ("LoRA", f"rank {config.lora.rank}, {values:,} values that are trained"),
        ("gradient", f"{gradient}; {covered}" if covered else gradient),
        ("optimiser", f"{config.train.optimizer}, learning rate {config.train.learning_rate:g}"),
        ("step", trainer.plan.describe()),
    ]
    return rows


def nearest_preset(config: Config) -> tuple[str, Rows]:
    """Return the shipped preset that a configuration differs least from, and how it differs.

    A run does not record what it was started from; this is true also of one with a file of its own.

    Returns:
        The name, and a row for each key: its name, its value in the preset, and in the run.
    """
    # 1. The differences to each preset, by key.
    ours = config.model_dump(mode="json")
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name in presets.names():
        layers = presets.Layers()
        presets.read(presets.preset_path(name), layers)
        theirs = parse(layers.values, source=name).model_dump(mode="json")
        changed = differences(theirs, ours)
        found[name] = {k: v for k, v in changed.items() if not k.endswith(_OWN)}
    # 2. The fewest. Of two that are as near the shorter name: the other is a variant of it.
    name = min(found, key=lambda name: (len(found[name]), len(name), name))
    return name, [(key, _shown(a), _shown(b)) for key, (a, b) in found[name].items()]


def commands(run: Run, *, has_best: bool, is_over: bool) -> Rows:
    """Return what can be done with the run: title and command."""
    # As it was typed, relative or not: they are for the folder that the run was started in.
    config, folder = run.config, shlex.quote(str(run.folder))
    # A run that has all its steps needs more of them to go on.
    more = f" --steps {2 * config.train.steps}" if is_over else ""
    resume = next_command(f"alignprop train --resume {folder}{more}", config, trust.TO_RESUME)
    evaluate = next_command(f"alignprop evaluate {folder}", config)
    best = next_command(f"alignprop evaluate --checkpoint {BEST} {folder}", config)
    own, again = str(run.folder / "config.yaml"), _beside(run, "-again")
    reproduce = f"alignprop train --config {shlex.quote(own)} --output {shlex.quote(again)}"
    soup = f"alignprop soup {folder} base --coef 0.7 --output {shlex.quote(_beside(run, '-soup'))}"
    # What a reward in the memory of this process needs instead.
    here = str(run.folder)
    steps = 2 * config.train.steps if is_over else None
    further = {"resume": here, "steps": steps}
    reproduce = python_call("train", config, (), config=own, output=again) or reproduce
    resume = python_call("train", config, trust.TO_RESUME, **further) or resume
    evaluate = python_call("evaluate", config, target=here) or evaluate
    best = python_call("evaluate", config, target=here, checkpoint=BEST) or best
    if steps is not None and not _can_have(config, steps):
        # Its learning rate ends with its steps: what goes on is a new run from its weights.
        new, init = _beside(run, "-further"), presets.assignment("lora.init", here)
        words = ["train", "--config", own, "--set", init, "--output", new]
        given = {"config": own, "overrides": {"lora.init": here}, "output": new}
        resume = python_call("train", config, (), **given) or f"alignprop {shlex.join(words)}"
    rows: Rows = [
        ("Reproduce it", reproduce),
        ("Resume it" if not is_over else "Train it further", resume),
        ("Evaluate it", evaluate),
        *([("Evaluate its best checkpoint", best)] if has_best else []),
        ("Mix it with the base model", soup),
    ]
    return rows


def _can_have(config: Config, steps: int) -> bool:
    """Return whether a run can be resumed to have so many steps."""
    values = config.model_dump(mode="json")
    values["train"]["steps"] = steps
    try:
        parse(values)
    except ConfigError:
        return False
    return True


def _beside(run: Run, ending: str) -> str:
    return str(run.folder.with_name(run.folder.name + ending))


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # a reward that only one of the two has
        options = cast(dict[str, Any], value).items()
        return ", ".join(f"{key} {_shown(each)}" for key, each in options if each is not None)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
