"""What `alignprop evaluate` does once the configuration is known: sample, measure, compare.

Imported only when needed: it brings torch and diffusers with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alignprop_cli.config.schema import Config
from alignprop_cli.console import Console
from alignprop_cli.device import make_accelerator
from alignprop_cli.errors import ConfigError
from alignprop_cli.evaluation import layouts
from alignprop_cli.evaluation.compare import Evaluation, Identity
from alignprop_cli.evaluation.draw import (
    Allocate,
    Samples,
    choose_samples,
    draw_shared,
    in_a_file,
    in_memory,
)
from alignprop_cli.evaluation.results import show, write
from alignprop_cli.evaluation.scorers import Layout
from alignprop_cli.evaluation.trackers import Told
from alignprop_cli.lora import files, fit
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.factors import is_dora
from alignprop_cli.lora.files import Adapter, Located
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import find, fingerprint, open_model
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning.sampling import SamplingNeed, check_memory
from alignprop_cli.prompts import Entry, hashes, load_entries
from alignprop_cli.publishing.request import Publish, Published
from alignprop_cli.rewards.jpeg import true_size
from alignprop_cli.rewards.mixture import Mixture, build_mixture
from alignprop_cli.storage import write_whole
from alignprop_cli.tracking import follow


@dataclass(frozen=True)
class Variant:
    """One LoRA at one strength.

    Args:
        name: Its name in tables and of the folder of its images.
        located: Its file.
        strength: Factor on its update; 1 is as trained.
        base_until: Share of the chain's calls, from the noise on, that run without it.
        at: Its x value on the curve of the rewards; None if no curve is plotted.
    """

    name: str
    located: Located
    strength: float = 1.0
    at: float | None = None
    base_until: float = 0.0


def variants(
    located: Sequence[Located],
    strengths: Sequence[float] | None,
    base_until: Sequence[float] | None = None,
) -> list[Variant]:
    """Return what is compared with the base model, with names that can be folders.

    Args:
        located: The LoRAs; exactly one where one of the others is given.
        strengths: Strengths of the LoRA; None is as trained.
        base_until: Shares of the chain that run without it; None is 0. Only one of the two may have
            several values.
    """
    shares = base_until or [0.0]
    if len(shares) > 1:
        strength = strengths[0] if strengths else 1.0
        return [
            Variant(f"base until {_short(share)}", located[0], strength, at=share, base_until=share)
            for share in shares
        ]
    if strengths is not None:
        return [
            Variant(f"strength {_short(s)}", located[0], s, at=s, base_until=shares[0])
            for s in strengths
        ]
    if len(located) == 1 and base_until is not None:
        return [Variant(f"base until {_short(shares[0])}", located[0], base_until=shares[0])]
    if len(located) == 1:
        return [Variant("ema" if located[0].is_average else "tuned", located[0])]
    # No dots at the ends: `..` would be another folder. Cut, since no folder's name is longer than
    # 255 bytes.
    labels = [re.sub(r"[^\w.-]+", "-", found.label)[:60].strip(".") or "lora" for found in located]
    # Numbered if two have the same label, or one has that of the base model or of the key that
    # results.json has beside the models; some file systems take large letters for small ones.
    taken = {"base", "trained_on"}
    if len(taken | {label.casefold() for label in labels}) < len(taken) + len(labels):
        labels = [f"{number}-{label}" for number, label in enumerate(labels, start=1)]
    return [Variant(label, found) for label, found in zip(labels, located, strict=True)]


def _short(number: float) -> str:
    """Return the shortest text that no other number has."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def run_evaluation(
    config: Config,
    console: Console,
    chosen: Sequence[Variant],
    folder: Path,
    *,
    replace: bool,
    axis: str = "strength of the LoRA",
    publish: Publish = Published,
    layout: Layout | None = None,
) -> None:
    """Sample, measure, compare, write the folder, and print the result.

    Args:
        config: The complete configuration.
        console: For people and for the result.
        chosen: The LoRAs; without any, only the base model is sampled.
        folder: Where the result is written.
        replace: Whether a folder of this name is replaced, also one that appears meanwhile.
        axis: Title of the curve's x axis.
        publish: Exports or uploads what was evaluated.
        layout: The folders of a benchmark's own scorer that are written too.

    Raises:
        AlignPropError: Whatever is wrong with the model, a LoRA, the rewards or the images; what
            went wrong in publishing, once the result is shown.
    """
    # Everything that may be refused is read before anything is loaded or sampled.
    follow.check(config.tracking)
    entries = load_entries(config.eval.prompts)
    if layout is not None:
        wanted = (config.eval.images, config.eval.images_per_prompt)
        layouts.check(layout, config.eval.prompts, entries, *wanted)
    adapters = _read(chosen, config)
    accelerator = make_accelerator()
    console = console if accelerator.is_main_process else Console(quiet=True)
    # Several processes send each other their images, and so have all of them in memory.
    disk = folder.resolve().parent if accelerator.num_processes == 1 else None
    need = check_memory(config, accelerator.device, models=1 + len(chosen), disk=disk)
    allocate = in_a_file(disk) if need.on_disk and disk is not None else in_memory
    if layout is not None:
        _say_size(layout, need, 1 + len(chosen), config, len(entries), console)
    published = Published()
    with Told(config, console, folder, is_main=accelerator.is_main_process) as told:
        device = accelerator.device
        result = _evaluate(config, console, chosen, adapters, entries, device, axis, allocate)
        if accelerator.is_main_process:

            def fill(made: Path) -> None:
                write(result, made)
                if layout is not None:
                    layouts.write(layout, result, entries, made)

            write_whole(folder, fill, replace=replace)
            told.tell(result)
            published = publish()
            show(console, result, folder, published, layout)
    # The result is shown and told to the trackers, whatever failed since.
    published.check()


