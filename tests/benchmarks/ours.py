"""Our trainer as one side of `step.py`, and of `heap.py`.

A step rolls out without a graph, goes through the calls of the window with one, and then decodes
and scores: that tail has graphs of its own, the decoder's and the reward's, and goes back by itself
while the window's graph is alive. So both are stored together, and `count` returns both: `saved`,
what autograd keeps for backward through the window's calls, and `tail`, the most that it keeps
besides for one chunk of the tail.

Arguments: a `sides.Case` as JSON.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import building
import diffusers
import peft
import torch
from sides import GUIDANCE, HERE, PROMPTS, RANK, Case, lora_values, serve, turn, versions

import alignprop_cli
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.device import peak_gib
from alignprop_cli.lora import layers as lora
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.meter import Meter, SavedBytes
from alignprop_cli.planning.plan import Plan
from alignprop_cli.training.trainer import Trainer

Division = list[int] | None
"""Images rolled out, taken back and decoded at once; None is the plan's own."""


class Ours:
    """The trainer, with a window and a plan of our choice."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.calls = 0
        self.parts = building.open_parts(self._config(1, "none", None), PROMPTS)
        self.network = self.parts.model.network.module
        shapes = {n: tuple(v.shape) for n, v in lora.weights(self.network).items()}
        lora.set_weights(self.network, lora_values(shapes, RANK))
        self.network.register_forward_pre_hook(self._count)
        self._trainers: dict[str, Trainer] = {}

    def _config(self, k: int, recompute: str, division: Division) -> Config:
        rollout, micro, decode = division or ("auto",) * 3
        tail = "auto" if recompute == "auto" else False
        return parse(
            {
                "model": {"id": self.case.model, "dtype": self.case.dtype},
                "lora": {"rank": RANK},
                "sample": {
                    "num_inference_steps": self.case.steps,
                    "guidance_scale": GUIDANCE,
                },
                "gradient": {
                    "method": "last_k",
                    "k": k,
                    "checkpoint_network": recompute,
                    "checkpoint_decoder": tail,
                    "checkpoint_reward": tail,
                },
                "reward": {f"{HERE / 'sides.py'}:reward": {}},
                "train": {
                    "batch_size": self.case.batch_size,
                    "rollout_batch": rollout,
                    "micro_batch": micro,
                    "decode_batch": decode,
                    "max_grad_norm": 1.0,
                },
            }
        )

    def _count(self, *_: object) -> None:
        self.calls += 1

    def _trainer(self, k: int, recompute: str, division: Division) -> Trainer:
        key = f"{k} {recompute} {division}"
        if key not in self._trainers:
            config = self._config(k, recompute, division)
            self._trainers[key] = building.build_trainer(config, self.parts)
        trainer = self._trainers[key]
        trainer.apply_plan(trainer.plan)
        return trainer

    def _estimated(self, k: int, recompute: str, division: Division) -> Plan:
        """Return a plan with what it is estimated to need."""
        config = self._config(k, recompute, division)
        footprint = planning.measure(config, self.case.device)
        return make_plan(planning.plan_request(config, 1), footprint=footprint)

    def plan(self, k: int, recompute: str, division: Division) -> str:
        """Return the plan in words."""
        return self._trainer(k, recompute, division).plan.describe()

    def step(self, k: int, recompute: str, division: Division) -> dict[str, float]:
        """Time one step."""
        return turn(self._trainer(k, recompute, division).step, self.case.device)

    def count(self, k: int, recompute: str, division: Division) -> dict[str, float]:
        """Count one step: operations, calls, bytes stored (see above), most bytes alive."""
        trainer = self._trainer(k, recompute, division)
        run_path = trainer.run_path
        modules = (self.network, self.parts.model.decoder.module)
        weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        kept = {"saved": 0.0, "tail": 0.0}
        chunk = SavedBytes(weights)

        def counted(*arguments: Any) -> Any:
            with SavedBytes(weights) as saved:
                result = run_path(*arguments)
            kept["saved"] = max(kept["saved"], saved.total)
            saved.release()
            return result

        def begin() -> None:
            nonlocal chunk
            chunk = SavedBytes(weights)
            chunk.__enter__()

        def end() -> None:
            chunk.__exit__(None, None, None)
            kept["tail"] = max(kept["tail"], chunk.total)
            chunk.release()

        self.calls = 0
        with patch.object(trainer, "run_path", counted), _tail(trainer, begin, end), Meter() as m:
            trainer.step()
        return {**kept, "flops": m.flops, "peak": m.peak, "calls": self.calls}

    def heap(self, k: int, recompute: str, division: Division) -> dict[str, float]:
        """Do one step; return MiB: resident before and at most, counted on, free after forward."""
        trainer = self._trainer(k, recompute, division)
        device = self.parts.model.device
        found = {"before": peak_gib(device) * 1024, "used before": _mallinfo().uordblks / 2**20}

        def look() -> None:
            info = _mallinfo()
            found.update(used=info.uordblks / 2**20, free=info.fordblks / 2**20)

        with _tail(trainer, lambda: None, look):
            trainer.step()
        estimate = self._estimated(k, recompute, division).estimate
        assert estimate is not None
        there = sum(b for name, b in estimate.parts.items() if name.endswith(" weights"))
        found["most"] = peak_gib(device) * 1024
        found["expected"] = (estimate.peak - there) / 2**20
        return found

    def floor(self, k: int) -> dict[str, float]:
        """Return the fewest operations that a step can take, counted on the meta device."""
        estimate = self._estimated(k, "none", None).estimate
        assert estimate is not None
        return {"flops": estimate.floor}

    def versions(self) -> dict[str, str]:
        """Return what this side runs on."""
        return versions(torch, diffusers, peft, alignprop_cli)


@contextmanager
def _tail(trainer: Trainer, begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Open a block in which `begin` is called before each chunk is decoded, `end` when scored.

    The latter is before anything of the chunk has gone back, when most is alive.
    """
    decoder, mixture = trainer.model.decoder, trainer.mixture
    decode, differentiate = decoder.decode, mixture.differentiate

    def decoded(*arguments: Any, **options: Any) -> Any:
        begin()
        return decode(*arguments, **options)

    def differentiated(images: Any, prompts: Any, to_loss: Callable[[Any], Any], ends: Any) -> Any:
        def scored(losses: Any) -> Any:
            loss = to_loss(losses)
            end()
            return loss

        return differentiate(images, prompts, scored, ends)

    with (
        patch.object(decoder, "decode", decoded),
        patch.object(mixture, "differentiate", differentiated),
    ):
        yield


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
    ours = Ours(Case.from_command_line())
    names = ("plan", "step", "count", "heap", "floor", "versions")
    serve({name: getattr(ours, name) for name in names})
