"""Sampling for an evaluation: the same images whatever the batch, and which ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignprop_cli import rng
from alignprop_cli.config.schema import LossConfig, ModelConfig, RewardConfig
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.evaluation.draw import (
    Sample,
    choose_samples,
    draw_samples,
    in_a_file,
    in_memory,
)
from alignprop_cli.guidance import Guidance
from alignprop_cli.images import to_uint8
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model, Sampler
from alignprop_cli.models.families import open_model
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.mixture import Member, Mixture, build_mixture
from alignprop_cli.sampling import ddim_step
from tests.factories import fill_lora_b

CPU = torch.device("cpu")


def tuned_model(prompts: Sequence[str], *, scale: float = 0.3, name: str = "tiny") -> Model:
    """Return the embedded model with a LoRA that changes its images."""
    model = open_model(ModelConfig(id=name), prompts, CPU)
    module = model.network.module
    lora.inject(module, rank=4, alpha=4, target_modules=("to_q", "to_v"), seed=0)
    fill_lora_b(module, seed=1, scale=scale)
    return model


def test_the_batch_size_changes_neither_images_nor_rewards() -> None:
    samples = choose_samples(load_prompts("shapes-heldout"), 16)
    model = tuned_model([*(sample.prompt for sample in samples), ""])
    clip = ClipReward("tiny")
    found = {}
    for batch_size in (1, 4, 16):
        seen: list[torch.Tensor] = []
        told: list[int] = []

        def reward(images: torch.Tensor, prompts: object, seen=seen) -> torch.Tensor:
            seen.append(images.clone())
            return clip(images, prompts)

        drawn = draw_samples(
            model,
            samples,
            Mixture([Member("clip", reward, 1.0, LossConfig())]),
            Sampler(num_inference_steps=5, guidance=Guidance(3.0), eta=0.5),
            seed=3,
            batch_size=batch_size,
            on_batch=told.append,
        )
        assert told == [batch_size] * (16 // batch_size)
        assert drawn.samples == tuple(samples)
        found[batch_size] = torch.cat(seen), drawn
    images, drawn = found[1]
    assert float(images.std()) > 0.1
    for batch_size in (4, 16):
        others, other = found[batch_size]
        assert float((images - others).abs().max()) < 1e-4
        bytes_apart = np.abs(drawn.images.astype(int) - other.images.astype(int))
        assert bytes_apart.max() <= 1
        assert (bytes_apart > 0).mean() <= 1e-3
        np.testing.assert_allclose(other.rewards["clip"], drawn.rewards["clip"], atol=1e-4)


def test_images_that_are_not_finite_are_told_by_reward_and_prompt() -> None:
    model = tuned_model(["a cat", ""], scale=float("nan"))
    mixture = build_mixture({"brightness": RewardConfig()}, LossConfig(), CPU)
    how = Sampler(num_inference_steps=1, guidance=Guidance(7.5))
    with pytest.raises(RunError, match=r"'brightness': image 0 .* NaN or infinity, prompt 'a cat'"):
        draw_samples(model, [Sample("a cat", 0)], mixture, how, seed=0, batch_size=1)
    with pytest.raises(ConfigError, match="nothing to sample"):
        draw_samples(model, [], mixture, how, seed=0, batch_size=1)


def test_the_negative_prompt_counts_where_guidance_applies_and_else_is_not_asked_for() -> None:
    model = tuned_model(["a cat", "a dog", ""])
    mixture = build_mixture({"brightness": RewardConfig()}, LossConfig(), CPU)

    def images(negative: str, guidance: Guidance) -> np.ndarray:
        how = Sampler(num_inference_steps=2, guidance=guidance, negative_prompt=negative)
        drawn = draw_samples(model, [Sample("a cat", 0)], mixture, how, seed=0, batch_size=1)
        return drawn.images

    assert (images("", Guidance(3.0)) != images("a dog", Guidance(3.0))).any()
    # "a bird" was never encoded.
    for off in (Guidance(1.0), Guidance(3.0, interval=(0.0, 0.0))):
        np.testing.assert_array_equal(images("a bird", off), images("", Guidance(1.0)))
    with pytest.raises(KeyError):
        images("a bird", Guidance(3.0))


# The flow's levels are not evenly spaced: the share is one of calls, not of noise.
@pytest.mark.parametrize(
    ("name", "share", "calls"),
    [
        *(("tiny", *each) for each in ((0.0, 0), (0.4, 2), (0.5, 3), (1.0, 5))),
        ("tiny-flow", 0.4, 2),
    ],
)
def test_the_first_calls_run_without_the_lora(name: str, share: float, calls: int) -> None:
    # floor(5 share + 1/2) calls; a chain of our own switches the LoRA on after them.
    model = tuned_model(["a cat", ""], scale=1.0, name=name)
    mixture = build_mixture({"brightness": RewardConfig()}, LossConfig(), CPU)
    how = Sampler(num_inference_steps=5, guidance=Guidance(3.0))
    drawn = draw_samples(
        model, [Sample("a cat", 4, 1)], mixture, how, seed=2, batch_size=1, base_until=share
    )
    shape = model.network.latent_shape(None, None)
    schedule = how.schedule(model.network, shape)
    latents = rng.image_noise(2, "eval_noise", [(4, 1)], shape) * schedule.initial_scale
    text, negative = (model.conditioning([prompt], None).text for prompt in ("a cat", ""))
    with torch.no_grad():
        for number, step in enumerate(schedule.steps):
            off = lora.disabled(model.network.module) if number < calls else nullcontext()
            with off:
                u, c = (model.network.predict(latents, step.timestep, e) for e in (negative, text))
            latents = ddim_step(u + 3.0 * (c - u), latents, step, schedule.prediction_type)
        expected = model.decoder.decode(latents)
    reward = float(expected[0].mean(dim=(1, 2)) @ torch.tensor([0.299, 0.587, 0.114]))
    assert drawn.rewards["brightness"][0] == pytest.approx(reward, abs=1e-5)
    apart = np.abs(drawn.images.astype(int) - to_uint8(expected).numpy().astype(int))
    assert apart.max() <= 1


@pytest.mark.parametrize(("count", "each", "drawn"), [(4, 1, 4), (5, 2, 6), (10, 1, 10)])
def test_samples_are_chosen_alike_every_time_and_none_comes_twice(count, each, drawn) -> None:
    prompts = [f"prompt {number}" for number in range(7)]
    chosen = choose_samples(prompts, count, each)
    assert chosen == choose_samples(prompts, count, each)
    assert len(chosen) == drawn
    assert all(sample.prompt == prompts[sample.prompt_index] for sample in chosen)
    assert len({(s.prompt_index, s.image_index) for s in chosen}) == drawn
    numbers = [s.prompt_index for s in chosen]
    assert all(numbers.count(number) in (each, 2 * each) for number in set(numbers))


def test_images_in_a_file_are_those_in_memory_and_the_file_has_no_name(tmp_path: Path) -> None:
    samples = choose_samples(load_prompts("shapes-heldout"), 3)
    model = tuned_model([*(sample.prompt for sample in samples), ""])
    mixture = Mixture([Member("bright", lambda x, _: x.mean((1, 2, 3)), 1.0, LossConfig())])
    how = Sampler(num_inference_steps=2, guidance=Guidance(1.0))
    found = [
        draw_samples(
            model, samples, mixture, how, seed=1, batch_size=2, features=small, allocate=allocate
        )
        for allocate in (in_memory, in_a_file(tmp_path))
    ]
    assert isinstance(found[1].images, np.memmap)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(found[0].images, found[1].images)
    assert found[0].images.shape[0] == 3
    # Of a choice without its images all else is there.
    chosen = found[1].measured([2, 0])
    assert chosen.images.size == 0
    assert chosen.samples == (samples[2], samples[0])
    np.testing.assert_array_equal(chosen.rewards["bright"], found[0].rewards["bright"][[2, 0]])
    assert chosen.features is not None
    assert found[0].features is not None
    np.testing.assert_array_equal(chosen.features, found[0].features[[2, 0]])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no such call")
def test_the_space_of_a_file_of_images_is_taken_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else a disk that fills up kills the process where it writes into the map (SIGBUS).
    handles: list[int] = []
    make = tempfile.TemporaryFile

    def kept(**options: Any) -> Any:
        file = make(**options)
        handles.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", kept)
    images = in_a_file(tmp_path)((5, 256, 256, 3))
    status = os.fstat(handles[0])
    os.close(handles[0])
    assert status.st_size == images.nbytes == 5 * 256 * 256 * 3
    assert status.st_blocks * 512 >= images.nbytes


def small(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(images[:, :, ::8, ::8].flatten(1), dim=1)
