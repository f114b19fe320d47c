"""What a network call launches and stores with our LoRA layers and with peft's, counted.

On the meta device, without weights and without a GPU: one image of Stable Diffusion 1.5 at 512
pixels in bfloat16 with guidance, LoRA of rank 4 on the attention projections.

Run:  python tests/benchmarks/operators.py
"""

from __future__ import annotations

from unittest.mock import patch

from alignprop_cli.config import presets
from alignprop_cli.lora import layers
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.estimate import GIB, Footprint


def report(name: str, found: Footprint) -> str:
    call = found.call["none"]
    blocks = found.call["block"]
    cells = [
        name,
        str(found.rollout.launches),
        f"{call.forward_launches} + {call.backward_launches}",
        f"{call.saved(1) / GIB:.2f}",
        f"{blocks.backward(1) / GIB:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    config = presets.resolve(preset="aesthetic", assignments=["model.dtype=bfloat16"])
    print("| LoRA | roll-out call | call with gradient | stored, GiB | by block, GiB |")
    print("|---" * 5 + "|")
    with patch.object(layers, "take_over", lambda network: None):
        print(report("peft's layers", planning.measure(config, "cuda")), flush=True)
    print(report("ours", planning.measure(config, "cuda")))


if __name__ == "__main__":
    main()
