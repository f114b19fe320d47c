"""What 8 and 4 bits do to the gradient of the LoRA: its cosine to that of the full weights.

Through the whole chain and the decoder, on the embedded model, whose weights are trained, and on
small networks with random weights. nf4 needs bitsandbytes.

    python tests/benchmarks/quantized.py
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.flow_models import small_klein, small_sd3
from tests.models.test_quantized import cosine, lora_gradient, opened


def main() -> None:
    ways = ["int8"] + ["nf4"] * (importlib.util.find_spec("bitsandbytes") is not None)
    with tempfile.TemporaryDirectory() as folder:
        small = {"sd3": small_sd3(Path(folder) / "a"), "klein": small_klein(Path(folder) / "b")}
        print("model   weights  steps  cosine of the LoRA's gradient")
        for name, place in {"tiny": "tiny", **small}.items():
            for steps in (1, 4):
                whole = lora_gradient(str(place), "none", steps)
                for how in ways:
                    found = cosine(whole, lora_gradient(str(place), how, steps))
                    print(f"{name:7} {how:8} {steps:5}  {found:.5f}", flush=True)
    for how in ("none", *ways):
        network = opened(Path("tiny"), how).network.module
        tensors = (*network.parameters(), *network.buffers())
        size = sum(t.numel() * t.element_size() for t in tensors)
        print(f"embedded network, {how}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
