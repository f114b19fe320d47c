"""Our trainer as one side of `time_to_reward.py`, and the judge of both sides.

Arguments: the configuration as JSON, the number of threads.
"""

from __future__ import annotations

import json
import sys

import diffusers
import open_clip
import peft
import torch
from safetensors.torch import load_file, save_file
from sides import serve, timed

import alignprop_cli
from alignprop_cli import device as machine
from alignprop_cli import rng
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.device import make_accelerator
from alignprop_cli.evaluation import draw as evaluator
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import load_model
from alignprop_cli.planning.plan import make_plan
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.training.trainer import Trainer


class Ours:
    """The trainer, and the evaluation of any adapter."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = make_accelerator()
        machine.keep_memory()
        self.model = load_model(config.model, self.accelerator.device)
        lora.inject(
            self.model.network,
            rank=config.lora.rank,
            alpha=config.lora.alpha or config.lora.rank,
            target_modules=config.lora.target_modules,
            seed=0,
        )
        self.mixture = build_mixture(config.reward, config.loss, self.accelerator.device)
        self.pictures = evaluator.choose(load_prompts(config.eval.prompts), config.eval.images)

    def fresh(self, seed: int, adapter: str) -> None:
        """Write an untrained LoRA, with which both sides start."""
        generator = torch.Generator().manual_seed(seed)
        values: dict[str, torch.Tensor] = {}
        for name, value in sorted(lora.weights(self.model.network).items()):
            drawn = torch.randn(value.shape, generator=generator) / self.config.lora.rank
            values[name] = drawn if ".lora_A." in name else torch.zeros_like(value)
        save_file(values, adapter)

    def start(self, seed: int, adapter: str) -> None:
        """Begin a run with these weights."""
        train = self.config.train.model_copy(update={"seed": seed})
        config = self.config.model_copy(update={"train": train})
        lora.set_weights(self.model.network, load_file(adapter))
        plan = make_plan(config, processes=1)
        prompts = load_prompts(train.prompts)
        self.trainer = Trainer(config, plan, self.model, self.mixture, prompts, self.accelerator)

    def train(self, steps: int) -> list[dict[str, float]]:
        """Return the wall-clock and processor seconds of each step."""
        return [timed(self.trainer.step) for _ in range(steps)]

    def save(self, adapter: str) -> None:
        """Write the LoRA as it is now."""
        save_file(lora.weights(self.model.network), adapter)

    def embed(self, prompt: str) -> list[list[float]]:
        """Return what the network is told of a prompt."""
        return self.model.encode_prompts([prompt]).prompt_embeds[0].tolist()

    def noise(self, file: str) -> list[str]:
        """Write the noise of the held-out pictures, and return their prompts."""
        keys = [(picture.prompt_index, picture.image_index) for picture in self.pictures]
        shape = self.model.latent_shape(None, None)
        drawn = rng.image_noise(self.config.eval.seed, "eval_noise", keys, shape)
        save_file({"noise": drawn}, file)
        return [picture.prompt for picture in self.pictures]

    def evaluate(self, adapter: str) -> list[float]:
        """Return the reward of each held-out picture with this LoRA, which replaces any other."""
        lora.set_weights(self.model.network, load_file(adapter))
        drawn = evaluator.draw(
            self.model,
            self.pictures,
            self.mixture,
            self.config.sample,
            seed=self.config.eval.seed,
            batch_size=self.config.eval.batch_size,
        )
        return drawn.rewards["clip"].tolist()

    def versions(self) -> dict[str, str]:
        """Return what this side runs on."""
        packages = (torch, diffusers, peft, open_clip, alignprop_cli)
        return {package.__name__: package.__version__ for package in packages}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    ours = Ours(parse(json.loads(sys.argv[1])))
    names = ("fresh", "start", "train", "save", "embed", "noise", "evaluate", "versions")
    serve({name: getattr(ours, name) for name in names})
