"""Our trainer with each part of its speed on and off, as one side of `step.py --parts`.

A window is planned once, by the times of this device, as `alignprop train` does. Variants of it
keep the plan, but for those that are about the plan. Each answer has the seconds of a step and,
where it can say, those that the plan's model of time expects.

Arguments: a `sides.Case` as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from ours import Ours
from peft.tuners.lora import Linear
from sides import Case, serve, turn

from alignprop_cli.device import set_deterministic
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.linear import LoraLinear
from alignprop_cli.models.compiled import compile_blocks, take_back
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import Footprint, expected_correction
from alignprop_cli.planning.plan import Plan, PlanRequest
from alignprop_cli.planning.probe import measure_times, settle
from alignprop_cli.planning.speed import Pace, Times, step_seconds
from alignprop_cli.training import setup
from alignprop_cli.training.replay import cuda_recorder
from alignprop_cli.training.trainer import Trainer
from alignprop_cli.training.trial import Trial

Window = int | str
"""K, or `random`."""


class Variants(Ours):
    """The trainer of one window at a time, and what can be changed about it."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        device = self.parts.model.device
        set_deterministic(device, wanted=device.type == "cpu")
        self._footprint: Footprint | None = None
        self._peft: Footprint | None = None
        self._times: Times | None = None
        self._window: Window | None = None

    def plan_window(self, window: Window) -> dict[str, Any]:
        """Plan a window and make it the present one; return the plan in words and numbers."""
        config = self._config(1 if window == "random" else int(window), "auto", None)
        if window == "random":
            gradient = config.gradient.model_copy(update={"method": "random_k"})
            config = config.model_copy(update={"gradient": gradient})
        if self._footprint is None:
            self._footprint = planning.measure(config, self.case.device)
            with patch.object(lora, "take_over", lambda network: None):
                self._peft = planning.measure(config, self.case.device)
        self.request = planning.plan_request(config, 1)
        first = self._planned(None)
        self.trainer = Trainer(
            setup.settings(config, self.parts.model, self.request.estimator),
            first,
            self.parts.model,
            self.parts.mixture,
            self.parts.prompts,
            self.parts.accelerator,
        )
        trial = Trial(self.trainer)
        if self._times is None:
            trial.apply_plan(replace(first, checkpoint_network="none", stored_calls=0))
            self._times = measure_times(trial, first.share)
        self.best = self._settled(self.request, self._times)
        self._window = window
        return {"plan": self.best.describe(), "times": str(self._times)}

    def _planned(self, times: Times | None, request: PlanRequest | None = None) -> Plan:
        return make_plan(
            request or self.request,
            footprint=self._footprint,
            budget=self.parts.budget,
            correction=expected_correction(self.case.device),
            times=times,
        )

    def _settled(self, request: PlanRequest, times: Times | None) -> Plan:
        """Return the plan that is measured to fit, on the CPU the one that is estimated to."""
        assert self._footprint is not None
        self.trainer.apply_plan(self._planned(times, request))
        if self.case.device == "cuda":
            settle(Trial(self.trainer), request, self._footprint, self.parts.budget, times=times)
        return self.trainer.plan

    def _expected(self, plan: Plan, times: Times | None = None) -> float:
        assert self._footprint is not None
        assert self._times is not None
        return step_seconds(times or self._times, self._footprint, self.request, plan, plan.share)

    def vary(self, variant: str) -> dict[str, Any]:
        """Time a step of the present window with something changed, or say why there is none."""
        try:
            with getattr(self, f"_{variant}")() as expected:
                if self.case.device != "cuda":  # there `turn` itself warms up
                    self.trainer.step()
                found: dict[str, Any] = turn(self.trainer.step, self.case.device)
                found |= {"expected": expected, "plan": self.trainer.plan.describe()}
        except (RuntimeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return found

    @contextmanager
    def _as_planned(self) -> Iterator[float | None]:
        self.trainer.apply_plan(self.best)
        yield self._expected(self.best)

    @contextmanager
    def _peft_lora(self) -> Iterator[float | None]:
        """With peft's own layers: six operators each, of which the launches are expected."""
        assert self._times is not None
        assert self._footprint is not None
        assert self._peft is not None
        network = self.parts.model.network.module
        ours = [layer for layer in network.modules() if isinstance(layer, LoraLinear)]
        times, now, then = self._times, self._footprint, self._peft
        more = {
            "rollout": then.rollout.launches / now.rollout.launches,
            "call": then.call["none"].launches / now.call["none"].launches,
        }
        paces = {name: getattr(times, name) for name in more}
        times = replace(times, **{n: Pace(p.launch * more[n], p.each) for n, p in paces.items()})
        self.trainer.apply_plan(self.best)
        for layer in ours:
            layer.__class__ = Linear
        try:
            yield self._expected(self.best, times)
        finally:
            for layer in ours:
                layer.__class__ = LoraLinear

    @contextmanager
    def _replayed(self) -> Iterator[float | None]:
        """With the roll-out as a CUDA graph: no launches, only what each image takes."""
        assert self._times is not None
        self.trainer.apply_plan(self.best)
        replayed = replace(self._times, replayed=Pace(0.0, self._times.rollout.each))
        self.trainer.replay.start(cuda_recorder())
        try:
            yield self._expected(self.best, replayed)
            if not self.trainer.replay.is_on:
                raise RuntimeError("the calls could not be recorded")
        finally:
            self.trainer.replay.stop()

    @contextmanager
    def _contiguous(self) -> Iterator[float | None]:
        """With the network in contiguous memory; nothing is expected of it."""
        network = self.parts.model.network.module
        self.trainer.apply_plan(self.best)
        network.to(memory_format=torch.contiguous_format)
        try:
            yield None
        finally:
            network.to(memory_format=torch.channels_last)

    @contextmanager
    def _one_batch(self) -> Iterator[float | None]:
        """With one batch for roll-out, backward and decoder."""
        micro = self.best.micro_batch
        plan = replace(self.best, rollout_batch=micro, decode_batch=micro)
        self.trainer.apply_plan(plan)
        yield self._expected(plan)

    @contextmanager
    def _by_operations(self) -> Iterator[float | None]:
        """With the plan that has the fewest operations."""
        plan = self._settled(self.request, None)
        yield self._expected(plan)

    @contextmanager
    def _deterministic(self) -> Iterator[float | None]:
        """With kernels that repeat bit for bit."""
        device = self.parts.model.device
        self.trainer.apply_plan(self.best)
        set_deterministic(device, wanted=True)
        try:
            yield None
        finally:
            set_deterministic(device, wanted=device.type == "cpu")
            torch.backends.cuda.enable_cudnn_sdp(True)
            torch.backends.cuda.enable_mem_efficient_sdp(True)

    @contextmanager
    def _compiled(self) -> Iterator[float | None]:
        """With compiled blocks; the step that is not timed compiles them."""
        network = self.parts.model.network.module
        self.trainer.apply_plan(self.best)
        torch._dynamo.config.recompile_limit = 256
        compile_blocks(network, dynamic=False)
        try:
            self.trainer.step()
            yield None
        finally:
            take_back(network)


if __name__ == "__main__":
    made = Variants(Case.from_command_line())
    commands: dict[str, Callable[..., Any]] = {
        name: getattr(made, name) for name in ("plan_window", "vary", "versions")
    }
    serve(commands)
