"""From a configuration to the values that a plan is made from, which the rest of planning takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from alignprop_cli.config.gradient import GradientConfig
from alignprop_cli.config.schema import Config
from alignprop_cli.device import resolve_dtype
from alignprop_cli.errors import ConfigError
from alignprop_cli.estimators import (
    Estimator,
    draft_lv,
    drtune,
    full,
    gaussian_k,
    last_k,
    leap,
    random_k,
    refl,
    sparse,
    window_group,
)
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import Adapter
from alignprop_cli.models import families, taesd
from alignprop_cli.models.base import Decoder, MetaModel, Sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import footprint
from alignprop_cli.planning.estimate import GIB, NOTHING, Budget, Footprint, Part
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.speed import Times
from alignprop_cli.planning.trained import bytes_each
from alignprop_cli.planning.work import Work
from alignprop_cli.rewards import registry

# The estimator that each value of `gradient.method` means.
_ESTIMATORS: Mapping[str, Callable[[GradientConfig], Estimator]] = {
    "full": lambda gradient: full(),
    "last_k": lambda gradient: last_k(gradient.k),
    "random_k": lambda gradient: random_k(gradient.k_min, gradient.k_max),
    "gaussian_k": lambda gradient: gaussian_k(gradient.mean, gradient.std),
    "draft_lv": lambda gradient: draft_lv(gradient.copies, own_end=gradient.own_end),
    "refl": lambda gradient: refl(**_span(gradient)),
    "drtune": lambda gradient: drtune(gradient.calls, **_span(gradient)),
    "leap": lambda gradient: leap(gradient.alpha, gradient.tau, **_span(gradient)),
    "sparse": lambda gradient: sparse(
        gradient.calls, gradient.late_bias, gradient.rescale, **_span(gradient)
    ),
}

# Weights of other parts than the network.
_OTHER_WEIGHTS = "decoder weights", "reward weights"

# The option that shortens the longest path, for the hint when no plan fits.
_FEWER_CALLS = {
    "last_k": "a smaller gradient.k",
    "random_k": "a smaller gradient.k_max",
    "draft_lv": "a smaller gradient.copies",
    "drtune": "a smaller gradient.calls",
    "sparse": "a smaller gradient.calls",
}


def make_estimator(gradient: GradientConfig) -> Estimator:
    """Return the estimator that the `gradient` section names."""
    return replace(_ESTIMATORS[gradient.method](gradient), endpoint=gradient.endpoint)


def _span(gradient: GradientConfig) -> dict[str, tuple[float, float]]:
    """Return the span as an argument, where the estimator's own is not wanted."""
    return {} if gradient.span is None else {"span": gradient.span}


def plan_request(config: Config, processes: int, estimator: Estimator | None = None) -> PlanRequest:
    """Return the request for a plan.

    Args:
        config: The complete configuration.
        processes: Number of processes that work on one step.
        estimator: Where the gradient flows; None takes the one that the configuration names.
    """
    train, gradient = config.train, config.gradient
    estimator = estimator or make_estimator(gradient)
    group = gradient.window_group or window_group(train.batch_size)
    return PlanRequest(
        batch_size=train.batch_size,
        processes=processes,
        num_inference_steps=config.sample.num_inference_steps,
        estimator=estimator,
        rollout_steps=gradient.rollout_steps,
        compares=train.kl_weight > 0.0,
        rollout_batch=train.rollout_batch,
        micro_batch=train.micro_batch,
        decode_batch=train.decode_batch,
        checkpoint_network=gradient.checkpoint_network,
        checkpoint_decoder=gradient.checkpoint_decoder,
        checkpoint_reward=gradient.checkpoint_reward,
        group=group if estimator.calls.uniforms else None,
        advice=_advice(config),
    )


