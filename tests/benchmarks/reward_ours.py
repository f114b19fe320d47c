"""Our trainer as one side of `time_to_reward.py`, and the judge of both sides.

Arguments: the configuration as JSON, the number of threads.
"""

from __future__ import annotations

import json
import sys

import building
import diffusers
import open_clip
import peft
import torch
from safetensors.torch import load_file, save_file
from sides import serve, timed, versions

import alignprop_cli
from alignprop_cli import rng
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.evaluation.draw import choose_samples, draw_samples
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import sampler
from alignprop_cli.prompts import load_prompts


class Ours:
    """The trainer, and the evaluation of any adapter."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.samples = choose_samples(load_prompts(config.eval.prompts), config.eval.images)
        held_out = [sample.prompt for sample in self.samples]
        self.parts = building.open_parts(config, load_prompts(config.train.prompts), held_out)
        self.model, self.module = self.parts.model, self.parts.model.network.module

    def fresh(self, seed: int, adapter: str) -> None:
        """Write an untrained LoRA, with which both sides start."""
        generator = torch.Generator().manual_seed(seed)
        values: dict[str, torch.Tensor] = {}
        for name, value in sorted(lora.weights(self.module).items()):
            drawn = torch.randn(value.shape, generator=generator) / self.config.lora.rank
            values[name] = drawn if ".lora_A." in name else torch.zeros_like(value)
        save_file(values, adapter)

    def start(self, seed: int, adapter: str) -> None:
        """Begin a run with these weights."""
        train = self.config.train.model_copy(update={"seed": seed})
        config = self.config.model_copy(update={"train": train})
        lora.set_weights(self.module, load_file(adapter))
        self.trainer = building.build_trainer(config, self.parts)

    def train(self, steps: int) -> list[dict[str, float]]:
        """Return the wall-clock and processor seconds of each step."""
        return [timed(self.trainer.step) for _ in range(steps)]

    def save(self, adapter: str) -> None:
        """Write the LoRA as it is now."""
        save_file(lora.weights(self.module), adapter)

    def embed(self) -> tuple[str, list[list[float]]]:
        """Return a prompt and what the network is told of it."""
        prompt = self.parts.prompts[0]
        (embeds,) = self.model.embeds[prompt].tensors.values()
        return prompt, embeds.tolist()

    def noise(self, file: str) -> list[str]:
        """Write the noise of the held-out images, and return their prompts."""
        keys = [(sample.prompt_index, sample.image_index) for sample in self.samples]
        shape = self.model.network.latent_shape(None, None)
        drawn = rng.image_noise(self.config.eval.seed, "eval_noise", keys, shape)
        save_file({"noise": drawn}, file)
        return [sample.prompt for sample in self.samples]

    def evaluate(self, adapter: str) -> list[float]:
        """Return the reward of each held-out image with this LoRA, which replaces any other."""
        lora.set_weights(self.module, load_file(adapter))
        drawn = draw_samples(
            self.model,
            self.samples,
            self.parts.mixture,
            sampler(self.config.sample, self.model.family, self.model.network),
            seed=self.config.eval.seed,
            batch_size=self.config.eval.batch_size,
        )
        return drawn.rewards["clip"].tolist()

    def versions(self) -> dict[str, str]:
        """Return what this side runs on."""
        return versions(torch, diffusers, peft, open_clip, alignprop_cli)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    ours = Ours(parse(json.loads(sys.argv[1])))
    names = ("fresh", "start", "train", "save", "embed", "noise", "evaluate", "versions")
    serve({name: getattr(ours, name) for name in names})
