"""Turn the sections of a configuration into the values and the LoRA that a run starts with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from alignprop_cli.config.schema import PYTHON, Config, RewardConfig
from alignprop_cli.config.tracking import TrackingConfig
from alignprop_cli.console import Console
from alignprop_cli.device import resolve_dtype
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError, explained
from alignprop_cli.estimators import Estimator, window_group
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.factors import is_dora
from alignprop_cli.models import taesd
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import sampler
from alignprop_cli.prompts import check_prompts, load_prompts
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.jpeg import true_size
from alignprop_cli.rewards.mixture import Mixture, build_mixture
from alignprop_cli.storage import fingerprint, locked
from alignprop_cli.tracking import follow
from alignprop_cli.training import folders, rules
from alignprop_cli.training.batches import Settings
from alignprop_cli.training.optimizer import OptimizerSettings
from alignprop_cli.training.rates import Rates
from alignprop_cli.training.rules import RuleSettings


def check(config: Config, resume: Path | None) -> None:
    """Refuse what is unknown or missing before anything heavy is loaded.

    Args:
        config: The complete configuration.
        resume: The run to resume; None for a new one.

    Raises:
        AssetError: If a file or a package is missing.
        ConfigError: If a name is unknown or an option is wrong.
    """
    rules.check(config.train.optimizer)
    follow.check(config.tracking)
    for name, reward in config.reward.items():
        registry.check(name, reward.options)
        if name in registry.SHIPPED and not registry.SHIPPED[name].trainable:
            raise ConfigError(f"reward.{name}: it has no gradient, so it cannot be trained on")
    for name, reward in config.eval.rewards.items():
        registry.check(name, reward.options, "eval.rewards")
    for section, rewards in (("reward", config.reward), ("eval.rewards", config.eval.rewards)):
        for name, reward in rewards.items():
            if reward.dtype != "float32" and not registry.has_network(name):
                raise registry.no_network(name, reward.dtype, section)
    registry.check_embedded(config.reward, config.model.id)
    registry.check_embedded(config.eval.rewards, config.model.id, "eval.rewards")
    taesd.local_folder(config.model)
    initial_lora(config, resume)
    for prompts in (config.train.prompts, config.eval.prompts):
        check_prompts(prompts)


def initial_lora(config: Config, resume: Path | None) -> files.Adapter | None:
    """Return the LoRA that `lora.init` names; None for a fresh one, or that of a checkpoint.

    Raises:
        AssetError, ConfigError, RunError: As `files.read`.
    """
    # A run with a checkpoint reads its own LoRA; the file it began with may be gone.
    if config.lora.init is None or (resume and files.checkpoints(resume)):
        return None
    return files.read(_initial(config.lora.init))


def settled(config: Config) -> Config:
    """Return the configuration as it is stored with the run."""
    # The window group is written out: a later version may have another default and must compute the
    # same. The folder is left out: the run may be moved, or repeated in another one. So are the
    # trackers: who trains again may have others, and is asked (config/trust.py).
    group = config.gradient.window_group or window_group(config.train.batch_size)
    gradient = config.gradient.model_copy(update={"window_group": group})
    output = config.output.model_copy(update={"dir": None})
    kept = {"gradient": gradient, "output": output, "tracking": TrackingConfig()}
    return config.model_copy(update=kept)


def settings(config: Config, model: Model, estimator: Estimator) -> Settings:
    """Return what a step computes.

    Args:
        config: The complete configuration.
        model: The model, which says what its guidance scale means.
        estimator: Where the gradient flows.
    """
    train = config.train
    optimizer = OptimizerSettings(
        Rates(
            largest=train.learning_rate,
            warmup_steps=train.warmup_steps,
            decay_steps=train.lr_decay_steps,
            schedule=train.lr_schedule,
            cycles=train.lr_cycles,
            power=train.lr_power,
            rules=train.lr_rules,
        ),
        kind=train.optimizer,
        rule=RuleSettings(
            betas=(train.adam_beta1, train.adam_beta2),
            epsilon=train.adam_epsilon,
            weight_decay=train.weight_decay,
        ),
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema_decay,
    )
    return Settings(
        sampler=sampler(config.sample, model.family, model.network),
        estimator=estimator,
        optimizer=optimizer,
        batch_size=train.batch_size,
        window_group=config.gradient.window_group or window_group(train.batch_size),
        rollout_steps=config.gradient.rollout_steps,
        kl_weight=train.kl_weight,
        detach_uncond=config.gradient.detach_uncond,
        seed=train.seed,
        on_nonfinite=train.on_nonfinite,
        nonfinite_limit=train.nonfinite_limit,
    )


def measured(config: Config, mixture: Mixture, device: torch.device, console: Console) -> Mixture:
    """Return the rewards that samples are measured with: those trained on, and held-out ones.

    Args:
        config: The complete configuration.
        mixture: The rewards that are trained on.
        device: Where the others are loaded.
        console: Told which of `eval.rewards` are trained on, and so are no second opinion.
    """
    if both := [name for name in config.eval.rewards if name in config.reward]:
        console.note(f"eval.rewards: {', '.join(both)}: trained on, so not held out")
    held_out = {
        name: RewardConfig.model_validate({"dtype": member.dtype, **member.options})
        for name, member in config.eval.rewards.items()
        if name not in config.reward
    }
    found = Mixture([*mixture.members, *build_mixture(held_out, config.loss, device).members])
    # The size shows when images fill with noise or lose their detail, whatever the rewards say.
    found.extra_metrics.setdefault("jpeg_kilobytes", true_size)
    return found


def add_decoder(config: Config, model: Model, console: Console) -> None:
    """Give the model the decoder of `model.decoder` for training, and say which it is."""
    dtype = resolve_dtype(config.model.dtype, model.device)
    model.tiny_decoder = taesd.load(config.model, model.family, model.decoder, dtype, model.device)
    if (said := taesd.describe(config.model, model.family)) is not None:
        console.note(said)


@contextmanager
def claimed(
    resume: Path | None, wanted: str | None, name: str, accelerator: Accelerator
) -> Iterator[Path]:
    """Yield the run folder, which no other run writes while the block runs.

    The main process makes it, where the run is new, and tells the others which it is.

    Raises:
        AssetError, ConfigError: As `folders.make_run`; also if another process writes the folder.
    """
    with ExitStack() as held:
        chosen: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                run = folders.make_run(wanted, name) if resume is None else resume
                held.enter_context(folders.removed_if_empty(run))
                held.enter_context(locked(run / folders.LOCK, str(run)))
                # Nothing may have come into it before the lock was held.
                if resume is None:
                    folders.new_run(str(run), name)
                chosen = [str(run)]
            except (AlignPropError, OSError) as error:
                # Sent as well: the others would wait for the folder forever.
                chosen = [explained(error) if isinstance(error, OSError) else error]
        chosen = broadcast_object_list(chosen)
        if isinstance(chosen[0], AlignPropError):
            raise chosen[0]
        yield Path(chosen[0])


def inputs(config: Config, model: Model) -> dict[str, str]:
    """Return hashes of the files on which the steps of a run depend, by the keys that name them.

    A set of prompts counts as its prompts. Of rewards it is the file of their code, where that is
    the user's, and files that their options name.
    """
    prompts = "\n".join(load_prompts(config.train.prompts))
    found = {"train.prompts": hashlib.sha256(prompts.encode()).hexdigest()}
    if model.path is not None:
        found["model.id"] = fingerprint(model.path)
    if (folder := taesd.local_folder(config.model)) is not None:
        found["model.decoder"] = fingerprint(folder)
    for name, reward in config.reward.items():
        named = {f"reward.{name}": "" if name.startswith(PYTHON) else name.rpartition(":")[0]}
        named |= {f"reward.{name}.{option}": value for option, value in reward.options.items()}
        for key, value in named.items():
            # os.path, since an option may be any text: it answers False where Path would raise.
            if isinstance(value, str) and os.path.isfile(place := os.path.expanduser(value)):  # noqa: PTH111, PTH113
                found[key] = fingerprint(Path(place))
    return found


def prepare_lora(config: Config, model: Model, found: Path | None, console: Console) -> Config:
    """Put a LoRA into the network: a fresh one, or that of `lora.init`.

    Returns:
        The configuration with the rank, alpha and layers that the LoRA has.
    """
    module, wanted = model.network.module, config.lora
    # A resumed run gets its weights later, by `resume.restore`; here only the shapes must be right.
    if wanted.init is None:
        targets = wanted.target_modules or model.family.target_modules
        lora.inject(
            module,
            rank=wanted.rank,
            alpha=wanted.alpha or wanted.rank,
            target_modules=targets,
            seed=config.train.seed,
            rslora=wanted.rslora,
            dora=wanted.dora,
        )
        have: dict[str, Any] = {"target_modules": targets}
    else:
        # From the checkpoint, where there is one: the file of lora.init may be gone by now.
        start = files.read(found / files.LORA_FILE if found else _initial(wanted.init))
        if wanted.dora and not is_dora(start.layers):
            raise ConfigError(
                f"lora.dora: lora.init: {start.file} is no DoRA",
                hint="leave out lora.dora, or lora.init to begin a DoRA from nothing",
            )
        if start.left_out:
            console.warn(f"{start.file}: its layers of the text encoder are left out")
        # The file's rank and alpha win over lora.rank and lora.alpha. The run's own checkpoints may
        # have the scaling in B; it is put there now, so that it is the same when it is resumed.
        layers = files.layers_as_written(start.layers, model.family.lora_prefix)
        as_in_file = all(layers[n].scaling == f.scaling for n, f in start.layers.items())
        lora.load(module, replace(start, layers=layers), model.id)
        lora.make_trainable(module)
        metadata = lora.adapter_metadata(module)
        have = {
            "rank": metadata["r"],
            "alpha": float(metadata["lora_alpha"]),
            "target_modules": metadata["target_modules"],
            "rslora": metadata["use_rslora"],
            "dora": metadata["use_dora"],
        }
        kind = " (DoRA)" if have["dora"] else " (rsLoRA)" if have["rslora"] else ""
        how = "as in its file" if as_in_file else "its file's scaling multiplied into B"
        what = f"rank {have['rank']}, alpha {have['alpha']:g}{kind}, {how}"
        console.note(f"lora.init: {what}, in its {len(layers)} layers")
    made = wanted.model_copy(update=have)
    if made.dora:
        console.note("ComfyUI does not read a DoRA of this kind; diffusers does")
    return config.model_copy(update={"lora": made})


def _initial(name: str) -> Path:
    """Return the LoRA file that `lora.init` names: a file, a LoRA folder, a checkpoint or a run.

    Raises:
        AssetError: If there is none.
    """
    try:
        return files.locate(name, "lora.init").file
    except AssetError as error:
        raise AssetError(f"lora.init: {error.message}", hint=error.hint) from error
