"""The plan of a run: what its parts need, the memory there is, and the cheapest plan that fits."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from alignprop_cli.config.schema import Config, RewardConfig
from alignprop_cli.device import resolve_dtype
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.meta import conditioning, outline
from alignprop_cli.planning import footprint
from alignprop_cli.planning.estimate import GIB, Budget, Footprint, Work
from alignprop_cli.planning.plan import Plan, make_plan
from alignprop_cli.prompts import count_prompts
from alignprop_cli.rewards import meta as reward_outline
from alignprop_cli.rewards import registry

_UNITS = {"": 1, "B": 1, "MB": 10**6, "MIB": 2**20, "GB": 2**30, "GIB": 2**30}
"""Cards are sold in GB and hold GiB."""

_ENCODED_FIRST = 2048


def parse_memory(text: str) -> int:
    """Return the bytes that a text such as 12GB, 800MiB or 6.5 GiB names.

    Raises:
        ConfigError: If it names none.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    try:
        size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if not size > 0.0:
        raise ConfigError(f"--gpu-memory: expected something like 12GB, got {text!r}")
    return int(size)


def plan(config: Config, *, processes: int, budget: Budget) -> tuple[Plan, Footprint | None]:
    """Return the cheapest plan that fits, and what it was chosen by.

    Where everything is given nothing is counted.

    Raises:
        ConfigError: If the batch cannot be divided.
        RunError: If nothing fits.
        AssetError: If the configuration of the model cannot be had.
    """
    given = (
        config.train.micro_batch,
        config.gradient.checkpoint_network,
        config.gradient.checkpoint_decoder,
        config.gradient.checkpoint_reward,
    )
    found = measure(config, budget.device_type) if "auto" in given else None
    return make_plan(config, processes=processes, footprint=found, budget=budget), found


def measure(config: Config, device_type: str) -> Footprint:
    """Count what the parts of a run need, on the meta device.

    Args:
        config: The complete configuration.
        device_type: Where it will run: `cuda` or `cpu`.
    """
    dtype = _dtype(config.model.dtype, device_type)
    model = outline(config.model, dtype, device_type)
    lora.inject(
        model.network,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        target_modules=config.lora.target_modules,
        seed=0,
    )
    shape = model.latent_shape(config.sample.height, config.sample.width)
    factor = model.pipeline.vae_scale_factor
    image_shape = (3, shape[1] * factor, shape[2] * factor)
    reward, weights, uncounted = _rewards(config.reward, image_shape, device_type)
    frozen = {
        "network weights": _bytes(model.network) - 4 * _trained(model.network),
        "VAE weights": _bytes(model.pipeline.vae),
        "reward weights": weights,
    }
    if not encodes_first(config, device_type):
        frozen["text encoder weights"] = _bytes(model.pipeline.text_encoder)
    return footprint.measure(
        model,
        conditioning(model, 1),
        guidance_scale=config.sample.guidance_scale,
        latent_shape=shape,
        device_type=device_type,
        weights=frozen,
        reward=reward,
        uncounted=uncounted,
    )


def encodes_first(config: Config, device_type: str) -> bool:
    """Return whether all prompts are encoded before training, and their encoder leaves the GPU.

    Very many would take longer to encode than the memory is worth.
    """
    if device_type == "cpu":
        return False
    return count_prompts([config.train.prompts, config.eval.prompts]) <= _ENCODED_FIRST


def _dtype(name: str, device_type: str) -> torch.dtype:
    """Return the precision of the frozen weights on a device that may not be here."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16 if name == "auto" else getattr(torch, name)
    return resolve_dtype(name, torch.device(device_type))


def _rewards(
    rewards: Mapping[str, RewardConfig], image_shape: tuple[int, int, int], device_type: str
) -> tuple[dict[bool, Work], int, tuple[str, ...]]:
    """Return what the rewards need without and with recomputation, their weights, and the rest."""
    parts: dict[bool, list[Work]] = {False: [], True: []}
    weights = 0
    uncounted: list[str] = []
    for name, config in rewards.items():
        dtype: torch.dtype = getattr(torch, config.dtype)
        weights += reward_outline.parameters(name, config.options) * dtype.itemsize
        scores = _scores(name, config, dtype)
        if scores is None:
            uncounted.append(name)
            continue
        for again, score in scores.items():
            networks = score.networks if isinstance(score, reward_outline.Outline) else ()
            there = [t for n in networks for t in (*n.parameters(), *n.buffers())]
            work = footprint.count_reward(score, image_shape, device_type=device_type, there=there)
            parts[again].append(work)
    total = {again: footprint.add(*works) for again, works in parts.items()}
    return total, weights, tuple(uncounted)


def _scores(
    name: str, config: RewardConfig, dtype: torch.dtype
) -> dict[bool, footprint.Score] | None:
    """Return a reward for the meta device, by whether its blocks are computed again.

    None where its network is not known before it is loaded.
    """
    plain = reward_outline.outline(name, config.options, dtype)
    again = reward_outline.outline(name, config.options, dtype)
    if plain is not None and again is not None:
        again.recompute()
        return {False: plain, True: again}
    if not _is_small(name):
        return None
    reward = registry.build(name, config.options)

    def score(images: Tensor) -> Tensor:
        return reward(images, [""] * len(images))

    return {False: score, True: score}


def _is_small(name: str) -> bool:
    """Return whether a reward is a shipped one without a network."""
    spec = registry.SHIPPED.get(name)
    return spec is not None and spec.target.split(":")[0].endswith((".pixel", ".jpeg"))


def _trained(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in lora.trainable(network))


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def describe(plan: Plan, budget: Budget) -> list[str]:
    """Return the plan and where its memory goes, a line each."""
    lines = [f"plan: {plan.describe()}"]
    if plan.estimate is not None:
        parts = sorted(plan.estimate.parts.items(), key=lambda item: -item[1])
        where = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.01 * GIB)
        over = plan.estimate.flops / plan.estimate.floor
        lines += [
            f"memory: {plan.estimate.peak / GIB:.2f} of {budget.bytes / GIB:.2f} GiB "
            f"({budget.source}): {where or 'little'}",
            f"work: {plan.estimate.flops / 1e12:.3g} TFLOP a step and process, "
            f"{over:.2f} x what it takes with nothing computed twice",
        ]
    return lines
