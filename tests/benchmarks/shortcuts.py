"""What the optional shortcuts of the roll-out do to pictures of the embedded model.

The same prompts and noise, 20 steps at guidance 3: all calls as they are; fewer calls before a
window of 5, as `gradient.rollout_steps` trains on; guidance in a part of the chain.

Run:  python tests/benchmarks/shortcuts.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from alignprop_cli.config.validation import parse
from alignprop_cli.evaluation import draw as evaluator
from alignprop_cli.models.families import load_model
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.tiny.checker import check

STEPS, WINDOW, PICTURES = 20, 5, 320


def main() -> None:
    prompts = load_prompts("shapes-heldout")
    print("| | calls of the network | reward | all right | mean difference of a pixel, of 255 |")
    print("|---|---|---|---|---|")
    whole: Any = None
    for calls, interval in (
        (None, (0.0, 1.0)),
        (8, (0.0, 1.0)),
        (5, (0.0, 1.0)),
        (2, (0.0, 1.0)),
        (None, (0.2, 0.8)),
        (None, (0.2, 1.0)),
        (None, (0.0, 0.8)),
    ):
        config = parse(
            {
                "reward": {"clip": {"model": "tiny"}},
                "sample": {
                    "num_inference_steps": STEPS,
                    "guidance_scale": 3.0,
                    "guidance_interval": list(interval),
                },
            }
        )
        model: Any = load_model(config.model, torch.device("cpu"))
        schedule = model.schedule(STEPS)
        if calls is not None:
            schedule = schedule.shortened(STEPS - WINDOW, calls)
            model.schedule = lambda steps, chosen=schedule: chosen
        last = model.pipeline.scheduler.config.num_train_timesteps - 1
        guided = sum(interval[0] * last <= s.timestep <= interval[1] * last for s in schedule.steps)
        drawn = evaluator.draw(
            model,
            evaluator.choose(prompts, PICTURES, 1),
            build_mixture(config.reward, config.loss, torch.device("cpu")),
            config.sample,
            seed=1000,
            batch_size=16,
        )
        whole = drawn.images.astype(float) if whole is None else whole
        right = np.mean(
            [c.all_right for c in check(drawn.images, [p.prompt for p in drawn.pictures])]
        )
        name = "all calls" if calls is None else f"rollout_steps {calls} in place of 15"
        name += "" if interval == (0.0, 1.0) else f", guidance_interval {list(interval)}"
        apart = np.abs(drawn.images - whole).mean()
        print(
            f"| {name} | {len(schedule) + guided} | {drawn.rewards['clip'].mean():.4f} "
            f"| {right:.1%} | {apart:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
