"""TRL 0.22.2's AlignPropTrainer as one side of `step.py`; runs in its own environment.

Arguments: a `sides.Case` as JSON.
"""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import peft
import torch
import trl
from accelerate import PartialState
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from sides import GUIDANCE, PROMPTS, RANK, Case, lora_values, reward, serve, turn, versions
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

# alignprop_cli.planning.meter needs nothing but torch; step.py puts it on the path.
from alignprop_cli.planning.meter import Meter, SavedBytes

_MIXED = {"float32": "no", "bfloat16": "bf16"}


class Peer:
    """The trainer, with a window of our choice."""

    def __init__(self, case: Case) -> None:
        self.case = case
        # It logs through accelerate before there is any state, which raises.
        place = {} if case.device == "cuda" else {"cpu": True}
        PartialState(**place)
        pipeline = DefaultDDPOStableDiffusionPipeline(case.model, use_lora=True)
        config = AlignPropConfig(
            mixed_precision=_MIXED[case.dtype],
            # As ours: float32 products are coarser only beside a network that is.
            allow_tf32=case.dtype == "bfloat16",
            sample_num_steps=case.steps,
            sample_eta=0.0,
            sample_guidance_scale=GUIDANCE,
            train_batch_size=case.peer_batch,
            train_gradient_accumulation_steps=case.batch_size // case.peer_batch,
            truncated_backprop_rand=False,
            log_with=None,
            seed=0,
            accelerator_kwargs=place,
            project_kwargs={"project_dir": case.model},
        )
        self.trainer = AlignPropTrainer(
            config,
            lambda images, prompts, _: (reward(images.float(), prompts), {}),
            self._prompt,
            pipeline,
        )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.sd_pipeline
        state = get_peft_model_state_dict(self.pipeline.unet)
        values = lora_values({name: tuple(value.shape) for name, value in state.items()}, RANK)
        set_peft_model_state_dict(self.pipeline.unet, values)
        self.calls = 0
        self._number = 0
        self.pipeline.unet.register_forward_pre_hook(self._count)

    def _prompt(self) -> tuple[str, dict[str, Any]]:
        self._number += 1
        return PROMPTS[self._number % len(PROMPTS)], {}

    def _count(self, *_: object) -> None:
        self.calls += 1

    def step(self, k: int) -> dict[str, float]:
        """Time one step."""
        self.trainer.config.truncated_backprop_timestep = self.case.steps - k
        return turn(lambda: self.trainer.step(0, 0), self.case.device)

    def count(self, k: int) -> dict[str, float]:
        """Count one step: operations, bytes stored when backward begins, most bytes alive."""
        self.trainer.config.truncated_backprop_timestep = self.case.steps - k
        parts = (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder)
        weights = [t for part in parts for t in (*part.parameters(), *part.buffers())]
        kept: dict[str, float] = {}
        backward = self.trainer.accelerator.backward
        self.calls = 0
        with Meter() as meter:
            saved = SavedBytes(weights)
            saved.__enter__()

            def counted(loss: torch.Tensor, **options: Any) -> None:
                # Of several parts of a batch the first one.
                if not kept:
                    saved.__exit__(None, None, None)
                    kept["saved"] = saved.total
                    saved.release()
                backward(loss, **options)

            self.trainer.accelerator.backward = counted
            self.trainer.step(0, 0)
        self.trainer.accelerator.backward = backward
        return {**kept, "flops": meter.flops, "peak": meter.peak, "calls": self.calls}

    def versions(self) -> dict[str, str]:
        """Return what this side runs on."""
        return versions(torch, diffusers, peft, trl)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    peer = Peer(Case.from_command_line())
    serve({"step": peer.step, "count": peer.count, "versions": peer.versions})
