"""Print the table of what fits: the plan of each model, card and window, as estimated and assumed.

The pace is that of the card that a dry run assumes for such a memory (`planning/speed.py`).

With `--presets` a second table says what makes a preset fit where it does not as it is.

Run:  python tests/benchmarks/what_fits.py [--presets] [--flows]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.errors import RunError
from alignprop_cli.planning import request as planning
from alignprop_cli.planning import smaller
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import GIB, Budget, Footprint, expected_correction
from alignprop_cli.planning.speed import assumed, card_for
from alignprop_cli.planning.window import with_window

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
# With `--presets`: presets as they are, on the cards that people have.
PRESETS = (
    *("aesthetic", "aesthetic_k1", "hps", "hps_k1", "pickscore", "imagereward"),
    *("mix_aesthetic_hps", "mix_aesthetic_compressibility"),
    *("compressibility", "incompressibility", "count", "remove"),
    *("sdxl_hps", "sdxl_turbo_aesthetic", "lcm_aesthetic"),
    *("sd35_hps", "klein_hps", "klein_aesthetic", "flux_hps"),
    *("zimage_turbo_hps", "krea2_turbo_hps"),
)
PRESET_CARDS = (12, 16, 24, 48)

LARGE: dict[str, Any] = {"sample.height": 1024}
SCHNELL: dict[str, Any] = {
    "model.id": "black-forest-labs/FLUX.1-schnell",
    "sample.num_inference_steps": 4,
    "gradient.method": "full",
}
INT8: dict[str, Any] = {"model.quantize": "int8"}
NF4: dict[str, Any] = {"model.quantize": "nf4"}
# With `--flows`: rectified flows as their presets have them, and what differs.
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 3.5 medium, 512, last 2 of 25": ("sd35_hps", {}),
    "SD 3.5 medium, 1024, last 2 of 25": ("sd35_hps", LARGE),
    "FLUX.2-klein 4B, 512, all 4": ("klein_hps", {}),
    "FLUX.2-klein 4B, 1024, all 4": ("klein_hps", LARGE),
    "FLUX.2-klein 9B, 512, all 4": (
        "klein_hps",
        {"model.id": "black-forest-labs/FLUX.2-klein-9B"},
    ),
    "Z-Image-Turbo, 512, all 8": ("zimage_turbo_hps", {}),
    "Z-Image-Turbo, 1024, all 8": ("zimage_turbo_hps", LARGE),
    "Krea 2 Turbo, 512, all 8": ("krea2_turbo_hps", {}),
    "FLUX.1-dev, 512, last fifth of 25": ("flux_hps", {}),
    "FLUX.1-dev, 1024, last fifth of 25": ("flux_hps", LARGE),
    "FLUX.1-schnell, 512, all 4": ("flux_hps", SCHNELL),
    "FLUX.1-dev in int8, 512, last fifth of 25": ("flux_hps", INT8),
    "FLUX.1-dev in nf4, 512, last fifth of 25": ("flux_hps", NF4),
    "FLUX.1-schnell in nf4, 512, all 4": ("flux_hps", {**SCHNELL, **NF4}),
    "Z-Image-Turbo in int8, 512, all 8": ("zimage_turbo_hps", INT8),
    "Z-Image-Turbo in nf4, 512, all 8": ("zimage_turbo_hps", NF4),
    "Krea 2 Turbo in int8, 512, all 8": ("krea2_turbo_hps", INT8),
    "Krea 2 Turbo in nf4, 512, all 8": ("krea2_turbo_hps", NF4),
    "FLUX.2-klein 4B in int8, 512, all 4": ("klein_hps", INT8),
    "FLUX.2-klein 4B in nf4, 512, all 4": ("klein_hps", NF4),
}
FLOW_CARDS = (12, 16, 24, 48, 80)
SHORT = {"none": "", "block": " b", "call": " c"}


def main() -> None:
    """Print one row for each model and window, or for each preset."""
    if "--presets" in sys.argv:
        print_presets()
    if "--flows" in sys.argv:
        print_head("| model, pixels, calls with gradient |", FLOW_CARDS)
        for title, (preset, flags) in FLOWS.items():
            flags = {**flags, "sample.width": flags.get("sample.height", 512)}  # square
            config = with_window(presets.resolve(preset=preset, flags=flags))
            footprint = measure(config, "cuda")
            print(f"| {title} |", cells(config, footprint, FLOW_CARDS), "|", flush=True)
    if len(sys.argv) > 1:
        return
    print_head("| model | window |", CARDS)
    for title, model in MODELS.items():
        for window, flags in WINDOWS.items():
            config = resolved(model, flags)
            footprint = measure(config, "cuda")
            print(f"| {title} | {window} |", cells(config, footprint, CARDS), "|", flush=True)


def print_presets() -> None:
    """Print the presets as they are, and what makes those fit that do not."""
    print_head("| preset |", PRESET_CARDS)
    small: list[tuple[str, Config, int]] = []
    for name in PRESETS:
        config = with_window(presets.resolve(preset=name))
        row = cells(config, measure(config, "cuda"), PRESET_CARDS)
        print(f"| `{name}` |", row, "|", flush=True)
        fitting = zip(PRESET_CARDS, row.split(" | "), strict=True)
        small += [(name, config, card) for card, cell in fitting if cell == "-"]
    print("\n| preset | card | fits with | plan |\n|---|---|---|---|")
    for name, config, card in small:
        request = planning.plan_request(config, processes=1)
        budget = Budget(card * GIB, "cuda", "a card")
        footprint = measure(config, "cuda")
        found = smaller.fitting(config, request, footprint, budget, planning.measure)
        flags, cell = "nothing", "-"
        if found is not None:
            flags, cell = f"`{found[0]}`", cells(config, found[1], [card])
        print(f"| `{name}` | {card} GB | {flags} | {cell} |", flush=True)


_measured: dict[str, Footprint] = {}


def measure(config: Config, device_type: str) -> Footprint:
    """Count a configuration; what decides on the count is not counted twice."""
    sections = config.model, config.lora, config.sample, *config.reward.values()
    key = repr([list(config.reward), device_type, *(s.model_dump_json() for s in sections)])
    if key not in _measured:
        _measured[key] = planning.measure(config, device_type)
    return _measured[key]


def print_head(first: str, cards: Sequence[int]) -> None:
    print(first, " | ".join(f"{card} GB ({card_for(card * GIB)})" for card in cards), "|")
    print("|", "---|" * (first.count("|") - 1 + len(cards)), sep="")


def resolved(model: str, flags: Mapping[str, Any]) -> Config:
    return presets.resolve(preset="aesthetic", flags={"model.id": model, **flags})


def cells(config: Config, footprint: Footprint, cards: Sequence[int]) -> str:
    """Return the plan for each card: batches, what is recomputed, images an hour."""
    request = planning.plan_request(config, processes=1)
    found: list[str] = []
    for card in cards:
        budget = Budget(card * GIB, "cuda", "a card")
        try:
            plan = make_plan(
                request,
                footprint=footprint,
                budget=budget,
                correction=expected_correction("cuda"),
                times=assumed(footprint, card_for(budget.bytes)),
            )
        except RunError:
            found.append("-")
            continue
        assert plan.images_per_hour is not None
        again = SHORT[plan.checkpoint_network]
        again += str(plan.stored_calls or "") + " d" * plan.checkpoint_decoder
        again += " r" * plan.checkpoint_reward
        batches = f"{plan.rollout_batch}/{plan.micro_batch}/{plan.decode_batch}"
        found.append(f"{batches}{again}, {plan.images_per_hour:,.0f}")
    return " | ".join(found)


if __name__ == "__main__":
    main()
