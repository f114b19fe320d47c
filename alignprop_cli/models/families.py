"""How a model of any family is found and opened."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.device import allow_tf32, resolve_dtype
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.models import loading, places, quantized, single_files
from alignprop_cli.models.base import Family, Model, Sampler, Source
from alignprop_cli.models.embeddings import EmbedsCache, budget
from alignprop_cli.models.guiding import guidance_of, takes_scale
from alignprop_cli.models.published import ARCHITECTURES, PUBLISHED
from alignprop_cli.models.rows import FAMILIES
from alignprop_cli.parsing import ParseError, read_json
from alignprop_cli.paths import read_text, user_path
from alignprop_cli.prompts import cut_note

_PACKAGE = Path(__file__).parent.parent
TINY = _PACKAGE / "tiny" / "pipeline"
"""The embedded model, in diffusers format."""

TINY_FLOW = _PACKAGE / "tiny" / "flow"
"""The embedded rectified flow; a variant of its weights is the few-step model."""

_EMBEDDED: dict[str, tuple[Path, str | None]] = {
    "tiny": (TINY, None),
    "tiny-flow": (TINY_FLOW, None),
    "tiny-fewstep": (TINY_FLOW, "fewstep"),
}
"""Folder of each of `EMBEDDED_MODELS`, and the variant of its weights."""

_MODULAR = "modular_model_index.json"


def register(family: Family) -> None:
    """Add a family, so that its models can be opened; replaces a row of the same class."""
    FAMILIES[family.pipeline_class] = family


def find(config: ModelConfig) -> tuple[Family, Path | None]:
    """Return the family of the model that a configuration names, and where the model is.

    model_index.json names the family. For a hub id whose configurations are not shipped that file
    is downloaded, and nothing else. The family of a single file is that of `model.config`, or shows
    in the names of its tensors.

    Returns:
        The family, and the local folder or file; None for a hub id.

    Raises:
        AssetError: If a path is not there or is no folder in diffusers format, or if the hub cannot
            be reached or refuses.
        ConfigError: If the family is not supported, or an option of the section is not for it.
    """
    # 1. Local files come first: a folder may have the same name as a hub id.
    embedded = _EMBEDDED.get(config.id)
    path = embedded[0] if embedded else user_path(config.id, "model.id")
    if path.is_file():
        places.check(config, "a single file")
        return _obeying(config, _family_of_file(path, config)), path
    if path.is_dir():
        places.check(config, "an embedded model" if embedded else "a folder")
        return _obeying(config, _family(path / "model_index.json", str(path))), path
    # 2. A mistyped path is reported here; the hub would only say that it has no such repository.
    if _looks_like_a_path(config.id):
        raise AssetError(
            f"model.id: no such file or folder: {config.id}",
            hint="give a folder in diffusers format, a .safetensors file, or a hub id; "
            "`--preset tiny` works without any download",
        )
    # 3. The hub, which is not asked where the configurations are shipped.
    places.check(config, "a hub id")
    known = PUBLISHED.get(config.id)
    index = ARCHITECTURES / known / "model_index.json" if known else loading.download_index(config)
    return _obeying(config, _family(index, config.id)), None


def _obeying(config: ModelConfig, family: Family) -> Family:
    """Return the family; refuse an option of the `model` section that it does not have."""
    if config.t5 == "none" and family.t5 != "optional":
        what = "has no T5" if family.t5 == "none" else "cannot do without T5"
        others = [other.name for other in FAMILIES.values() if other.t5 == "optional"]
        raise ConfigError(
            f"model.t5: none: {family.name} {what}; the option is for {', '.join(others)}",
            hint="leave it out"
            if family.t5 == "none"
            else "leave it out: T5 is dropped before the network is loaded",
        )
    return family


def _family_of_file(file: Path, config: ModelConfig) -> Family:
    """Return the family of a single file."""
    named: Family | None = None
    if config.config is not None:
        index = user_path(config.config, "model.config") / "model_index.json"
        if index.is_file():
            named = _family(index, str(index.parent))
            if not named.single_files:
                raise single_files.not_loaded(
                    file, f"model.config is {named.name}", str(index.parent)
                )
    found = FAMILIES[single_files.pipeline_class(file)]
    if config.config is not None:
        single_files.check_marks(file, user_path(config.config, "model.config"))
    # Two rows may have the same parts under other names.
    if named is not None and named.load_parts is not found.load_parts:
        raise ConfigError(f"model.config: it is {named.name}, but {file} is {found.name}")
    return named or found


def _looks_like_a_path(name: str) -> bool:
    # A hub id is owner/name and nothing else.
    owner_and_name = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    return not owner_and_name or Path(name).suffix in {".safetensors", ".ckpt"}


def _family(index: Path, place: str) -> Family:
    """Return the family that a model_index.json names."""
    if not index.exists() and (index.parent / _MODULAR).exists():
        raise ConfigError(f"model.id: {place} is a ModularPipeline ({_MODULAR}): {_supported()}")
    try:
        found = read_json(read_text(index, "model.id"))
        name = found["_class_name"]
    except (AssetError, ParseError, KeyError, TypeError) as error:
        raise AssetError(
            f"{place}: not a model in diffusers format: cannot read {index.name}",
            hint=f"the folder must hold {index.name} and a folder for each part that it names",
        ) from error
    # A pipeline with its own code has a list [module, class] there.
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"model.id: {place} is a {str(name)[:100]}; {_supported()}")
    family = FAMILIES[name]
    # So diffusers marks models that were distilled without guidance, and turns it off for them.
    return replace(family, guides=False) if found.get("is_distilled") is True else family


def _supported() -> str:
    named = ", ".join(f"{f.pipeline_class} ({f.name})" for f in FAMILIES.values())
    return f"supported: {named}"


def open_model(
    config: ModelConfig,
    prompts: Iterable[str],
    device: torch.device,
    note: Callable[[str], object] = lambda _: None,
) -> Model:
    """Load the base model that the configuration names, frozen, with the prompts encoded.

    The text encoders are loaded, used and dropped before network and decoder are loaded, so the
    device never holds both.

    Args:
        config: The `model` section.
        prompts: All prompts that will ever be used, the negative prompt among them; each distinct
            one is encoded once. Without any, no text encoder is loaded.
        device: Where the weights go.
        note: Is told if some prompts are longer than what the model reads.

    Raises:
        AssetError: If a file is missing or damaged, or the hub cannot be reached or refuses.
        ConfigError: If the model is of a family that is not supported, or cannot be trained.
    """
    family, path = find(config)
    if not family.guides:
        note(f"{config.id} was distilled without guidance: sample.guidance_scale is not used")
    # 1. All files are fetched first, so that missing ones are reported before any work is done; and
    #    what cannot be done at all before they are.
    quantized.check(config.quantize, device)
    source = source_of(config, path, device)
    path, config = source.path, source.config
    allow_tf32(source.dtype)

    # 2. The text encoders live within this call. They can hold cycles of references, which only the
    #    collector frees; the cache is emptied so that other sizes can be allocated there.
    embeds = _encode(family, source, list(dict.fromkeys(prompts)), device, note)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    # 3. What stays for the whole run.
    parts = family.load_parts(source, device)
    if family.true_guidance and not takes_scale(parts.network):
        note(f"{config.id} takes no guidance scale: sample.guidance_scale is not used")
    return Model(
        id=config.id,
        family=family,
        network=parts.network,
        decoder=parts.decoder,
        embeds=embeds,
        longest_prompt=embeds.longest,
        fingerprint=fingerprint(parts.network.module),
        path=path,
    )


def source_of(config: ModelConfig, path: Path | None, device: torch.device) -> Source:
    """Return where a model is, downloaded if it has to be."""
    path = path or loading.download(config)
    if config.id in _EMBEDDED:
        config = config.model_copy(update={"variant": _EMBEDDED[config.id][1]})
    return Source(config, path, resolve_dtype(config.dtype, device), device)


def _encode(
    family: Family,
    source: Source,
    prompts: list[str],
    device: torch.device,
    note: Callable[[str], object],
) -> EmbedsCache:
    """Return the embeddings of each prompt, on the CPU or on disk.

    The encoders are local to this function, so nothing holds them when it returns.
    """
    kept = EmbedsCache(budget())
    if not prompts:
        return kept
    encoders = family.load_text_encoders(source, device)
    # A family need not say what its encoders cut.
    cuts: Callable[[str], bool] = getattr(encoders, "cuts", lambda _: False)
    if cut := [prompt for prompt in prompts if cuts(prompt)]:
        note(cut_note(source.config.id, cut, len(prompts)))
    cpu = torch.device("cpu")
    # One by one: the embeddings of thousands of prompts would not fit the device together.
    for prompt in prompts:
        kept.add(prompt, encoders.encode([prompt])[0].to(cpu))
    if kept.filed_bytes:
        note(kept.describe())
    return kept


def fingerprint(network: torch.nn.Module) -> str:
    """Return a hash of a network's architecture, which may be on the meta device."""
    # Names and shapes, not values: a fine-tuned checkpoint accepts the LoRAs of its base.
    lines = sorted(f"{name} {shape}" for name, shape in quantized.full_shapes(network).items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def sampler(config: SampleConfig, family: Family, network: object = None) -> Sampler:
    """Return how images are sampled from a model of a family.

    Args:
        config: The `sample` section.
        family: Says what its guidance scale means.
        network: Its network, which may take the guidance scale as an input; None: it does not.

    Raises:
        ConfigError: If something is chosen that the family or the network does not have.
    """
    choices: dict[str, str] = {}
    for key, chosen, known in (
        ("scheduler", config.scheduler, family.schedulers),
        ("spacing", config.spacing, family.spacings),
    ):
        if chosen not in ("model", *known):
            raise ConfigError(
                f"sample.{key}: {chosen} is not for {family.name}; it has {', '.join(known)}"
                if known
                else f"sample.{key}: {family.name} has no other than `model`, got {chosen}"
            )
        choices |= {key: chosen} if chosen != "model" else {}
    return Sampler(
        num_inference_steps=config.num_inference_steps,
        guidance=guidance_of(config, family, network),
        eta=config.eta,
        height=config.height,
        width=config.width,
        negative_prompt=config.negative_prompt,
        choices=choices,
    )
