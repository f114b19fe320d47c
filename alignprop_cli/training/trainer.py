"""One training step on one page: roll out, run the calls with gradient, decode, score, go back.

All randomness is a function of (seed, step, image): dividing a step or resuming changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.errors import is_out_of_memory
from alignprop_cli.guidance import Denoise, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.planning.plan import Plan
from alignprop_cli.prompts import PromptStream
from alignprop_cli.rewards.mixture import Mixture
from alignprop_cli.sampling import DrawNoise, backprop, rollout
from alignprop_cli.training.batches import Batch, Settings, StepImage, batches, images_of_step
from alignprop_cli.training.kl import Penalty, penalty_of
from alignprop_cli.training.nonfinite import FiniteGuard
from alignprop_cli.training.optimizer import Optimizer
from alignprop_cli.training.record import StepRecord, Totals, skipped_step
from alignprop_cli.training.replay import Replay


class Trainer:
    """Owns what changes during a run: the LoRA, the optimiser and the counters.

    Args:
        settings: What a step computes.
        plan: How a step is divided.
        model: With a trainable LoRA in its network, and all prompts encoded.
        mixture: The rewards.
        prompts: Training prompts.
        accelerator: Device and processes.
        note: Called with messages for people.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        model: Model,
        mixture: Mixture,
        prompts: Sequence[str],
        accelerator: Accelerator,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.settings, self.model, self.mixture = settings, model, mixture
        self.accelerator, self.note, self.step_number = accelerator, note, 0
        network, module, sampler = model.network, model.network.module, settings.sampler
        half = any(p.dtype == torch.float16 for p in module.parameters())
        self.optimizer = Optimizer(lora.named_trainable(module), settings.optimizer, scaled=half)
        self.replay = Replay(module, note)
        self.finite = FiniteGuard(settings.on_nonfinite, settings.nonfinite_limit, self.optimizer)
        self.shape = network.latent_shape(sampler.height, sampler.width)
        self.schedule = sampler.schedule(network, self.shape)
        self.stream = PromptStream(list(prompts), settings.seed)
        self.apply_plan(plan)

    def apply_plan(self, plan: Plan) -> None:
        """Divide a step by another plan from now on."""
        self.plan = plan
        self.replay.forget()
        self.model.network.recompute_blocks(plan.checkpoint_network == "block")

    def step(self) -> StepRecord:
        """Do one optimiser step over the global batch.

        Raises:
            RunError: If something is not finite and the guard does not skip the step for that.
        """
        started, totals = time.perf_counter(), Totals(self.mixture.metrics)
        while True:
            # 1. Sample the batch, score it and go back.
            with self.finite.caught():
                totals = self._accumulate()
            # 2. Sum over processes and clip; again with a smaller scale where float16 overflowed.
            norm = self.optimizer.reduce_and_clip(self.accelerator)
            if not self.finite.overflowed(norm, self.accelerator):
                break
        # 3. Update, and record what the step did.
        size, number = self.settings.batch_size, self.step_number + 1
        if why := self.finite.reason_to_skip(norm, number, self.settings.seed):
            self.step_number = number
            return skipped_step(number, size, started, why)
        rate = self.optimizer.step(self.step_number)
        self.finite.check_update(number)
        self.step_number, weights = number, lora.norm(self.model.network.module)
        return totals.record(self.accelerator, number, size, started, norm, weights, rate)

    def images(self) -> list[StepImage]:
        """Return this process's images of the next step."""
        process = (self.accelerator.process_index, self.plan.processes)
        return images_of_step(self.settings, self.stream, self.schedule, self.step_number, process)

    def _accumulate(self) -> Totals:
        """Compute the gradient of this process's images, in smaller parts if memory runs out."""
        while True:
            try:
                self.optimizer.zero_grad()
                with lora.prepared(self.model.network.module) as merged:
                    images = self.images()
                    return self.go_back(images, self.roll_out(images, merged), merged)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self.plan.can_be_halved:
                    raise
            # Outside `except`, where the error no longer holds the tensors of the failed attempt.
            self.apply_plan(self.plan.halved())
            self.note(f"out of memory: repeating this step with {self.plan.describe()}")
            torch.cuda.empty_cache()  # does nothing without a GPU

    def roll_out(self, images: Batch, merged: lora.Merged) -> dict[int, Tensor]:
        """Phase 1: the latents (C, h, w) where each image's path begins, by the image's number.

        Most network calls are here. They store nothing, so batches can be large.
        """
        starts: dict[int, Tensor] = {}
        for batch in batches(images, self.plan.rollout_batch, key=lambda i: i.schedule):
            denoise, draw_noise = self.chain(batch)
            latents = rollout(
                self.replay.around(merged.around(denoise)),
                self._noise("noise", batch),
                batch[0].schedule,
                stops=[image.rollout_calls for image in batch],
                eta=self.settings.sampler.eta,
                draw_noise=draw_noise,
            )
            starts |= {image.number: row for image, row in zip(batch, latents, strict=True)}
        return starts

    def go_back(self, images: Batch, starts: dict[int, Tensor], merged: lora.Merged) -> Totals:
        """Phase 2: along the paths and back, which accumulates the gradient of the mean loss.

        The tail (decode and score) goes back first, in chunks, so that its memory is free again.
        """
        totals = Totals(self.mixture.metrics)
        for batch in batches(images, self.plan.micro_batch, key=lambda i: (i.schedule, i.path)):
            latents = torch.stack([starts[image.number] for image in batch])  # (B, C, h, w)
            kl = penalty_of(self.settings, self.model, self.schedule, self.optimizer)
            ends = self.run_path(batch, latents, merged, kl)  # (B, C, h, w), or n ends of each
            ends.backward(self.score(batch, ends.detach(), totals))
            totals.add_kl(kl.values)
        return totals

    def run_path(
        self, batch: Batch, starts: Tensor, merged: lora.Merged, kl: Penalty | None = None
    ) -> Tensor:
        """Run a batch along its common path; return the clean latents with their graph."""
        denoise, draw_noise = self.chain(batch, self.settings.detach_uncond)
        return backprop(
            kl.around(denoise) if kl else denoise,
            starts,
            batch[0].schedule,
            batch[0].path,
            eta=self.settings.sampler.eta,
            draw_noise=draw_noise,
            plain=merged.around(denoise),
            recomputed=self.plan.recomputed_calls(batch[0].path),
        )

    def score(self, batch: Batch, latents: Tensor, totals: Totals) -> Tensor:
        """Decode, if a reward takes images, and score in chunks; return the gradient in latents."""
        # The weights make it the mean over the global batch, however that is divided. With n ends
        # there are n clean latents per image, each with 1 / n of its weight.
        prompts = [image.prompt for image in batch] * (len(latents) // len(batch))
        weight = len(batch) / (len(latents) * self.settings.batch_size)
        gradients, scale = list[Tensor](), self.optimizer.scaler.scale
        decode = self.model.reward_decoder.decode if self.mixture.needs_images else None
        for start in range(0, len(latents), self.plan.decode_batch):
            part = slice(start, start + self.plan.decode_batch)
            ends = latents[part].requires_grad_()  # (b, C, h, w), a leaf
            images = decode(ends, recompute=self.plan.checkpoint_decoder) if decode else None
            gradient, losses, scores = self.mixture.differentiate(
                images, prompts[part], lambda losses: scale(losses.sum() * weight), ends
            )
            if images is not None:
                images.backward(gradient)  # (b, 3, H, W), on through the decoder to `ends`
            gradients.append(ends.grad)  # type: ignore[arg-type]
            totals.add(losses, scores, batch[0])
        return torch.cat(gradients)

    def chain(self, batch: Batch, detach: bool = False) -> tuple[Denoise, DrawNoise]:
        """Return a batch's guided call, perhaps with a detached branch, and its noise by step."""
        sampler, prompts = self.settings.sampler, [image.prompt for image in batch]
        negative = sampler.negative_prompt if sampler.guidance.enabled else None
        embeds = self.model.conditioning(prompts, negative)
        denoise = guided(self.model.network.predict, embeds, sampler.guidance, detach_uncond=detach)
        return denoise, lambda i: self._noise("eta", batch, i)

    def _noise(self, purpose: rng.Purpose, batch: Batch, *counters: int) -> Tensor:
        keys = [(self.step_number, image.number) for image in batch]
        noise = rng.image_noise(self.settings.seed, purpose, keys, self.shape, *counters)
        return noise.to(self.model.device)  # (B, C, h, w)
