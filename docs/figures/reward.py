"""Draw docs/figures/reward.png: the reward against the images that a run has seen.

Run:  alignprop train --preset tiny --steps 40 --output runs/curve
      python docs/figures/reward.py runs/curve
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FILE = Path(__file__).with_name("reward.png")
REWARD = "clip"
SMOOTHED_OVER = 8


def main(run: Path) -> None:
    """Plot the mean reward of every step, and a running mean."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = np.array([line["images_seen"] for line in lines])
    rewards = np.array([line["rewards"][REWARD]["mean"] for line in lines])
    smooth = np.convolve(rewards, np.ones(SMOOTHED_OVER) / SMOOTHED_OVER, mode="valid")

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.plot(seen, rewards, color="#93c5fd", lw=1.0, marker=".", label="each step")
    axes.plot(
        seen[SMOOTHED_OVER - 1 :],
        smooth,
        color="#1d4ed8",
        lw=2.0,
        label=f"mean of {SMOOTHED_OVER} steps",
    )
    axes.set(xlabel="images seen in training", ylabel=f"mean reward ({REWARD})")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(FILE, dpi=130, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
