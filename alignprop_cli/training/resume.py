"""Resume a run: refuse changes, restore the state, and cut the metrics to the checkpoint."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config
from alignprop_cli.config.section import differences
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import AssetError, ConfigError, NothingToDo, Problem, RunError
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import checkpoints, named_checkpoint
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text
from alignprop_cli.shipped import next_command, python_call
from alignprop_cli.storage import write_text, write_whole
from alignprop_cli.training import checkpoint
from alignprop_cli.training.trainer import Trainer

# Settings, or beginnings of them, that may change when a run is resumed: the number of steps, on
# which no step depends; the plan, which changes no step; what is sampled and kept besides.
_MAY_CHANGE = (
    "train.steps",
    "train.rollout_batch",
    "train.micro_batch",
    "train.decode_batch",
    "gradient.checkpoint_network",
    "gradient.checkpoint_decoder",
    "gradient.checkpoint_reward",
    "train.compile",
    "train.cuda_graph",
    "train.memory_limit",
    "train.on_nonfinite",
    "train.nonfinite_limit",
    "eval.",
    "guard.",
    "output.",
)

# A sheet of samples, and the same for the report.
_SAMPLED = re.compile(r"step-([0-9]{6,18})\.(?:png|json)")


def choose(
    run: Path, name: str | None, config: Config, warn: Callable[[str], object]
) -> Path | None:
    """Return the checkpoint from which a run is resumed.

    Args:
        run: The run folder.
        name: `best`, or a step's; None is the newest that is as it was written.
        config: The complete configuration of now.
        warn: As in `newest`.

    Returns:
        None if the run was stopped before its first checkpoint.

    Raises:
        AssetError: If there is none of this name.
        ConfigError, RunError: As `newest` and `refuse_changes`.
    """
    found = newest(run, warn) if name is None else named_checkpoint(run, name)
    if found is not None:
        refuse_changes(found, config)
    return found


def newest(run: Path, warn: Callable[[str], object] = lambda text: None) -> Path | None:
    """Return the newest checkpoint of a run that is as it was written.

    Args:
        run: The run folder.
        warn: Called with a message about every newer one, which is damaged.

    Returns:
        None if the run was stopped before its first checkpoint.

    Raises:
        RunError: If all are damaged.
    """
    wrong: dict[Path, str] = {}
    for path in reversed(checkpoints(run)):
        damage = checkpoint.damage(path)
        if damage is None:
            for other, what in wrong.items():
                warn(f"{other}: damaged checkpoint: {what}; resuming from {path.name} instead")
            return path
        wrong[path] = damage
    if wrong:
        raise checkpoint.damaged(*next(iter(wrong.items())))
    return None


def refuse_stopped(run: Path, config: Config) -> None:
    """Refuse to go on by `--resume auto` with a run that the guard has stopped.

    Such a line is typed once and repeated by a scheduler, so it says nothing about what the guard
    has found since. Other settings of the guard do.

    Args:
        run: The run folder.
        config: The complete configuration of now.

    Raises:
        NothingToDo: With what the guard said, and how to go on all the same.
    """
    told, newest_step = _stopped(run), checkpoints(run)[-1:]
    if told is None or told[0] != [path.name for path in newest_step]:
        return
    before = presets.resolve(run=run, source=str(run / "config.yaml"))
    if config.guard == before.guard:
        typed = f"alignprop train --resume {shlex.quote(str(run))}"
        command = python_call("train", config, trust.TO_RESUME, resume=str(run)) or next_command(
            typed, config, trust.TO_RESUME
        )
        raise NothingToDo(
            f"--resume auto: {run}: {told[1]}",
            hint=f"to go on with it all the same: {command}, and --set guard.enabled=false if the "
            "guard is not to stop it again",
        )


def _stopped(run: Path) -> tuple[list[str], str] | None:
    """Return the checkpoint where the guard stopped a run, and what it said; None if it did not."""
    try:
        found = read_json(read_text(run / "summary.json", "--resume"))
        guard = found["guard"]
        return ([f"step-{found['steps']:06d}"], str(guard["told"])) if guard["stopped"] else None
    # Not written yet, or damaged: then there is no end that the run has come to.
    except (AssetError, ParseError, LookupError, TypeError, ValueError):
        return None


def go_back(run: Path, chosen: Path, note: Callable[[str], object]) -> None:
    """Make a checkpoint of a run its newest one; those of later steps are removed.

    Args:
        run: The run folder.
        chosen: The checkpoint, one of the run's.
        note: Called with a message about what is removed.

    Raises:
        RunError: If it is damaged.
    """
    step = checkpoint.load(chosen).step
    # The summary is of an end that the run has no more. A run that is killed after its last step
    # is resumed to write its own, which it would not be with this one there.
    (run / "summary.json").unlink(missing_ok=True)
    # 1. A checkpoint of its step, where there is none or a damaged one. If the process is killed
    #    after this or any removal below, the same command goes on from there.
    place = run / "checkpoints" / f"step-{step:06d}"
    if not place.exists() or checkpoint.damage(place) is not None:
        write_whole(place, lambda made: shutil.copytree(chosen, made, dirs_exist_ok=True))
    # 2. The newest first, so that none is the newest that did not follow from the others.
    found = checkpoints(run)
    later = found[found.index(place) + 1 :]
    for path in reversed(later):
        checkpoint.drop(path)
    removed = f"; removed: {', '.join(path.name for path in later)}" if later else ""
    note(f"going back to step {step}{removed}")


def refuse_changes(found: Path, config: Config) -> None:
    """Refuse settings that differ from those of the checkpoint, except those that may change.

    Raises:
        ConfigError: With every such setting.
        RunError: If the checkpoint does not record its settings.
    """
    # Those in the checkpoint's header, not config.yaml: that file can be edited, and a resumed run
    # writes it before its first step.
    try:
        stored = read_json(checkpoint.header(found)["alignprop.config"])
        before = parse(stored, source=str(found)).model_dump(mode="json")
    except (KeyError, ValueError) as error:
        raise RunError(f"{found}: damaged checkpoint: it does not say how it was made") from error
    after = config.model_dump(mode="json")
    problems = [
        Problem(key, f"{old!r} in the run, {new!r} now")
        for key, (old, new) in differences(before, after).items()
        if not key.startswith(_MAY_CHANGE)
    ]
    if problems:
        raise ConfigError(
            f"--resume: {found.parent.parent}: these settings cannot change within a run",
            problems,
            hint=f"a new run from its weights: --set lora.init={found}",
        )


def refuse_other_inputs(found: Path, inputs: Mapping[str, str]) -> None:
    """Refuse to resume where a file that the run reads is not what it was.

    Args:
        found: The checkpoint.
        inputs: Hashes as of now; see `setup.inputs`.

    Raises:
        ConfigError: With every such file.
        RunError: If the checkpoint is damaged.
    """
    before = checkpoint.load(found).inputs
    changed = sorted(k for k in before.keys() | inputs.keys() if before.get(k) != inputs.get(k))
    if changed:
        raise ConfigError(
            f"--resume: {found.parent.parent}: what these settings name is not what it was",
            [Problem(key, "its content has changed since the checkpoint") for key in changed],
            hint=f"put it back, or start a new run from its weights: --set lora.init={found}",
        )


def restore(trainer: Trainer, found: Path, run: Path, steps: int) -> None:
    """Load a checkpoint into a trainer.

    Args:
        trainer: Before its first step; gets weights, optimiser and counters.
        found: The checkpoint.
        run: The run folder.
        steps: The step at which the run is to end.

    Raises:
        ConfigError: If it was trained on another network.
        NothingToDo: If it has done all its steps.
        RunError: If the checkpoint is damaged.
    """
    # 1. The same base model: a folder or a branch of the hub may hold another one by now.
    state = checkpoint.load(found)
    fingerprint = checkpoint.header(found).get("alignprop.base_fingerprint")
    if fingerprint != trainer.model.fingerprint:
        raise ConfigError(
            f"--resume: {found} was trained on another network than {trainer.model.id} is now: "
            f"fingerprint {fingerprint}, here {trainer.model.fingerprint}"
        )
    # 2. Something left to do. A run that was killed after its last step lacks its summary, and is
    #    resumed to write it.
    if state.step > steps or (state.step == steps and summarised(run) == steps):
        raise NothingToDo(
            f"--resume: {found} is at step {state.step} and train.steps is {steps}: nothing to do",
            hint=f"give a larger number, for instance --steps {state.step + steps}",
        )
    # 3. Weights, optimiser and counters. Random numbers are keyed by the step: no generator to
    #    restore.
    load_weights(trainer, found)
    trainer.optimizer.load_state(state.optimizer)
    trainer.step_number, trainer.finite.skipped_in_row = state.step, state.skipped_in_row


def load_weights(trainer: Trainer, found: Path) -> None:
    """Give the LoRA of a trainer the weights of a checkpoint, as they are trained.

    Raises:
        RunError: If the checkpoint is damaged.
    """
    prefix = trainer.model.family.lora_prefix
    weights = {**checkpoint.load_lora(found, prefix), **checkpoint.load(found).trained}
    lora.set_weights(trainer.model.network.module, weights)


def summarised(run: Path) -> int | None:
    """Return the step of the run's summary; None if there is no summary, or a damaged one."""
    file = run / "summary.json"
    try:
        return int(read_json(file.read_text(encoding="utf-8"))["steps"]) if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that can be read, by rising step."""
    lines, _ = _metrics(run / "metrics.jsonl")
    return [dict(read_json(lines[step])) for step in sorted(lines)]


def metrics_hash(run: Path, step: int) -> str:
    """Return the hash of the lines of metrics.jsonl up to a step."""
    lines, _ = _metrics(run / "metrics.jsonl")
    return _hash(lines, step)


def cut_metrics(run: Path, found: Path | None, warn: Callable[[str], object]) -> bool:
    """Remove the lines of metrics.jsonl after a checkpoint's step, and half a line at the end.

    Args:
        run: The run folder.
        found: The checkpoint; None where the run begins again.
        warn: Called with a message if the lines before it are not those that were written. The file
            is kept under another name then, and the run goes on with the lines that can be read.

    Returns:
        Whether there was any line before.
    """
    file = run / "metrics.jsonl"
    lines, whole = _metrics(file)
    state = None if found is None else checkpoint.load(found)
    step = 0 if state is None else state.step
    kept = [line for number, line in lines.items() if number <= step]
    if state is not None and not (whole and _hash(lines, step) == state.metrics):
        aside = file.with_name("metrics.damaged.jsonl")
        if file.exists():
            file.replace(aside)
        warn(
            f"{file}: is not as it was written: {len(kept)} of its lines up to step {step} can be "
            f"read and are kept{f'; all of it is in {aside.name}' if aside.exists() else ''}"
        )
    write_text(file, "".join(f"{line}\n" for line in kept))
    return bool(lines)


def cut_samples(run: Path, step: int) -> None:
    """Remove the samples of steps after this one: they are of weights that there are no more."""
    for file in (run / "samples").glob("step-*"):
        number = _SAMPLED.fullmatch(file.name)
        if number and int(number[1]) > step and not file.is_dir():
            file.unlink()


def _metrics(file: Path) -> tuple[dict[int, str], bool]:
    """Return the lines of a metrics file by their steps, and whether all could be read.

    Half a line at the end counts as read: there a run was killed.
    """
    if not file.is_file():
        return {}, not file.exists()
    lines: dict[int, str] = {}
    whole = True
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            lines[int(read_json(line)["step"])] = line
        except (ValueError, KeyError, TypeError):
            whole = False
    return lines, whole


def _hash(lines: Mapping[int, str], step: int) -> str:
    kept = [line for number, line in lines.items() if number <= step]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()
