"""Resume a run: refuse changes, restore the state, and cut the metrics to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from alignprop_cli.config.schema import Config, differences
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError, Problem, RunError
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import checkpoints
from alignprop_cli.storage import write_text
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
    "eval.",
    "output.",
)


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run; None if it was stopped before its first one."""
    found = checkpoints(run)
    return found[-1] if found else None


def refuse_changes(found: Path, config: Config) -> None:
    """Refuse settings that differ from those of the checkpoint, except those that may change.

    Raises:
        ConfigError: With every such setting.
        RunError: If the checkpoint does not record its settings.
    """
    # Those in the checkpoint's header, not config.yaml: that file can be edited, and a resumed run
    # writes it before its first step.
    try:
        stored = json.loads(checkpoint.header(found)["alignprop.config"])
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


def restore(trainer: Trainer, found: Path, run: Path, steps: int) -> None:
    """Load a checkpoint into a trainer.

    Args:
        trainer: Before its first step; gets weights, optimiser and counters.
        found: The checkpoint.
        run: The run folder.
        steps: The step at which the run is to end.

    Raises:
        ConfigError: If it was trained on another network, or nothing is left to do.
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
    if state.step > steps or (state.step == steps and _summarised(run) == steps):
        raise ConfigError(
            f"--resume: {found} is at step {state.step} and train.steps is {steps}: nothing to do",
            hint=f"give a larger number, for instance --steps {state.step + steps}",
        )
    # 3. Weights, optimiser and counter. Random numbers are keyed by it: no generator to restore.
    prefix = trainer.model.family.lora_prefix
    lora.set_weights(trainer.model.network.module, checkpoint.load_lora(found, prefix))
    trainer.optimizer.load_state(state.optimizer)
    trainer.step_number = state.step


def _summarised(run: Path) -> int | None:
    """Return the step of the run's summary; None if there is no summary, or a damaged one."""
    try:
        return int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cut_metrics(run: Path, done: int) -> bool:
    """Remove the lines of steps after `done` from the run's metrics, and half a line at the end.

    Returns:
        Whether there was any line before.

    Raises:
        RunError: If a line in the middle is damaged.
    """
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    if lines and not lines[-1].endswith("}"):
        # The run was killed while it wrote this line.
        lines.pop()
    try:
        kept = [line for line in lines if json.loads(line)["step"] <= done]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{metrics}: damaged: {error}", hint="remove the damaged line") from error
    write_text(metrics, "".join(f"{line}\n" for line in kept))
    return bool(lines)
