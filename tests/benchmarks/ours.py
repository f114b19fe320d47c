"""Our trainer as one side of `step.py`.

Arguments: the model's folder, the number of sampling steps, the number of threads, the precision.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from sides import PROMPTS, lora_values, serve, timed

import alignprop_cli
from alignprop_cli import device as machine
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.device import make_accelerator
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import load_model
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.meter import Meter, SavedBytes
from alignprop_cli.planning.plan import Plan, make_plan
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.training.trainer import Trainer

RANK = 4


class Ours:
    """The trainer, with a window and a plan of our choice."""

    def __init__(self, folder: str, steps: int, dtype: str) -> None:
        self.folder, self.steps, self.dtype = folder, steps, dtype
        self.calls = 0
        self.accelerator = make_accelerator()
        machine.keep_memory()
        config = self._config(1, "none")
        self.model = load_model(config.model, self.accelerator.device)
        lora.inject(
            self.model.network,
            rank=RANK,
            alpha=RANK,
            target_modules=config.lora.target_modules,
            seed=0,
        )
        shapes = {n: tuple(v.shape) for n, v in lora.weights(self.model.network).items()}
        lora.set_weights(self.model.network, lora_values(shapes, RANK))
        self.mixture = build_mixture(config.reward, config.loss, self.accelerator.device)
        self.model.network.register_forward_pre_hook(self._count)
        self._trainers: dict[tuple[int, str], Trainer] = {}

    def _config(self, k: int, level: str) -> Config:
        own = f"{Path(__file__).parent / 'sides.py'}:reward"
        return parse(
            {
                "model": {"id": self.folder, "dtype": self.dtype},
                "lora": {"rank": RANK},
                "sample": {"num_inference_steps": self.steps, "guidance_scale": 7.5},
                "gradient": {
                    "method": "last_k",
                    "k": k,
                    "checkpoint_network": level,
                    "checkpoint_decoder": False,
                    "checkpoint_reward": False,
                },
                "reward": {own: {}},
                "train": {
                    "batch_size": len(PROMPTS),
                    "micro_batch": len(PROMPTS),
                    "max_grad_norm": 1.0,
                },
            }
        )

    def _count(self, *_: object) -> None:
        self.calls += 1

    def _trainer(self, k: int, level: str) -> Trainer:
        if (k, level) not in self._trainers:
            config = self._config(k, level)
            plan = make_plan(config, processes=1)
            made = Trainer(config, plan, self.model, self.mixture, list(PROMPTS), self.accelerator)
            self._trainers[k, level] = made
        trainer = self._trainers[k, level]
        self.model.recompute_blocks(level == "block")
        return trainer

    def step(self, k: int, level: str) -> dict[str, float]:
        """Time one step."""
        return timed(self._trainer(k, level).step)

    def count(self, k: int, level: str) -> dict[str, float]:
        """Count one step: operations, bytes stored when backward begins, most bytes alive."""
        trainer = self._trainer(k, level)
        model: Any = self.model
        weights = [
            t
            for part in (model.network, model.pipeline.vae, model.pipeline.text_encoder)
            for t in (*part.parameters(), *part.buffers())
        ]
        kept: dict[str, float] = {}
        forward = trainer.forward
        self.calls = 0

        def counted(*arguments: Any) -> Any:
            with SavedBytes(weights) as saved:
                result = forward(*arguments)
            kept["saved"] = saved.total
            saved.release()
            return result

        trainer.forward = counted  # type: ignore[method-assign]
        with Meter() as meter:
            trainer.step()
        trainer.forward = forward  # type: ignore[method-assign]
        return {**kept, "flops": meter.flops, "peak": meter.peak, "calls": self.calls}

    def heap(self, k: int, level: str) -> dict[str, float]:
        """Do one step; return MiB: resident before and at most, counted on, free after forward."""
        trainer = self._trainer(k, level)
        forward = trainer.forward
        found = {"before": machine.peak_gib(self.model.device) * 1024}

        def looked(*arguments: Any) -> Any:
            result = forward(*arguments)
            info = _mallinfo()
            found.update(used=info.uordblks / 2**20, free=info.fordblks / 2**20)
            return result

        found["used before"] = _mallinfo().uordblks / 2**20
        trainer.forward = looked  # type: ignore[method-assign]
        trainer.step()
        trainer.forward = forward  # type: ignore[method-assign]
        config = self._config(k, level)
        plan = make_plan(config, processes=1, footprint=planning.measure(config, "cpu"))
        assert plan.estimate is not None
        there = sum(b for name, b in plan.estimate.parts.items() if name.endswith(" weights"))
        found["most"] = machine.peak_gib(self.model.device) * 1024
        found["expected"] = (plan.estimate.peak - there) / 2**20
        return found

    def floor(self, k: int) -> dict[str, float]:
        """Return the fewest operations that a step can take, counted on the meta device."""
        config = self._config(k, "none")
        found = planning.measure(config, "cpu")
        plan: Plan = make_plan(config, processes=1, footprint=found)
        assert plan.estimate is not None
        return {"flops": plan.estimate.floor}

    def versions(self) -> dict[str, str]:
        """Return what this side runs on."""
        packages = (torch, diffusers, peft, alignprop_cli)
        return {package.__name__: package.__version__ for package in packages}


class _Heap(ctypes.Structure):
    """What glibc says of its heap, in bytes; malloc.h names the fields."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def _mallinfo() -> Any:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Heap
    return libc.mallinfo2()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    ours = Ours(sys.argv[1], int(sys.argv[2]), sys.argv[4])
    serve(
        {
            "step": ours.step,
            "count": ours.count,
            "heap": ours.heap,
            "floor": ours.floor,
            "versions": ours.versions,
        }
    )