def _say_size(
    layout: Layout,
    need: SamplingNeed,
    models: int,
    config: Config,
    prompts: int,
    console: Console,
) -> None:
    """Say how much a benchmark is, before it is begun, and what of it is left out."""
    settings = config.eval
    # Which samples they are does not depend on the texts.
    samples = choose_samples([""] * prompts, settings.images, settings.images_per_prompt)
    count = models * len(samples)
    # A PNG is never larger than its pixels, but for a few bytes.
    each = f", {len(samples)} with each of {models} models" if models > 1 else ""
    console.note(
        f"{count} images of {need.width} x {need.height} pixels{each}; "
        f"at most {count * need.kept / 2**20:,.1f} MiB as files"
    )
    said = layouts.remark(layout, samples, prompts)
    if said is not None:
        console.warn(said)


def _evaluate(
    config: Config,
    console: Console,
    chosen: Sequence[Variant],
    adapters: Mapping[Path, Adapter],
    entries: Sequence[Entry],
    device: torch.device,
    axis: str,
    allocate: Allocate,
) -> Evaluation:
    """Load the model, sample with every LoRA, and compare."""
    started, settings = time.perf_counter(), config.eval
    # 1. The model, once the LoRAs are known to fit it.
    prompts, prompt_files = [entry.prompt for entry in entries], hashes(settings.prompts)
    samples = choose_samples(prompts, settings.images, settings.images_per_prompt)
    wanted = [*(sample.prompt for sample in samples), config.sample.negative_prompt]
    model = open_model(config.model, wanted, device, console.note)
    _check(adapters.values(), model.network.module, model.fingerprint, model.id)
    _say(adapters.values(), config, console)
    mixture = _mixture(config, device, wanted, console)
    # 2. The same samples with every model.
    # For `compare.diversity`, which needs several images of a prompt.
    features = mixture.features if len({s.prompt_index for s in samples}) < len(samples) else None
    kept = {"features": features, "allocate": allocate}
    draw = partial(draw_shared, model, samples, mixture, config, console, **kept)
    sampled = _draw_all(draw, model, [(v, adapters[v.located.file]) for v in chosen])
    # 3. The comparison.
    return Evaluation(
        model={"id": model.id, "fingerprint": model.fingerprint},
        variants={v.name: _identity(v, adapters[v.located.file]) for v in chosen},
        prompt_set=settings.prompts,
        seed=settings.seed,
        sample=config.sample.model_dump(mode="json"),
        axis=axis,
        curve=[variant.at for variant in chosen if variant.at is not None],
        sampled=sampled,
        # As read at the beginning: the file may have changed since, or be gone.
        group_of={i: entry.group for i, entry in enumerate(entries) if entry.group},
        seconds=time.perf_counter() - started,
        prompt_files=prompt_files,
    )


