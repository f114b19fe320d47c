"""What makes a configuration fit where no plan of it does: the fewest changes, each counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignprop_cli.config.schema import Config
from alignprop_cli.errors import AlignPropError, RunError
from alignprop_cli.models import families, taesd
from alignprop_cli.planning.choose import fits_at_all
from alignprop_cli.planning.estimate import Budget, Footprint, Part
from alignprop_cli.planning.plan import PlanRequest
from alignprop_cli.rewards import registry

# One for each part.
_MOST_OPTIONS = 3


@dataclass(frozen=True)
class _Option:
    """A change of the configuration.

    Args:
        part: What of the footprint it makes smaller.
        values: What is set, by dotted key.
    """

    part: Part
    values: Mapping[str, Any]

    @property
    def flags(self) -> str:
        return " ".join(f"--set {key}={value}" for key, value in self.values.items())


def explained(
    error: RunError,
    config: Config,
    request: PlanRequest,
    footprint: Footprint,
    budget: Budget,
    measure: Callable[..., Footprint],
    counted: dict[str, Footprint | None] | None = None,
) -> RunError:
    """Return the error that no plan fits, with the options that would make one fit.

    Args:
        error: As `choose.make_plan` raised it.
        config: The complete configuration.
        request: Made from it.
        footprint: The same.
        budget: The memory that is too small.
        measure: `request.measure`, perhaps with the LoRA that is trained further.
        counted: What has been counted for other budgets, which is not counted again; gets more.
    """
    found = fitting(config, request, footprint, budget, measure, counted)
    if found is None:
        return error
    flags, _ = found
    return RunError(
        error.message,
        hint=f"it fits with {flags} (what that changes: docs/memory.md); or {error.hint}",
    )


def fitting(
    config: Config,
    request: PlanRequest,
    footprint: Footprint,
    budget: Budget,
    measure: Callable[..., Footprint],
    counted: dict[str, Footprint | None] | None = None,
) -> tuple[str, Footprint] | None:
    """Return the fewest options with which a plan fits, those first that change least.

    The arguments are those of `explained`.

    Returns:
        What to type, and what is counted with it; None where nothing helps.
    """
    counted = {} if counted is None else counted
    for chosen in _combinations(list(_options(config, footprint))):
        together: Footprint | None = footprint
        for option in chosen:
            if option.flags not in counted:
                counted[option.flags] = _counted(config, option, footprint, budget, measure)
            part = counted[option.flags]
            together = None if together is None or part is None else _with(together, part, option)
        if together is not None and fits_at_all(request, together, budget):
            return " ".join(option.flags for option in chosen), together
    return None


def _options(config: Config, footprint: Footprint) -> Iterator[_Option]:
    """Yield the options that are not taken yet; those first that change least."""
    model = config.model
    large = [
        name
        for name, reward in config.reward.items()
        if reward.dtype == "float32" and registry.has_network(name)
    ]
    if large and footprint.weights.get("reward weights"):
        yield _Option("reward", {f"reward.{name}.dtype": "bfloat16" for name in large})
    if model.quantize == "none":
        yield _Option("network", {"model.quantize": "int8"})
    if model.decoder == taesd.FULL:
        if model.vae_tile_size is None:
            yield _Option("decoder", {"model.vae_tile_size": 512})
        if families.find(model)[0].taesd is not None:
            yield _Option("decoder", {"model.decoder": "taesd"})
    if model.quantize != "nf4":
        yield _Option("network", {"model.quantize": "nf4"})
    if model.decoder == taesd.FULL and model.vae_tile_size is None:
        yield _Option("decoder", {"model.vae_tile_size": 256})


def _combinations(options: Sequence[_Option]) -> list[tuple[_Option, ...]]:
    """Return all choices of at most one option for each part, the fewest and mildest first."""
    found = [
        chosen
        for count in range(1, _MOST_OPTIONS + 1)
        for chosen in itertools.combinations(options, count)
        if len({option.part for option in chosen}) == count
    ]
    return sorted(found, key=lambda chosen: (len(chosen), sum(map(options.index, chosen))))


def _counted(
    config: Config,
    option: _Option,
    base: Footprint,
    budget: Budget,
    measure: Callable[..., Footprint],
) -> Footprint | None:
    """Return the footprint with an option alone; None where the model cannot have it."""
    try:
        changed = _changed(config, option.values)
        return measure(changed, budget.device_type, base=base, part=option.part)
    except AlignPropError:  # such as a size of tiles that is no multiple of the autoencoder's
        return None


def _changed(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a configuration with other values at dotted keys."""
    tree = config.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    return Config.model_validate(tree)


def _with(base: Footprint, changed: Footprint, option: _Option) -> Footprint:
    """Return the footprint with the part of another that an option has made smaller."""
    # The parts need nothing of each other, so options are counted one by one and put together.
    name = f"{option.part} weights"
    if option.part == "network":
        kept = {key: base.weights[key] for key in ("decoder weights", "reward weights")}
        return replace(
            changed,
            weights={**changed.weights, **kept},
            decoder=base.decoder,
            sampling_decoder=base.sampling_decoder,
            reward=base.reward,
        )
    weights = {**base.weights, name: changed.weights[name]}
    if option.part == "reward":
        return replace(base, weights=weights, reward=changed.reward)
    return replace(
        base,
        weights=weights,
        decoder=changed.decoder,
        sampling_decoder=changed.sampling_decoder,
    )
