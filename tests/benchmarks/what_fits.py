"""Print the table of what fits: the plan of each model, card and window, as estimated and assumed.

The pace is that of the card that a dry run assumes for such a memory (`planning/speed.py`).

Run:  python tests/benchmarks/what_fits.py
"""

from __future__ import annotations

from typing import Any

from alignprop_cli.config import presets
from alignprop_cli.errors import RunError
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import GIB, Budget, expected_correction
from alignprop_cli.planning.speed import assumed, card_for

MODELS = {
    "SD 1.5, 512": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 2.1, 768": "stabilityai/stable-diffusion-2-1",
}
CARDS = (8, 12, 16, 24, 40, 80)
WINDOWS: dict[str, dict[str, Any]] = {
    "K = 1": {"gradient.method": "last_k", "gradient.k": 1},
    "K = 10": {"gradient.method": "last_k", "gradient.k": 10},
    "K random": {"gradient.method": "random_k"},
    "K = 50": {"gradient.method": "full"},
}
SHORT = {"none": "", "block": " b", "call": " c"}


def main() -> None:
    """Print one row for each model and window."""
    names = [f"{card} GB ({card_for(card * GIB)})" for card in CARDS]
    print("| model | window |", " | ".join(names), "|")
    print("|---|---|", "---|" * len(CARDS), sep="")
    for title, model in MODELS.items():
        footprint = None
        for window, flags in WINDOWS.items():
            config = presets.resolve(preset="aesthetic", flags={"model.id": model, **flags})
            footprint = footprint or planning.measure(config, "cuda")
            request = planning.plan_request(config, processes=1)
            cells: list[str] = []
            for card in CARDS:
                budget = Budget(card * GIB, "cuda", "a card")
                try:
                    times = assumed(footprint, card_for(budget.bytes))
                    plan = make_plan(
                        request,
                        footprint=footprint,
                        budget=budget,
                        correction=expected_correction("cuda"),
                        times=times,
                    )
                except RunError:
                    cells.append("-")
                    continue
                assert plan.images_per_hour is not None
                again = SHORT[plan.checkpoint_network]
                again += str(plan.stored_calls or "") + " d" * plan.checkpoint_decoder
                again += " r" * plan.checkpoint_reward
                batches = f"{plan.rollout_batch}/{plan.micro_batch}/{plan.decode_batch}"
                cells.append(f"{batches}{again}, {plan.images_per_hour:,.0f}")
            print(f"| {title} | {window} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