def _mixture(
    config: Config, device: torch.device, prompts: Sequence[str], console: Console
) -> Mixture:
    """Return the rewards to measure, and the size of the images as JPEG files with them."""
    mixture = build_mixture(config.reward, config.loss, device)
    # The size shows when images fill with noise or lose their detail, whatever the rewards say.
    mixture.extra_metrics.setdefault("jpeg_kilobytes", true_size)
    for said in mixture.cut_notes(set(prompts)):
        console.note(said)
    return mixture


def _draw_all(
    draw: Callable[..., Samples], model: Model, chosen: Sequence[tuple[Variant, Adapter]]
) -> dict[str, Samples]:
    """Sample with every model, the base model first.

    Args:
        draw: Samples with the model in its present state; its arguments are a name to show, and
            `base_until`.
        model: The base model; it has the last LoRA afterwards.
        chosen: The LoRAs.
    """
    module, loaded = model.network.module, None
    sampled = {"base": draw("base")}
    for variant, adapter in chosen:
        # A file that is used at several strengths is loaded once.
        if adapter is not loaded:
            if loaded is not None:
                lora.unload(module)
            lora.load(module, adapter, model.id)
            loaded = adapter
        lora.set_strength(module, variant.strength)
        sampled[variant.name] = draw(variant.name, base_until=variant.base_until)
    return sampled


def _identity(variant: Variant, adapter: Adapter) -> Identity:
    trained_on = adapter.header.get("alignprop.rewards", "").split(",")
    return Identity(
        file=str(adapter.file.resolve()),
        sha256=adapter.sha256,
        strength=variant.strength,
        base_until=variant.base_until,
        trained_on=[name for name in trained_on if name],
        base_model=adapter.header.get("alignprop.base_model"),
    )


def _read(chosen: Sequence[Variant], config: Config) -> dict[Path, Adapter]:
    """Return the LoRAs by file; what does not fit the model is refused before that is loaded."""
    adapters = {file: files.read(file) for file in {v.located.file: None for v in chosen}}
    for variant in chosen:
        if variant.strength != 1.0 and is_dora(adapters[variant.located.file].layers):
            raise ConfigError(
                f"--scale {variant.strength:g}: {variant.located.file} is a DoRA, which has no "
                "strengths: with 0 it would not be the base model"
            )
    _, path = find(config.model)
    # The configuration of a single file is a guess, which is checked once it is loaded.
    if path is None or not path.is_file():
        network = meta_model(config.model, torch.float32).parts.network.module
        _check(adapters.values(), network, fingerprint(network), config.model.id)
    return adapters


def _check(
    adapters: Iterable[Adapter], network: torch.nn.Module, architecture: str, model_id: str
) -> None:
    """Refuse LoRAs that record another architecture than the network's, or do not fit it."""
    for adapter in adapters:
        recorded = adapter.header.get("alignprop.base_fingerprint")
        trained_on = adapter.header.get("alignprop.base_model")
        if recorded and recorded != architecture:
            why = fit.misfit(network, adapter) or (
                "the LoRA's own layers fit, but the networks differ in others"
            )
            raise ConfigError(
                f"{adapter.file}: this LoRA was trained on {trained_on}, whose layers are not "
                f"those of {model_id}: {why}",
                hint="give the model it was trained on, or another one of the same architecture, "
                "with --model",
            )
        fit.check(network, adapter, model_id)


def _say(adapters: Iterable[Adapter], config: Config, console: Console) -> None:
    """Say which LoRAs sample with another model than they were trained on, and what is left out."""
    sample = config.sample
    for adapter in adapters:
        trained_on = adapter.header.get("alignprop.base_model")
        if trained_on and trained_on != config.model.id:
            console.note(
                f"{adapter.file} was trained on {trained_on}, and is used with {config.model.id}: "
                f"{sample.num_inference_steps} steps, guidance {sample.guidance_scale:g}"
            )
        if adapter.left_out:
            console.warn(f"{adapter.file}: its layers of the text encoder are left out")
