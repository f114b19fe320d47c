"""What `train --dry-run` says: plans for cards that need not be here, with nothing done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from alignprop_cli.config.schema import Config, dump
from alignprop_cli.console import Console
from alignprop_cli.device import make_accelerator
from alignprop_cli.errors import RunError
from alignprop_cli.models import families, taesd
from alignprop_cli.planning import embeddings, smaller, window
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import fits_at_all
from alignprop_cli.planning.estimate import GIB, Budget, Footprint
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.speed import CARDS, Times, card_for, find_card
from alignprop_cli.training import folders, setup
from alignprop_cli.training.plans import assumed_times, budget_here, first_plan
from alignprop_cli.training.resume import choose


def describe(
    config: Config,
    console: Console,
    *,
    name: str,
    resume: Path | None,
    back_to: str | None = None,
    gpu_memory: Sequence[str] = (),
    gpu: str | None = None,
    gpus: int | None = None,
) -> None:
    """Print the plan and the complete configuration of a run without doing it.

    Makes the same checks as a real run, except those that need the weights.

    Args:
        config: The complete configuration.
        console: For the result.
        name: Name of the run, used if `output.dir` is not set.
        resume: The run to resume; None plans a new one.
        back_to: The checkpoint to resume it from, as in `run_training`.
        gpu_memory: Memory of the cards to plan for, such as 12GB; several are compared. None at all
            is that of `gpu`, or of this machine where that is None too.
        gpu: Name of the cards, whose speed is assumed; None assumes one of that memory.
        gpus: Number of these cards.

    Raises:
        RunError: If no plan fits, of several cards the largest; names what would help.
    """
    # 1. The checks, with nothing written.
    accelerator = make_accelerator()
    setup.check(config, resume)
    if resume is None:
        folders.new_run(config.output.dir, name)
    else:
        choose(resume, back_to, setup.settled(config), console.warn)
    config = window.with_window(config)

    # 2. What a step needs, from shapes alone: neither the weights nor the cards have to be here.
    names, sizes = zip(*(_card(gpu, size) for size in gpu_memory or (None,)), strict=True)
    budgets = [budget_here(accelerator, config, size) for size in sizes]
    device_type = budgets[0].device_type
    measure = partial(planning.measure, initial=setup.initial_lora(config, resume))
    footprint = measure(config, device_type)
    request = planning.plan_request(config, gpus or accelerator.num_processes)

    # 3. The plan for each card.
    step = _Step(config, request, footprint, measure)
    cards = list(zip(budgets, names, strict=True))
    if len(cards) == 1:
        planned = step.plan(*cards[0])
        schema, values = "alignprop.plan/1", planned.values
        lines = planning.describe(planned.plan, planned.budget, planned.times)
    else:
        schema = "alignprop.plans/1"
        values, lines = step.compared(cards)

    more, notes = step.notes(device_type, console)
    lines = [dump(config).rstrip(), "", *lines, *notes, "nothing was done (--dry-run)"]
    console.result(schema, values | more, lines)


@dataclass(frozen=True)
class _Planned:
    """A plan for cards of one memory."""

    plan: Plan
    budget: Budget
    times: Times | None

    @property
    def values(self) -> dict[str, Any]:
        plan = self.plan
        more = {"accumulation": plan.accumulation, "images_per_hour": plan.images_per_hour}
        return {
            "plan": asdict(plan) | more,
            "budget": asdict(self.budget),
            "times": None if self.times is None else asdict(self.times),
        }


@dataclass(frozen=True)
class _Step:
    """What is planned.

    Args:
        config: The complete configuration.
        request: Made from it.
        footprint: The same.
        measure: As `smaller.explained` takes it, and so is `counted`.
    """

    config: Config
    request: PlanRequest
    footprint: Footprint
    measure: Callable[..., Footprint]
    counted: dict[str, Footprint | None] = field(default_factory=dict[str, Footprint | None])

    def plan(
        self, budget: Budget, card: str | None, footprint: Footprint | None = None
    ) -> _Planned:
        """Return the plan for cards of one memory.

        Raises:
            RunError: If none fits; names what would help.
        """
        footprint = footprint or self.footprint
        times = assumed_times(footprint, budget, card)
        try:
            return _Planned(first_plan(self.request, footprint, budget, times), budget, times)
        except RunError as error:
            raise smaller.explained(error, *self._for(budget)) from error

    def compared(
        self, cards: Sequence[tuple[Budget, str | None]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the plans for cards of several memories: for the result, and for people.

        Where none fits, it is planned with the options that make one fit.

        Raises:
            RunError: If none fits the largest; names what would help.
        """
        plans: list[dict[str, Any]] = []
        lines: list[str] = []
        for budget, card in cards:
            options, footprint = None, self.footprint
            if not fits_at_all(self.request, footprint, budget):
                options, footprint = smaller.fitting(*self._for(budget)) or (None, None)
            start = f"{budget.bytes / GIB:.4g} GiB ({card}): "
            if footprint is None:
                none = {"plan": None, "budget": asdict(budget), "times": None}
                plans.append({**none, "options": None})
                lines.append(f"{start}no plan fits, and no option helps")
                continue
            planned = self.plan(budget, card, footprint)
            plans.append({**planned.values, "options": options})
            changed = "" if options is None else f"with {options}: "
            lines.append(start + changed + planned.plan.describe())
        if not any(plan["plan"] for plan in plans):
            self.plan(*max(cards, key=lambda card: card[0].bytes))
        return {"plans": plans}, lines

    def _for(self, budget: Budget) -> tuple[Any, ...]:
        """Return what `smaller` takes."""
        given = self.config, self.request, self.footprint, budget
        return *given, self.measure, self.counted

    def notes(self, device_type: str, console: Console) -> tuple[dict[str, Any], list[str]]:
        """Return what is the same for all cards; warn where the window's share is small."""
        config, uncounted = self.config, self.footprint.uncounted
        prompts, each = embeddings.count(config, device_type)
        values = {
            "uncounted": list(uncounted),
            "embeddings": {"prompts": prompts, "bytes": prompts * each},
            "config": config.model_dump(mode="json"),
        }
        decoder = taesd.describe(config.model, families.find(config.model)[0])
        said, warning = window.describe(window.schedule_of(config), self.request.estimator)
        if warning is not None:
            console.warn(warning)
        lines = [] if decoder is None else [decoder]
        lines += [] if said is None else [f"window: {said}"]
        lines.append(embeddings.describe(prompts, each))
        return values, lines + ([f"not counted: {', '.join(uncounted)}"] if uncounted else [])


def _card(gpu: str | None, size: str | None) -> tuple[str | None, str | None]:
    """Return the name of the card and its memory where one of them is given; else None for both."""
    if gpu is not None:
        card = find_card(gpu)
        return card, f"{CARDS[card].memory}GB" if size is None else size
    return None if size is None else card_for(planning.parse_memory(size)), size
