"""TRL 0.22.2's AlignPropTrainer as one side of `step.py`; runs in its own environment.

Arguments: the model's folder, the number of sampling steps, the number of threads, the precision.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import diffusers
import peft
import torch
import trl
from accelerate import PartialState
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from sides import PROMPTS, lora_values, reward, serve, timed
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

# alignprop_cli.planning.meter needs nothing but torch and psutil; step.py puts it on the path.
from alignprop_cli.planning.meter import Meter, SavedBytes

RANK = 4

_MIXED = {"float32": "no", "bfloat16": "bf16"}


class Peer:
    """The trainer, with a window of our choice."""

    def __init__(self, folder: str, steps: int, dtype: str) -> None:
        self.steps = steps
        # It logs through accelerate before there is any state, which raises.
        PartialState(cpu=True)
        pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=True)
        config = AlignPropConfig(
            mixed_precision=_MIXED[dtype],
            allow_tf32=False,
            sample_num_steps=steps,
            sample_eta=0.0,
            sample_guidance_scale=7.5,
            train_batch_size=len(PROMPTS),
            train_gradient_accumulation_steps=1,
            truncated_backprop_rand=False,
            log_with=None,
            seed=0,
            accelerator_kwargs={"cpu": True},
            project_kwargs={"project_dir": folder},
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
        self.trainer.config.truncated_backprop_timestep = self.steps - k
        return timed(lambda: self.trainer.step(0, 0))

    def count(self, k: int) -> dict[str, float]:
        """Count one step: operations, bytes stored when backward begins, most bytes alive."""
        self.trainer.config.truncated_backprop_timestep = self.steps - k
        parts = (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder)
        weights = [t for part in parts for t in (*part.parameters(), *part.buffers())]
        kept: dict[str, float] = {}
        backward = self.trainer.accelerator.backward
        self.calls = 0
        with Meter() as meter:
            saved = SavedBytes(weights)
            saved.__enter__()

            def counted(loss: torch.Tensor, **options: Any) -> None:
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
        packages = (torch, diffusers, peft, trl)
        return {package.__name__: package.__version__ for package in packages}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(sys.argv[3]))
    peer = Peer(sys.argv[1], int(sys.argv[2]), sys.argv[4])
    serve({"step": peer.step, "count": peer.count, "versions": peer.versions})
