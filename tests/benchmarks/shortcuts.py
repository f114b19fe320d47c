"""What the optional shortcuts of the roll-out do to images of the embedded model.

The same prompts and noise, 20 steps at guidance 3: all calls as they are; fewer calls before a
window of 5, as `gradient.rollout_steps` trains on; guidance in a part of the noise levels sigma.

Run:  python tests/benchmarks/shortcuts.py
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from alignprop_cli.config.validation import parse
from alignprop_cli.evaluation.draw import choose_samples, draw_samples
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.tiny.checker import check

STEPS, WINDOW = 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=320)
    samples = choose_samples(load_prompts("shapes-heldout"), parser.parse_args().images)
    prompts = [sample.prompt for sample in samples]
    shared, cpu = {"reward": {"clip": {"model": "tiny"}}}, torch.device("cpu")
    config = parse(shared)
    model = open_model(config.model, [*prompts, config.sample.negative_prompt], cpu)
    mixture = build_mixture(config.reward, config.loss, cpu)
    whole_schedule = model.network.schedule(STEPS, model.network.latent_shape(None, None))
    print("| | network calls | reward | all right | mean difference of a pixel |")
    print("|---|---|---|---|---|")
    whole: Any = None
    for calls, interval in (
        (None, (0.0, 1.0)),
        (8, (0.0, 1.0)),
        (5, (0.0, 1.0)),
        (2, (0.0, 1.0)),
        (None, (0.55, 0.993)),
        (None, (0.55, 1.0)),
        (None, (0.0, 0.993)),
    ):
        sample = {
            "num_inference_steps": STEPS,
            "guidance_scale": 3.0,
            "guidance_interval": list(interval),
        }
        wanted = sampler(parse(shared | {"sample": sample}).sample, model.family, model.network)
        schedule = whole_schedule
        if calls is not None:
            schedule = schedule.shortened(STEPS - WINDOW, calls)
        guided = sum(wanted.guidance.applies(step.sigma) for step in schedule.steps)
        with patch.object(model.network, "schedule", return_value=schedule):
            drawn = draw_samples(model, samples, mixture, wanted, seed=1000, batch_size=16)
        whole = drawn.images.astype(float) if whole is None else whole
        right = np.mean([c.all_right for c in check(drawn.images, prompts)])
        name = "all calls" if calls is None else f"rollout_steps {calls} instead of 15"
        name = name if interval == (0.0, 1.0) else f"guidance_interval {list(interval)}"
        apart = np.abs(drawn.images - whole).mean()
        print(
            f"| {name} | {len(schedule) + guided} | {drawn.rewards['clip'].mean():.4f} "
            f"| {right:.1%} | {apart:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