def _advice(config: Config) -> dict[str, str]:
    """Return the options that make a part of the estimate smaller, by the name of the part."""
    # Only options that change something else than the plan: the plan itself has been searched.
    advice: dict[str, str] = {}
    if make_estimator(config.gradient).longest(config.sample.num_inference_steps) > 1:
        fewer = _FEWER_CALLS.get(config.gradient.method, "gradient.method: last_k")
        advice["stored calls"] = fewer
    if not config.gradient.detach_uncond and config.sample.guidance_scale > 1.0:
        advice["network"] = "gradient.detach_uncond: true (another gradient)"
    if config.model.vae_tile_size is None:
        advice["decoder"] = "model.vae_tile_size: 256 (images change a little)"
    elif config.model.decoder == taesd.FULL and families.find(config.model)[0].taesd is not None:
        advice["decoder"] = "model.decoder: taesd (approximate, in training alone)"
    if config.model.quantize == "none":
        advice["network weights"] = "model.quantize: int8 (images change a little)"
    if any(reward.dtype == "float32" for reward in config.reward.values()):
        advice["reward weights"] = "bfloat16 as the dtype of a reward with a network"
    return advice


def measure(
    config: Config,
    device_type: str,
    initial: Adapter | None = None,
    *,
    base: Footprint = NOTHING,
    part: Part | None = None,
) -> Footprint:
    """Count what the parts of a step need, on the meta device.

    Args:
        config: The complete configuration.
        device_type: Device that it will run on: `cuda` or `cpu`.
        initial: The LoRA that is trained further, whose layers and ranks count instead of those of
            the configuration; None for a fresh one.
        base: What is known of the other parts.
        part: What is counted; None counts all.

    Raises:
        AssetError: If the configuration of the model or of a reward's network cannot be read or
            downloaded.
        ConfigError: If the model is not supported, cannot sample images of this size, or has not
            the layers of `initial`.
    """
    family, _ = families.find(config.model)
    dtype = dtype_on(config.model.dtype, device_type)
    model = meta_model(config.model, dtype)
    sampler = families.sampler(config.sample, family, model.parts.network)
    found = base
    if part in ("network", None):
        usual = family.target_modules
        found = _with_network(found, config, model, sampler, device_type, initial, usual)
    if part in ("decoder", None):
        tiny = taesd.on_meta(config.model, family, model.parts.decoder, dtype)
        found = _with_decoder(found, config, model, sampler, device_type, tiny)
    if part in ("reward", None):
        shape = model.parts.network.latent_shape(sampler.height, sampler.width)
        found = _with_rewards(found, config, model.image_size(shape), shape, device_type)
    return found


def _with_network(
    found: Footprint,
    config: Config,
    model: MetaModel,
    sampler: Sampler,
    device_type: str,
    initial: Adapter | None,
    usual: Sequence[str] | str,
) -> Footprint:
    """Return a footprint with the network counted, with the LoRA that will be trained."""
    # Its values (and so the seed) do not matter. The text encoders are not counted: they are
    # dropped before the network is loaded.
    module = model.parts.network.module
    others = {key: size for key, size in found.weights.items() if key in _OTHER_WEIGHTS}
    # Before the LoRA, whose weights are counted with the optimiser.
    found = replace(found, weights={"network weights": _bytes(module), **others})
    _put_lora(module, config, initial, usual)
    found = footprint.with_calls(
        found, model, sampler, device_type, detach_uncond=config.gradient.detach_uncond
    )
    numels = [parameter.numel() for parameter in lora.trainable(module)]
    averaged = config.train.ema_decay is not None
    each = bytes_each(config.train.optimizer, numels, averaged=averaged)
    return replace(found, trained_each=each)


def _with_decoder(
    found: Footprint,
    config: Config,
    model: MetaModel,
    sampler: Sampler,
    device_type: str,
    tiny: Decoder | None,
) -> Footprint:
    """Return a footprint with the decoder counted."""
    weights = _bytes(model.parts.decoder.module) + (_bytes(tiny.module) if tiny else 0)
    found = replace(found, weights={**found.weights, "decoder weights": weights})
    # Nothing is decoded in a step where all rewards take latents.
    decodes = not all(registry.takes_latents(name) for name in config.reward)
    return footprint.with_decoder(found, model, sampler, device_type, tiny=tiny, decodes=decodes)


