"""From nested values to a complete configuration, or to a list of everything wrong with them.

Problems are reported together, each with its source and, for unknown keys, the nearest known one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from alignprop_cli.config.foreign import named_here
from alignprop_cli.config.gradient import GradientConfig
from alignprop_cli.config.guard import HELD_OUT, PIXEL_MEASURES, RIGHT, SPREAD, HeldOutConfig
from alignprop_cli.config.schema import Config, LossConfig, RewardConfig
from alignprop_cli.config.train import TrainConfig
from alignprop_cli.errors import ConfigError, Problem, did_you_mean

# Characters of a refused value in a message.
_LONGEST = 200
# Where rewards are named that are not trained on.
_HELD_OUT = ("eval", "rewards")


def parse(
    values: Mapping[str, Any],
    origins: Mapping[str, str] | None = None,
    *,
    source: str = "configuration",
    extra_problems: Iterable[Problem] = (),
    training: bool = True,
) -> Config:
    """Check nested values against the schema and return the complete configuration.

    Args:
        values: Nested mapping, as read from YAML.
        origins: The source of each dotted key (`file.yaml:12`, `--set`), for the messages.
        source: Name of the values in the first line of the message.
        extra_problems: Problems found elsewhere, to be reported together with these.
        training: Whether it will be trained with. Otherwise the `gradient` and `train` sections are
            not used, and need not fit the others.

    Raises:
        ConfigError: With every problem: unknown keys (and the nearest known one), wrong types,
            values out of range, and combinations that cannot work.
    """
    origins = origins or {}
    problems = list(extra_problems)
    # Both what the schema refuses and what cannot work together goes into one message: with one
    # mistake at a time, a user would have to start the program once for each.
    config, wrong = _validate(values)
    problems += [_problem(details, origins) for details in wrong]
    if config is not None:
        problems += [
            Problem(p.key, p.message, origin_of(p.key, origins))
            for p in _impossible(config)
            if training or not p.key.startswith(("gradient.", "train."))
        ]
    if problems or config is None:
        # pydantic complains once for each branch of a union; the first message is enough.
        problems = list({problem.key: problem for problem in reversed(problems)}.values())[::-1]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        hint = "`alignprop train --preset NAME --show-preset` prints every key of a preset"
        if any(named_here(_key(d), d["input"]) for d in wrong if d["type"] == "extra_forbidden"):
            hint += "; what other tools' options are called here: docs/coming-from.md"
        raise ConfigError(f"{source}: {count}", problems, hint=hint)
    return config


def origin_of(key: str, origins: Mapping[str, str]) -> str | None:
    """Return the source of a dotted key, or of the nearest section around it."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return None


def _validate(values: Mapping[str, Any]) -> tuple[Config | None, list[Any]]:
    """Return the configuration and pydantic's errors.

    With errors, the configuration has defaults for the refused values (None if that fails too), so
    that impossible combinations are still found.
    """
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        wrong = error.errors(include_url=False)
    # Defaults for what is refused: drop it and validate again.
    rest = copy.deepcopy(dict(values))
    for details in wrong:
        node: Any = rest
        path = _path(details["loc"])
        for part in path[:-1]:
            node = cast(dict[Any, Any], node).get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            cast(dict[Any, Any], node).pop(path[-1], None)
    try:
        return Config.model_validate(rest), wrong
    except ValidationError:
        return None, wrong


