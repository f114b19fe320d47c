"""Run micro-batches without training on them, to measure memory and time before the first step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from alignprop_cli.estimators import window
from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.plan import Plan
from alignprop_cli.planning.speed import PARTS
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.training.trainer import Trainer


class Trial:
    """A trainer as the probe and `compile_network` see it; nothing here changes the training.

    Args:
        trainer: A trainer before its first step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._said = False

    @property
    def plan(self) -> Plan:
        """Return the present plan."""
        return self.trainer.plan

    @property
    def mixture(self) -> Mixture:
        """Return the rewards."""
        return self.trainer.mixture

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that a step needs on top of a single micro-batch."""
        # What the optimiser keeps exists from the first update on. With several micro-batches the
        # float32 gradients of the first live through the second.
        optimizer = self.trainer.optimizer
        parameters = sum(p.numel() for p in optimizer.parameters.values())
        return optimizer.missing_bytes + 4 * (self.plan.accumulation > 1) * parameters

    def apply_plan(self, plan: Plan) -> None:
        """Work by another plan from now on."""
        self.trainer.apply_plan(plan)

    def run_micro_batch(self, calls: int | None = None) -> None:
        """Run one roll-out batch and one micro-batch of it, and drop the gradient.

        Args:
            calls: Number of calls with gradient, counted from the last; None is the largest that
                the estimator can draw.
        """
        # 1. The images of the coming step, all with the same path, so that they form full batches.
        trainer, estimator = self.trainer, self.trainer.settings.estimator
        steps = len(trainer.schedule)
        if calls is None:
            paths = [path for path, _ in estimator.paths(steps)]
            path = max(paths, key=lambda path: (len(path), path.chain_calls(steps)))
        else:
            path = estimator.path(tuple(range(steps - calls, steps)))
        images = [replace(i, path=path, schedule=trainer.schedule) for i in trainer.images()]
        # Some families read prompts as long as they are, and any may come in a later step.
        if (longest := trainer.model.longest_prompt) is not None:
            images = [replace(image, prompt=longest) for image in images]
        # 2. A roll-out batch, and where it is smaller than the micro-batch, the rest of that.
        try:
            with self._caught(), lora.prepared(trainer.model.network.module) as merged:
                starts = trainer.roll_out(images[: self.plan.rollout_batch], merged)
                starts |= trainer.roll_out(images[len(starts) : self.plan.micro_batch], merged)
                trainer.go_back(images[: self.plan.micro_batch], starts, merged)
        finally:
            trainer.optimizer.zero_grad()

    def part_seconds(self, images: int, names: Sequence[str] = PARTS) -> dict[str, float]:
        """Return the seconds of parts of a step for a batch; nothing is learned.

        Args:
            images: Size of the batch.
            names: The parts, fields of `speed.Times`: a call without gradient; a call with
                gradient, decoder and reward, each forward and backward with nothing recomputed.
        """
        try:
            with lora.prepared(self.trainer.model.network.module) as merged:
                parts = self._parts(images, merged)
                return {name: self._timed(parts[name]) for name in names}
        finally:
            self.trainer.optimizer.zero_grad()

    def _parts(self, images: int, merged: lora.Merged) -> dict[str, Callable[[], object]]:
        """Return the parts of a step for a batch, as `part_seconds` names them."""
        # 1. A batch with one call in the window, from noise: what it shows makes no difference. In
        #    the whole chain, which `gradient.rollout_steps` may have shortened.
        trainer = self.trainer
        steps, found = len(trainer.schedule), list(trainer.images())
        last = window(steps - 1, steps)
        found = [replace(image, path=last, schedule=trainer.schedule) for image in found]
        batch = [replace(found[i % len(found)], number=i) for i in range(images)]
        prompts = [image.prompt for image in batch]
        denoise, _ = trainer.chain(batch)
        latents = torch.randn(images, *trainer.shape, device=trainer.model.device)
        # None where all rewards take latents.
        pictures = self._decoded(latents) if trainer.mixture.needs_images else None
        upstream = None if pictures is None else torch.ones_like(pictures)
        plain = trainer.replay.around(merged.around(denoise))

        # 2. The four parts, as a step runs them.
        @torch.no_grad()
        def rollout() -> None:
            plain(latents, trainer.schedule.steps[-1])

        def call() -> None:
            ends = trainer.run_path(batch, latents, merged)
            ends.backward(torch.ones_like(ends))

        def decoder() -> None:
            if pictures is not None:
                leaf = latents.detach().requires_grad_()
                decoded = trainer.model.reward_decoder.decode(leaf, recompute=False)
                decoded.backward(upstream)

        def reward() -> None:
            leaf = latents.detach().requires_grad_()
            with self._caught():
                trainer.mixture.differentiate(pictures, prompts, lambda losses: losses.sum(), leaf)

        return {"rollout": rollout, "call": call, "decoder": decoder, "reward": reward}

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        return self.trainer.model.reward_decoder.decode(latents, recompute=False)

    @contextmanager
    def _caught(self) -> Iterator[None]:
        """Go on after images or rewards that are not finite where a step would be skipped for it.

        What comes after them is not measured: that is said, once.
        """
        finite = self.trainer.finite
        with finite.caught():
            yield
        if finite.fault is not None and not self._said:
            self._said = True
            self.trainer.note(
                f"before the first step: {finite.fault.message}; memory and time are measured "
                "without what would come after it"
            )

    def _timed(self, part: Callable[[], object]) -> float:
        """Return the seconds of a part: the median of three, after one that is not timed."""
        seconds: list[float] = []
        for _ in range(4):
            started = time.perf_counter()
            part()
            if self.trainer.model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])

    def largest(self, value: int | None) -> int | None:
        """Return the largest value over all processes; None if any of them has None."""
        # -1 stands for None, which a tensor cannot hold; sizes are never negative.
        accelerator = self.trainer.accelerator
        mine = torch.tensor([-1 if value is None else value], device=accelerator.device)
        values = cast(Tensor, accelerator.gather(mine))
        return None if int(values.min()) < 0 else int(values.max())
