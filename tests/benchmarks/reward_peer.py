"""TRL 0.22.2's AlignPropTrainer as one side of `time_to_reward.py`; in its own environment.

Arguments: the model's folder, our configuration as JSON, the number of threads.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import diffusers
import open_clip
import peft
import torch
import transformers
import trl
from accelerate import PartialState
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sides import serve, timed, versions
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

# These need nothing more than this environment has; time_to_reward.py puts them on the path.
from alignprop_cli.prompts import PromptStream, load_prompts
from alignprop_cli.rewards.clip import ClipReward

Settings = dict[str, Any]


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's, but for the LoRA: its own has rank 4 and the attention projections, always."""

    def __init__(self, folder: str, settings: Settings) -> None:
        self.settings = settings
        super().__init__(folder, use_lora=True)

    def get_trainable_layers(self) -> torch.nn.Module:
        """Return the network with a fresh LoRA."""
        config = LoraConfig(
            r=self.settings["rank"],
            lora_alpha=self.settings["alpha"] or self.settings["rank"],
            init_lora_weights="gaussian",
            target_modules=list(self.settings["target_modules"]),
        )
        self.unet.add_adapter(config)
        return self.unet


class Peer:
    """The trainer with the settings of our configuration."""

    def __init__(self, folder: str, config: Settings) -> None:
        self.folder, self.config = folder, config
        self.reward = ClipReward(config["reward"]["clip"]["model"])
        # It logs through accelerate before there is any state, which raises.
        PartialState(cpu=True)

    def start(self, seed: int, adapter: str) -> None:
        """Begin a run with these weights."""
        sample, train = self.config["sample"], self.config["train"]
        stream = PromptStream(load_prompts(train["prompts"]), seed)
        numbers = iter(range(sys.maxsize))
        self.pipeline = Pipeline(self.folder, self.config["lora"])
        self.trainer = AlignPropTrainer(
            AlignPropConfig(
                mixed_precision="no",
                allow_tf32=False,
                sample_num_steps=sample["num_inference_steps"],
                sample_eta=sample["eta"],
                sample_guidance_scale=sample["guidance_scale"],
                train_batch_size=train["micro_batch"],
                train_gradient_accumulation_steps=train["batch_size"] // train["micro_batch"],
                train_learning_rate=train["learning_rate"],
                train_adam_beta1=train["adam_beta1"],
                train_adam_beta2=train["adam_beta2"],
                train_adam_epsilon=train["adam_epsilon"],
                train_adam_weight_decay=train["weight_decay"],
                train_max_grad_norm=train["max_grad_norm"],
                truncated_backprop_rand=False,
                truncated_backprop_timestep=(
                    sample["num_inference_steps"] - self.config["gradient"]["k"]
                ),
                log_with=None,
                seed=seed,
                accelerator_kwargs={"cpu": True},
                project_kwargs={"project_dir": self.folder},
            ),
            lambda images, prompts, _: (self.reward(images, prompts), {}),
            lambda: (stream.prompt(next(numbers)), {}),
            self.pipeline,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        set_peft_model_state_dict(self.pipeline.unet, load_file(adapter))

    def train(self, steps: int) -> list[dict[str, float]]:
        """Return the wall-clock and processor seconds of each step."""
        # Epoch 0, for it saves a checkpoint in every other.
        return [timed(lambda: self.trainer.step(0, 0)) for _ in range(steps)]

    def save(self, adapter: str) -> None:
        """Write the LoRA as it is now."""
        state = get_peft_model_state_dict(self.pipeline.unet)
        save_file({name: value.detach().contiguous() for name, value in state.items()}, adapter)

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> torch.Tensor:
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            prompts,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
        ).input_ids
        return self.pipeline.text_encoder(ids)[0]

    def embed(self, prompt: str) -> list[list[float]]:
        """Return what the network is told of a prompt."""
        return self._embed([prompt])[0].tolist()

    @torch.no_grad()
    def draw(self, noise: str, prompts: list[str]) -> list[float]:
        """Return the reward of images from this noise, sampled as TRL samples in training."""
        sample, size = self.config["sample"], self.config["eval"]["batch_size"]
        latents = load_file(noise)["noise"]
        rewards: list[float] = []
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            output = self.pipeline.rgb_with_grad(
                prompt_embeds=self._embed(batch),
                negative_prompt_embeds=self.trainer.neg_prompt_embed.repeat(len(batch), 1, 1),
                latents=latents[start : start + size],
                num_inference_steps=sample["num_inference_steps"],
                guidance_scale=sample["guidance_scale"],
                eta=sample["eta"],
                output_type="pt",
            )
            rewards += self.reward(output.images, batch).tolist()
        return rewards

    def versions(self) -> dict[str, str]:
        """Return what this side runs on."""
        return versions(torch, diffusers, transformers, peft, open_clip, trl)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(sys.argv[3]))
    peer = Peer(sys.argv[1], json.loads(sys.argv[2]))
    names = ("start", "train", "save", "embed", "draw", "versions")
    serve({name: getattr(peer, name) for name in names})