def _path(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return the keys of a location as pydantic names it."""
    # It continues inside a value, with the branch of a union or the index in a list: cut off.
    if location[:2] == _HELD_OUT:
        return location[:4]
    if location[:1] != ("reward",):
        return location[:2]
    return location[: 4 if location[2:3] == ("loss",) else 3]


def _key(details: Any) -> str:
    """Return the dotted key of one of pydantic's errors."""
    return ".".join(map(str, _path(details["loc"])))


def _section(path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the schema of the section at this path; None if there is none."""
    if not path:
        return Config
    if path[0] == "reward":
        return {2: RewardConfig, 3: LossConfig}.get(len(path))
    if path[:2] == _HELD_OUT and len(path) == 3:
        return HeldOutConfig
    field = Config.model_fields.get(str(path[0]))
    kind = field.annotation if field is not None else None
    return (
        kind if len(path) == 1 and isinstance(kind, type) and issubclass(kind, BaseModel) else None
    )


def _problem(details: Any, origins: Mapping[str, str]) -> Problem:
    """Turn one of pydantic's errors into a `Problem`."""
    path = _path(details["loc"])
    key = _key(details)
    if details["type"] == "extra_forbidden":
        section = _section(path[:-1])
        known = section.model_fields if section is not None else ()
        advice = named_here(key, details["input"]) or did_you_mean(str(path[-1]), known)
        message = f"unknown key '{path[-1]}'.{advice}"
    # FlowBP has switches where rewards are named here.
    elif path[0] == "reward" and (here := named_here(key, None)):
        message = f"'{path[-1]}' is no reward.{here}"
    else:
        # A value of thousands of parts would fill the screen.
        got = repr(details["input"])
        got = got if len(got) <= _LONGEST else f"{got[:_LONGEST]}..."
        message = f"{details['msg'][0].lower()}{details['msg'][1:]}, got {got}"
    return Problem(key, message, origin_of(key, origins))


def _impossible(config: Config) -> Iterable[Problem]:
    """Yield combinations that every section allows by itself but that cannot work."""
    steps, gradient, train = config.sample.num_inference_steps, config.gradient, config.train
    if not config.reward:
        yield Problem(
            "reward", "no reward is given; name one, for instance --set reward.brightness.weight=1"
        )
    # 1. The chain.
    low, high = config.sample.guidance_interval
    if low > high:
        yield Problem("sample.guidance_interval", f"{low} to {high} is empty: give the lower first")
    # 2. The estimator.
    yield from impossible_calls(gradient, steps)
    group = gradient.window_group
    if group is not None and train.batch_size % group:
        yield Problem(
            "gradient.window_group",
            f"{group} does not divide train.batch_size ({train.batch_size})",
        )
    yield from _impossible_rates(train)
    # 3. Rewards, each with its own loss or the common one.
    for name, reward in config.reward.items():
        if (reward.base_mean is None) != (reward.base_std is None):
            yield Problem(f"reward.{name}.base_mean", "give base_mean and base_std, or neither")
    # The common loss is only used, and checked, if some reward has none of its own.
    losses = {"loss": config.loss} if any(r.loss is None for r in config.reward.values()) else {}
    losses |= {f"reward.{name}.loss": r.loss for name, r in config.reward.items() if r.loss}
    for key, loss in losses.items():
        # A member's loss has nothing of the common one, whose kind may be what was meant.
        if loss.target is not None and "kind" not in loss.model_fields_set:
            yield Problem(f"{key}.kind", f"{key}.target is given: say which kind it is for")
        if loss.kind != "maximise" and loss.target is None:
            yield Problem(f"{key}.target", f"{key}.kind is {loss.kind}, which needs a target")
    yield from _unknown_measures(config)


def _unknown_measures(config: Config) -> Iterable[Problem]:
    """Yield the names in the `guard` section that nothing is measured under."""
    known = [HELD_OUT, RIGHT, *SPREAD, *PIXEL_MEASURES, *config.reward, *config.eval.rewards]
    for key, names in (("watch", config.guard.watch), ("best", (config.guard.best,))):
        for name in names:
            if name not in known:
                told = did_you_mean(name, known)
                yield Problem(f"guard.{key}", f"nothing is measured as {name!r}.{told}")


def _impossible_rates(train: TrainConfig) -> Iterable[Problem]:
    """Yield what the chosen schedule and optimiser cannot do with the other options."""
    name, decay = train.lr_schedule, train.lr_decay_steps
    falling = name in ("linear", "cosine", "cosine_with_restarts", "polynomial")
    if falling and decay is None:
        yield Problem(
            "train.lr_decay_steps", f"train.lr_schedule is {name}, which needs the steps it takes"
        )
    # After its end cosine would rise again, and the others leave nothing to learn with.
    if falling and decay is not None and train.steps > train.warmup_steps + decay:
        yield Problem(
            "train.steps",
            f"{train.steps} is more than train.warmup_steps and train.lr_decay_steps together "
            f"({train.warmup_steps + decay}), where {name} ends",
        )
    if name in ("constant", "piecewise_constant") and train.warmup_steps:
        yield Problem(
            "train.warmup_steps", f"train.lr_schedule is {name}, which has no warmup: set 0"
        )
    if name == "polynomial" and train.learning_rate <= 1.0e-7:
        yield Problem(
            "train.learning_rate",
            f"{train.learning_rate:g}: polynomial falls to 1e-7, so give more",
        )
    if name == "piecewise_constant" and train.lr_rules is None:
        yield Problem(
            "train.lr_rules", "train.lr_schedule is piecewise_constant, which needs its rules"
        )
    if train.lr_rules is not None:
        if name != "piecewise_constant":
            yield Problem(
                "train.lr_rules",
                f"train.lr_schedule is {name or 'null'}, only piecewise_constant has rules",
            )
        ends = [int(part.rpartition(":")[2]) for part in train.lr_rules.split(",")[:-1]]
        # diffusers sorts them, and keeps one of two that are equal.
        if any(later <= earlier for earlier, later in pairwise(ends)):
            yield Problem("train.lr_rules", f"its steps have to rise, got {train.lr_rules}")
    if train.optimizer == "prodigy" and train.adam_beta1 == 0.0:
        yield Problem("train.adam_beta1", "train.optimizer is prodigy, which needs more than 0")


def impossible_calls(gradient: GradientConfig, steps: int) -> Iterable[Problem]:
    """Yield what the estimator cannot do in a chain of this many steps.

    Args:
        gradient: The section; its `path_share` does not count.
        steps: T, network calls of one chain.
    """
    # By the name of the method, since estimators.py imports torch.
    of = f"sample.num_inference_steps ({steps})"
    if gradient.method == "last_k" and gradient.k > steps:
        yield Problem("gradient.k", f"{gradient.k} is more than {of}")
    if gradient.method == "random_k":
        k_max = gradient.k_max or steps
        if k_max > steps:
            yield Problem("gradient.k_max", f"{k_max} is more than {of}")
        if gradient.k_min > k_max:
            yield Problem(
                "gradient.k_min", f"{gradient.k_min} is more than gradient.k_max ({k_max})"
            )
    if gradient.method in ("gaussian_k", "leap") and steps < 2:
        yield Problem(
            "gradient.method", f"{gradient.method} needs sample.num_inference_steps of at least 2"
        )
    if gradient.method in ("drtune", "sparse") and gradient.calls > steps:
        yield Problem("gradient.calls", f"{gradient.calls} is more than {of}")
    if gradient.span is None or gradient.method not in ("refl", "drtune", "leap", "sparse"):
        return
    # As many calls as the span has of the chain; one that lies in it partly counts.
    low, high = gradient.span
    if low >= high:
        yield Problem("gradient.span", f"{low} to {high} is empty: give the lower first")
        return
    calls = math.ceil(high * steps - 1e-9) - math.floor(low * steps + 1e-9)
    needed = {"leap": 2, "sparse": gradient.calls}.get(gradient.method, 1)
    if calls < needed:
        yield Problem(
            "gradient.span",
            f"{low} to {high} are {max(calls, 1)} of the {steps} calls, and {gradient.method} "
            f"draws {needed}",
        )
