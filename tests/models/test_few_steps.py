"""Few-step models of Stable Diffusion: sampled by their own schedulers, as plain diffusers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.estimators import full, last_k
from alignprop_cli.guidance import guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import footprint
from alignprop_cli.sampling import backprop, rollout, sample
from tests.factories import SD1_BETAS, fill_lora_b, generator, randn, small_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a cat", "dogs"]
SHAPE = (2, 4, 8, 8)


def load(path: Path) -> Model:
    return open_model(ModelConfig(id=str(path), dtype="float32"), [*PROMPTS, ""], CPU)


def with_scheduler(folder: Path, kind: str, pipeline: str | None = None, **settings: Any) -> Path:
    """Give a model another scheduler, and perhaps its pipeline another class."""
    made = getattr(diffusers, kind)(**SD1_BETAS | settings)
    made.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    values = json.loads(index.read_text()) | {"scheduler": ["diffusers", kind]}
    index.write_text(json.dumps(values | ({"_class_name": pipeline} if pipeline else {})))
    return folder


@torch.no_grad()
def ours(model: Model, **options: Any) -> Tensor:
    chain = sampler(SampleConfig(**options), model.family, model.network)
    negative = "" if chain.guidance.enabled else None
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, negative), chain.guidance)
    draws, source = list[Tensor](), generator(5)

    def draw_noise(i: int) -> Tensor:
        while len(draws) <= i:
            draws.append(torch.randn(SHAPE, generator=source))
        return draws[i]

    latents = rollout(
        denoise,
        randn(3, *SHAPE, dtype=torch.float32),
        chain.schedule(model.network, SHAPE[1:]),
        eta=chain.eta,
        draw_noise=draw_noise,
    )
    return model.decoder.decode(latents)


def theirs(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=randn(3, *SHAPE, dtype=torch.float32),
        generator=generator(5),
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        # As SD-Turbo is published, and as models of its kind are.
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction", "steps_offset": 1}),
        ("LCMScheduler", {"steps_offset": 1}),
        ("LCMScheduler", {"steps_offset": 1, "timestep_scaling": 1e-3}),
    ],
)
def test_a_few_step_model_is_sampled_by_its_own_scheduler(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    folder = with_scheduler(small_pipeline(tmp_path / "model"), kind, **settings)
    model, pipeline = load(folder), StableDiffusionPipeline.from_pretrained(folder)
    for steps, guidance in ((4, 0.0), (1, 0.0), (3, 2.0)):
        asked = {"num_inference_steps": steps, "guidance_scale": guidance}
        torch.testing.assert_close(
            ours(model, **asked), theirs(pipeline, **asked), rtol=0.0, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_without_an_offset_gets_that_of_the_pipeline(tmp_path: Path, kind: str) -> None:
    # As in old exports: the pipeline sets it to 1 then.
    leading = {"timestep_spacing": "leading"}
    folder = with_scheduler(small_pipeline(tmp_path / "model"), kind, **leading)
    file = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text())
    del values["steps_offset"]
    file.write_text(json.dumps(values))
    scheduler = StableDiffusionPipeline.from_pretrained(folder).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[-1] == 1
    meta = meta_model(ModelConfig(id=str(folder)), torch.float32).parts.network
    for network in (load(folder).network, meta):
        steps = network.schedule(4, SHAPE[1:]).steps
        assert [step.timestep for step in steps] == scheduler.timesteps.tolist()


def test_a_lora_of_a_consistency_model_is_sampled_on_its_base(tmp_path: Path) -> None:
    # As LCM-LoRA is used: the base model's own configuration, with another scheduler.
    folder = small_pipeline(tmp_path / "model")
    model = load(folder)
    lora.inject(model.network.module, rank=2, alpha=2, target_modules=("to_q", "to_v"), seed=0)
    fill_lora_b(model.network.module, seed=1)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet = model.network.module
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    asked = {"num_inference_steps": 4, "guidance_scale": 1.0}
    found = ours(model, **asked, scheduler="lcm")
    torch.testing.assert_close(found, theirs(pipeline, **asked), rtol=0.0, atol=1e-4)
    assert not torch.allclose(found, ours(model, **asked), atol=1e-2)


# --- Guidance that was distilled into the network ---


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_pipeline(tmp_path_factory.mktemp("lcm") / "model", time_cond_proj_dim=16)
    return with_scheduler(folder, "LCMScheduler", "LatentConsistencyModelPipeline", steps_offset=1)


@pytest.mark.parametrize("pipeline", [LatentConsistencyModelPipeline, StableDiffusionPipeline])
def test_a_network_is_told_the_guidance_scale(distilled: Path, pipeline: Any) -> None:
    model = load(distilled)
    assert model.family.pipeline_class == "LatentConsistencyModelPipeline"
    plain, found = pipeline.from_pretrained(distilled), list[Tensor]()
    for scale in (1.0, 8.5):
        asked = {"num_inference_steps": 4, "guidance_scale": scale}
        found.append(ours(model, **asked))
        torch.testing.assert_close(found[-1], theirs(plain, **asked), rtol=0.0, atol=1e-4)
    assert not torch.allclose(*found, atol=1e-3)


def test_with_embedded_guidance_there_is_one_branch_also_in_the_plan(distilled: Path) -> None:
    model, batches = load(distilled), list[int]()
    model.network.module.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    ours(model, num_inference_steps=3, guidance_scale=8.0)
    assert batches == [2, 2, 2]
    made = meta_model(ModelConfig(id=str(distilled)), torch.float32)
    seen = list[int]()
    made.parts.network.module.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    config = SampleConfig(num_inference_steps=3, guidance_scale=8.0)
    chain = sampler(config, model.family, made.parts.network)
    footprint.guided_call(made, chain, SHAPE[1:])(torch.empty(1, *SHAPE[1:], device="meta"))
    assert seen == [1]


def test_what_embedded_guidance_cannot_obey_is_refused(distilled: Path) -> None:
    model = load(distilled)
    for key, config in (
        ("guidance_interval", SampleConfig(guidance_interval=(0.2, 0.8))),
        ("negative_prompt", SampleConfig(negative_prompt="dogs")),
    ):
        with pytest.raises(ConfigError, match=rf"sample\.{key}: .*guidance was distilled into"):
            sampler(config, model.family, model.network)


# --- Where the gradient flows ---


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "lcm"])
def test_the_window_of_a_few_step_chain_is_that_of_a_manual_detach(
    tmp_path: Path, scheduler: str
) -> None:
    """The gradient of the last 2 of 4 calls equals that of a chain detached before them."""
    model = load(small_pipeline(tmp_path / "model"))
    parameters = lora.inject(
        model.network.module, rank=2, alpha=2, target_modules=("to_q", "to_v"), seed=0
    )
    fill_lora_b(model.network.module, seed=1)
    config = SampleConfig(num_inference_steps=4, guidance_scale=1.0, scheduler=scheduler)
    chain = sampler(config, model.family, model.network)
    schedule = chain.schedule(model.network, SHAPE[1:])
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, None), chain.guidance)

    def draw_noise(i: int) -> Tensor:
        return randn(20 + i, *SHAPE, dtype=torch.float32)

    noise = randn(3, *SHAPE, dtype=torch.float32)
    for estimator, first in ((last_k(2), 2), (full(), 0)):
        path = estimator.draw(4, generator(0))[0]
        found = sample(denoise, noise, schedule, path=path, draw_noise=draw_noise)
        gradients = torch.autograd.grad(found.square().sum(), parameters)
        # By hand: roll out to the first call, cut, and differentiate the rest.
        starts = rollout(denoise, noise, schedule, stops=[first] * 2, draw_noise=draw_noise)
        ends = backprop(denoise, starts.detach(), schedule, path, draw_noise=draw_noise)
        torch.testing.assert_close(ends, found, rtol=0.0, atol=0.0)
        expected = torch.autograd.grad(ends.square().sum(), parameters)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert max(float(g.norm()) for g in gradients) > 1e-3


def test_the_calls_of_a_consistency_model_reach_each_other_through_the_steps(
    tmp_path: Path,
) -> None:
    # A step carries alpha' (c_out / alpha + c_skip) of its input's gradient beside the network.
    model = load(with_scheduler(small_pipeline(tmp_path / "m"), "LCMScheduler", steps_offset=1))
    schedule = model.network.schedule(3, (4, 8, 8))
    noise = randn(3, *SHAPE, dtype=torch.float32).requires_grad_()
    end = backprop(
        lambda latents, step: torch.zeros_like(latents),
        noise,
        schedule,
        full().path((0, 1, 2)),
        draw_noise=lambda i: torch.zeros(SHAPE),
    )
    (gradient,) = torch.autograd.grad(end.sum(), [noise])
    expected = 1.0
    for step in schedule.steps:
        expected *= step.alpha_next * (step.c_out / step.alpha + step.c_skip)
    torch.testing.assert_close(gradient, torch.full(SHAPE, expected), rtol=1e-5, atol=0.0)
