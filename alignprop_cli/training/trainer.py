"""One optimiser step by reward backpropagation, and the loop around it.

Everything random in a step is a function of (seed, step, image number within the step), so the
same step comes out however it is divided into micro-batches and processes, and a resumed run
continues exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli import device as machine
from alignprop_cli import rng
from alignprop_cli.config.schema import Config, GradientConfig, TrainConfig
from alignprop_cli.errors import RunError
from alignprop_cli.estimators import Full, GaussianK, GradWindow, LastK, RandomK, Truncation
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import DiffusionModel
from alignprop_cli.planning.plan import Plan
from alignprop_cli.prompts import PromptStream
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.sampling import sample
from alignprop_cli.training.checkpoint import State

# Gradients of a mean over many images are near 1e-7, below what float16 can hold.
_FLOAT16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of one reward over the images of a step."""

    mean: float
    std: float


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did; a line of metrics.jsonl.

    Args:
        step: Counted from 1.
        images_seen: Images drawn for training so far.
        loss: Mean over the global batch.
        rewards: By member of the mixture, and what members report beside, over the global batch.
        grad_norm: L2 norm before clipping.
        lora_norm: L2 norm of the LoRA's weights after the step.
        learning_rate: Used in this step.
        backprop_steps: Mean number of network calls that carried gradient.
        seconds: Wall-clock time.
        peak_memory_gib: Largest so far: allocated on CUDA, resident otherwise.
    """

    step: int
    images_seen: int
    loss: float
    rewards: dict[str, RewardStats]
    grad_norm: float
    lora_norm: float
    learning_rate: float
    backprop_steps: float
    seconds: float
    peak_memory_gib: float


def make_truncation(config: GradientConfig) -> Truncation:
    """Return the estimator that the configuration names."""
    if config.method == "full":
        return Full()
    if config.method == "last_k":
        return LastK(config.k)
    if config.method == "random_k":
        return RandomK(config.k_min, config.k_max)
    return GaussianK(config.mean, config.std)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return AdamW's learning rate in a step, counted from 0.

    It rises over `warmup_steps` and falls over `lr_decay_steps`. It does not look at `steps`, so a
    run that is resumed with more steps is the run that had them from the start.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.lr_decay_steps is None:
        return config.learning_rate
    done = min(step - config.warmup_steps, config.lr_decay_steps - 1) / config.lr_decay_steps
    return config.learning_rate * (1.0 - done)


class Trainer:
    """Owns what changes during a run: the LoRA, the optimiser and the counters.

    Args:
        config: The complete configuration.
        plan: How a step is divided.
        model: With a trainable LoRA in its network.
        mixture: The rewards.
        prompts: Training prompts.
        accelerator: Device and processes.
        note: Told what happens besides, for people.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        model: DiffusionModel,
        mixture: Mixture,
        prompts: Sequence[str],
        accelerator: Accelerator,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.config = config
        self.model = model
        self.mixture = mixture
        self.accelerator = accelerator
        self._note = note
        self.step_number = 0
        self.images_seen = 0
        self.parameters = lora.trainable(model.network)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.adopt(plan)
        self._stream = PromptStream(list(prompts), train.seed)
        self._schedule = model.schedule(config.sample.num_inference_steps)
        self._shape = model.latent_shape(config.sample.height, config.sample.width)
        self._truncation = make_truncation(config.gradient)
        half = next(model.network.parameters()).dtype == torch.float16
        self._loss_scale = _FLOAT16_LOSS_SCALE if half else 1.0

    def step(self) -> StepRecord:
        """Do one optimiser step over the global batch.

        Raises:
            RunError: If images, rewards or gradients are not finite; nothing is updated then.
        """
        started = time.perf_counter()
        # 1. Draw, decode, score and go back, one micro-batch after the other.
        losses, scores, backprop_steps = self._accumulate()

        # 2. Sum over processes, clip, check, update.
        grad_norm = self._finish_gradients()
        if grad_norm == 0.0 and self.step_number == 0:
            self._note(
                "the gradient of the first step is exactly 0: the rewards do not change with the "
                "images (do they round?), or their targets are reached"
            )
        rate = self._set_learning_rate()
        self.optimizer.step()
        self.step_number += 1
        self.images_seen += self.plan.batch_size

        # 3. Record.
        gathered = {name: self._gather(values) for name, values in scores.items()}
        return StepRecord(
            step=self.step_number,
            images_seen=self.images_seen,
            loss=float(self._gather(losses).mean()),
            rewards={
                name: RewardStats(float(v.mean()), float(v.std(correction=0)))
                for name, v in gathered.items()
            },
            grad_norm=grad_norm,
            lora_norm=lora.norm(self.model.network),
            learning_rate=rate,
            backprop_steps=backprop_steps,
            seconds=time.perf_counter() - started,
            peak_memory_gib=machine.peak_gib(self.model.device),
        )

    def _accumulate(self) -> tuple[list[Tensor], dict[str, list[Tensor]], float]:
        """Draw the global batch and add up its gradient; in smaller parts if memory runs out.

        Prompts, noise and windows do not depend on the parts, so nothing but the rounding changes.

        Returns:
            Losses, figures by name, and the mean number of calls that carried gradient.
        """
        while True:
            try:
                return self._accumulate_once()
            except torch.OutOfMemoryError:
                # Other processes would wait for this one, which cannot tell them.
                if self.plan.micro_batch == 1 or self.plan.processes > 1:
                    raise
            # Here the failed attempt's tensors are no longer held by the error.
            self.plan = self.plan.halved()
            self._note(f"out of memory: doing this step again, {self.plan.describe()}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _accumulate_once(self) -> tuple[list[Tensor], dict[str, list[Tensor]], float]:
        plan = self.plan
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        scores: dict[str, list[Tensor]] = {name: [] for name in self.mixture.figures}
        backprop_steps = 0
        merged = lora.Merged(self.model.network)

        for part in range(plan.accumulation):
            first = part * plan.processes * plan.micro_batch
            window = self.window(first // plan.window_group)
            backprop_steps += len(window)
            first += self.accelerator.process_index * plan.micro_batch
            numbers = range(first, first + plan.micro_batch)
            part_scores, part_losses = self.forward(numbers, window, merged)
            # The mean over the global batch, so that dividing it changes nothing.
            with self.mixture.blamed():
                (part_losses.sum() * (self._loss_scale / plan.batch_size)).backward()
            losses.append(part_losses.detach())
            for name, values in part_scores.items():
                scores[name].append(values.detach())
        return losses, scores, backprop_steps / plan.accumulation

    def adopt(self, plan: Plan) -> None:
        """Go on with another plan for the same batch."""
        self.plan = plan
        self.model.recompute_blocks(plan.checkpoint_network == "block")

    def window(self, group: int) -> GradWindow:
        """Return the gradient window of a group of images in the coming step."""
        generator = rng.generator(self.config.train.seed, "window", self.step_number, group)
        return self._truncation.draw(len(self._schedule), generator)

    def forward(
        self, numbers: Sequence[int], window: GradWindow, merged: lora.Merged
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw and score some images of the coming step.

        Args:
            numbers: Which images of the global batch, B of them.
            window: The network calls that carry gradient.
            merged: The network with the LoRA as it is now, for all other calls.

        Returns:
            What the mixture measures and losses, each (B,). Differentiable in the LoRA's parameters
            through the window.
        """
        seed, config = self.config.train.seed, self.config
        first = self.step_number * self.plan.batch_size
        prompts = [self._stream.prompt(first + number) for number in numbers]
        keys = [(self.step_number, number) for number in numbers]
        device = self.model.device

        def draw_noise(i: int) -> Tensor:
            return rng.image_noise(seed, "eta", keys, self._shape, i).to(device)

        latents = rng.image_noise(seed, "noise", keys, self._shape).to(device)
        conditioning = self.model.encode_prompts(prompts, config.sample.negative_prompt)
        denoise = self.model.denoiser(
            conditioning, config.sample.guidance_scale, config.sample.guidance_interval
        )

        def rollout(latents: Tensor, timestep: float) -> Tensor:
            with merged:
                return denoise(latents, timestep)

        schedule = self._schedule
        calls = config.gradient.rollout_steps
        if calls is not None and calls < window.start:
            schedule = schedule.shortened(window.start, calls)
            window = GradWindow(calls, calls + len(window))
        latents = sample(
            denoise,
            latents,
            schedule,
            eta=config.sample.eta,
            window=window,
            rollout=rollout,
            draw_noise=draw_noise,
            recomputed=self._recomputed(window),
        )
        images = self.model.decode(latents, use_checkpoint=self.plan.checkpoint_decoder)
        scores = self.mixture.score(images, prompts)
        self.mixture.check_gradients(scores, images)
        return scores, self.mixture.losses(scores)

    def _recomputed(self, window: GradWindow) -> GradWindow | None:
        """Return the calls of a window that backward computes again as a whole."""
        if self.plan.checkpoint_network != "call":
            return None
        return GradWindow(window.start, window.stop - self.plan.stored_calls)

    def state(self) -> State:
        """Return the counters and a copy of the optimiser's tensors."""
        tensors = {
            f"{number}.{name}": value.detach().cpu().clone()
            for number, parameter in enumerate(self.parameters)
            for name, value in self.optimizer.state[parameter].items()
        }
        return State(self.step_number, self.images_seen, tensors)

    def load_state(self, state: State) -> None:
        """Continue from a checkpoint's counters and optimiser.

        Raises:
            RunError: If the optimiser belongs to other parameters.
        """
        for number, parameter in enumerate(self.parameters):
            prefix = f"{number}."
            found = {
                name.removeprefix(prefix): value.clone()
                for name, value in state.optimizer.items()
                if name.startswith(prefix)
            }
            moments = [value for name, value in found.items() if name != "step"]
            complete = found.keys() == {"step", "exp_avg", "exp_avg_sq"}
            if not complete or any(value.shape != parameter.shape for value in moments):
                raise RunError("the checkpoint's optimiser does not fit the LoRA of this run")
            self.optimizer.state[parameter] = {
                name: value.to(parameter.device) for name, value in found.items()
            }
        self.step_number, self.images_seen = state.step, state.images_seen

    def _set_learning_rate(self) -> float:
        rate = learning_rate(self.config.train, self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _finish_gradients(self) -> float:
        """Sum over processes, undo the loss scale, clip; return the norm before clipping."""
        for parameter in self.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if self.plan.processes > 1:
                gradient = cast(Tensor, self.accelerator.reduce(gradient, "sum"))
            parameter.grad = gradient / self._loss_scale
        limit = self.config.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise RunError(
                f"step {self.step_number + 1}: the gradient is not finite "
                f"(train.seed {self.config.train.seed}); nothing was updated in this step",
                hint="try fewer backpropagated steps, a lower train.learning_rate, or "
                "model.dtype bfloat16 or float32",
            )
        return norm

    def _gather(self, values: list[Tensor]) -> Tensor:
        """Return the values of all images of the step on every process, float64 on the CPU."""
        joined = torch.cat(values)
        if self.plan.processes > 1:
            joined = cast(Tensor, self.accelerator.gather(joined))
        return joined.double().cpu()


def train(
    trainer: Trainer,
    steps: int,
    *,
    after_step: Callable[[StepRecord], object],
    should_stop: Callable[[], bool],
) -> bool:
    """Step until `steps` are done or a stop is asked for.

    Args:
        trainer: Where to go on from.
        steps: Number of the last step.
        after_step: Called with the record of every step: metrics, checkpoints, samples.
        should_stop: Asked after every step.

    Returns:
        Whether all steps were done.
    """
    while trainer.step_number < steps:
        after_step(trainer.step())
        if should_stop():
            return trainer.step_number >= steps
    return True