def _put_lora(
    network: torch.nn.Module,
    config: Config,
    initial: Adapter | None,
    usual: Sequence[str] | str,
) -> None:
    """Put the LoRA that will be trained into the network; `usual` are the family's layers."""
    if initial is not None:
        lora.load(network, initial, config.model.id)
        lora.make_trainable(network)
        return
    lora.inject(
        network,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        target_modules=config.lora.target_modules or usual,
        seed=0,
        rslora=config.lora.rslora,
        dora=config.lora.dora,
    )


def dtype_on(name: str, device_type: str) -> torch.dtype:
    """Return the precision of the frozen weights on a device that this machine may not have."""
    # The card cannot be asked; every card since Ampere (2020) has bfloat16.
    if device_type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16 if name == "auto" else getattr(torch, name)
    return resolve_dtype(name, torch.device(device_type))


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in footprint.held(module))


def _with_rewards(
    found: Footprint,
    config: Config,
    image_size: tuple[int, int],
    latent_shape: tuple[int, int, int],
    device_type: str,
) -> Footprint:
    """Return a footprint with the rewards counted, by whether their blocks are recomputed."""
    parts: dict[bool, list[Work]] = {False: [], True: []}
    weights = _held_out_bytes(config)
    uncounted: list[str] = []
    for name, chosen in config.reward.items():
        dtype: torch.dtype = getattr(torch, chosen.dtype)
        for recompute in (False, True):
            # Built twice, since recomputation cannot be switched off again.
            reward = registry.on_meta(name, chosen.options, dtype)
            if reward is None:
                uncounted.append(name)
                break
            if recompute:
                reward.recompute()
            else:
                weights += reward.parameters * dtype.itemsize
            shape = latent_shape if registry.takes_latents(name) else (3, *image_size)
            work = footprint.count(reward, shape, there=reward.tensors, device_type=device_type)
            parts[recompute].append(work)
    # Their graphs are all alive until the mixture's loss goes back, so their needs add up.
    total = {recompute: footprint.add(*works) for recompute, works in parts.items()}
    weights_of = {**found.weights, "reward weights": weights}
    return replace(found, weights=weights_of, reward=total, uncounted=tuple(uncounted))


def _held_out_bytes(config: Config) -> int:
    """Return the bytes of the weights of `eval.rewards`, which are on the device all the time."""
    return sum(
        registry.parameters(name, member.options) * getattr(torch, member.dtype).itemsize
        for name, member in config.eval.rewards.items()
        if name not in config.reward
    )


def parse_memory(text: str, where: str = "--gpu-memory") -> int:
    """Return the bytes that a text such as 12GB, 800MiB or 6.5 GiB means.

    Args:
        text: From the user.
        where: The option or key that it is from, for the message.

    Raises:
        ConfigError: If it is no size, or 0.
    """
    # The pattern is needed: ByteSize ignores what follows a number, so 1.2.3GB would be one byte.
    # Cards are sold in GB and hold GiB.
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    size = 0
    if match is not None:
        unit = "GiB" if match[2].upper() == "GB" else match[2]
        with suppress(ValidationError):  # an unknown unit
            size = TypeAdapter(ByteSize).validate_python(match[1] + unit)
    if size <= 0:
        raise ConfigError(f"{where}: expected something like 12GB, got {text!r}")
    return int(size)


def describe(plan: Plan, budget: Budget, times: Times | None = None) -> list[str]:
    """Return the lines that show the plan, where its memory goes, and how much work it is.

    Args:
        plan: The plan.
        budget: What it was made for.
        times: By which it was chosen; None where it was by operations.
    """
    lines = [f"plan: {plan.describe()}"]
    if plan.estimate is not None:
        parts = sorted(plan.estimate.parts.items(), key=lambda item: -item[1])
        where = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.01 * GIB)
        over = plan.estimate.flops / plan.estimate.floor
        lines += [
            f"memory: {plan.estimate.peak / GIB:.2f} of {budget.bytes / GIB:.2f} GiB "
            f"({budget.source}): {where or 'little'}",
            f"work: {plan.estimate.flops / 1e12:.3g} TFLOP a step and process, "
            f"{over:.2f} x what it takes with nothing recomputed",
        ]
    if plan.seconds is not None and times is not None:
        lines.append(
            f"time: {plan.seconds:.1f} s a step, {plan.images_per_hour:,.0f} images an hour "
            f"({times.source})"
        )
    return lines
