"""What a plan expects a step to store is what a real step stores, and so is its work."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from alignprop_cli import estimators
from alignprop_cli.config.schema import Config, ModelConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import meter
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.chain import Chain
from alignprop_cli.planning.estimate import (
    NOTHING_RECOMPUTED,
    Footprint,
    Level,
    operations,
    peak_parts,
)
from alignprop_cli.planning.footprint import add
from alignprop_cli.planning.plan import Plan
from alignprop_cli.planning.work import Affine, Work
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.training.batches import Settings, StepImage
from alignprop_cli.training.optimizer import OptimizerSettings
from alignprop_cli.training.rates import Rates
from alignprop_cli.training.record import Totals
from alignprop_cli.training.trainer import Trainer
from tests.factories import mid_pipeline, small_pipeline, small_xl_pipeline

STEPS = 3
PROMPT = "one small red circle on a black background"
LEVELS = [("none", False), ("none", True), ("block", False), ("call", True)]


def config(
    model: str = "tiny", steps: int = STEPS, *, size: int | None = None, **gradient: Any
) -> Config:
    return parse(
        {
            "model": {"id": model},
            "lora": {"rank": 4},
            "sample": {
                "num_inference_steps": steps,
                "guidance_scale": 3.0,
                "height": size,
                "width": size,
            },
            "gradient": gradient,
            "reward": {"clip": {"model": "tiny"}},
            "train": {"prompts": "shapes", "batch_size": 8},
        }
    )


def plan_of(
    micro_batch: int,
    level: Level = "none",
    again: bool = False,
    *,
    stored_calls: int = 0,
    rollout_batch: int | None = None,
    decode_batch: int | None = None,
) -> Plan:
    return Plan(
        batch_size=8,
        processes=1,
        rollout_batch=rollout_batch or micro_batch,
        micro_batch=micro_batch,
        decode_batch=decode_batch or micro_batch,
        checkpoint_network=level,
        checkpoint_decoder=again,
        checkpoint_reward=again,
        stored_calls=stored_calls,
    )


@pytest.fixture(scope="module")
def predicted() -> Footprint:
    return planning.measure(config(), "cpu")


@functools.cache
def loaded(chosen: ModelConfig, prompt: str) -> Model:
    """Return a model that is copied before anything is done to it: loading takes far longer."""
    return open_model(chosen, [prompt, ""], torch.device("cpu"))


def trainer(plan: Plan, chosen: Config | None = None, prompt: str = PROMPT) -> Trainer:
    accelerator = Accelerator(cpu=True)
    chosen = chosen or config()
    model = deepcopy(loaded(chosen.model, prompt))
    targets = model.family.target_modules
    options = {"rank": 4, "alpha": 4, "target_modules": targets, "seed": 0}
    lora.inject(model.network.module, **options, dora=chosen.lora.dora)
    mixture = build_mixture(chosen.reward, chosen.loss, accelerator.device)
    if plan.checkpoint_reward:
        mixture.recompute()
    settings = Settings(
        sampler=sampler(chosen.sample, model.family, model.network),
        estimator=planning.make_estimator(chosen.gradient),
        optimizer=OptimizerSettings(Rates(1.0e-3)),
        batch_size=8,
        window_group=8,
    )
    made = Trainer(settings, plan, model, mixture, [prompt], accelerator)
    tail(made, 1, path(made, 1, 1).detach())  # texts are read once, and kept
    made.optimizer.zero_grad()
    return made


@functools.cache
def shared(plan: Plan) -> Trainer:
    """Return the one trainer of a plan, for tests that take no step with it."""
    return trainer(plan)


# How this file looks into a step. Everything below sees a trainer through these three alone.


def batch_of(made: Trainer, images: int, calls: int) -> Sequence[StepImage]:
    """Return some images of the coming step whose last calls carry gradient."""
    steps = len(made.schedule)
    window = estimators.window(steps - calls, steps)
    return [replace(i, path=window, schedule=made.schedule) for i in made.images()[:images]]


def path(made: Trainer, images: int, calls: int) -> Tensor:
    """Return clean latents of some images, with the graph of their calls."""
    batch = batch_of(made, images, calls)
    merged = lora.Merged(made.model.network.module)
    starts = made.roll_out(batch, merged)
    return made.run_path(batch, torch.stack([starts[i.number] for i in batch]), merged)


def tail(made: Trainer, images: int, latents: Tensor) -> Tensor:
    """Decode, score and differentiate; return the gradient in the latents."""
    totals = Totals(made.mixture.metrics)
    return made.score(batch_of(made, images, 1), latents, totals)


def weights_of(made: Trainer) -> list[Tensor]:
    networks = [n for m in made.mixture.members for n in m.reward.networks]  # type: ignore[attr-defined]
    modules = [made.model.network.module, made.model.decoder.module]
    return [
        *(p for module in modules for p in module.parameters()),
        *made.model.decoder.parameters(),
        *(p for network in networks for p in (*network.parameters(), *network.buffers())),
    ]


def expected_bytes(found: Footprint, plan: Plan, k: int) -> float:
    """Return what the calls of a micro-batch store."""
    kept = min(plan.stored_calls, k)
    levels: list[Level] = [plan.checkpoint_network] * (k - kept) + ["none"] * kept
    parts = [found.first[levels[0]], *(found.call[level] for level in levels[1:])]
    return sum(part.saved(plan.micro_batch) for part in parts)


@pytest.mark.parametrize("k", [1, 2, STEPS])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("level", ["none", "block", "call"])
def test_the_bytes_that_the_calls_of_a_real_step_store_are_the_predicted_ones(
    predicted: Footprint, level: Level, micro_batch: int, k: int
) -> None:
    plan = plan_of(micro_batch, level)
    made = shared(plan_of(4, level))  # a path is as large as it is asked for
    with meter.SavedBytes(weights_of(made), hold=False) as kept:
        ends = path(made, micro_batch, k)
    assert ends.requires_grad
    assert kept.total == pytest.approx(expected_bytes(predicted, plan, k), rel=0.01)


@pytest.mark.parametrize("decode_batch", [1, 2, 4])
@pytest.mark.parametrize("again", [False, True])
def test_the_bytes_that_decoder_and_reward_store_are_the_predicted_ones(
    predicted: Footprint, again: bool, decode_batch: int
) -> None:
    """Of one part; the hooks hold on to what all parts have stored."""
    made = shared(plan_of(4, again=again))
    latents = path(made, 4, 1).detach()[:decode_batch]
    with meter.SavedBytes(weights_of(made)) as kept:
        gradient = tail(made, decode_batch, latents)
    assert gradient.shape == latents.shape
    parts = (predicted.decoder[again], predicted.reward[again])
    if not again:  # what is recomputed is stored too, while backward is there
        assert kept.total == pytest.approx(sum(p.saved(decode_batch) for p in parts), rel=0.01)
    else:
        plain = (predicted.decoder[False], predicted.reward[False])
        assert kept.total < 1.01 * sum(p.saved(decode_batch) for p in (*parts, *plain))


@pytest.mark.parametrize("k", [1, 2, STEPS])
def test_the_bytes_of_a_window_of_which_the_last_calls_are_stored(
    predicted: Footprint, k: int
) -> None:
    plan = plan_of(2, "call", stored_calls=2)
    made = shared(plan)
    with meter.SavedBytes(weights_of(made)) as kept:
        assert path(made, 2, k).requires_grad
    assert kept.total == pytest.approx(expected_bytes(predicted, plan, k), rel=0.01)


def test_the_bytes_of_narrow_heads_are_those_of_the_attention_that_the_cpu_takes(
    tmp_path: Path,
) -> None:
    chosen = config(str(small_pipeline(tmp_path / "narrow")), steps=2)  # 8 channels a head
    plan = plan_of(2)
    made = trainer(plan, chosen)
    with meter.SavedBytes(weights_of(made)) as kept:
        assert path(made, 2, 2).requires_grad
    found = planning.measure(chosen, "cpu")
    assert kept.total == pytest.approx(expected_bytes(found, plan, 2), rel=0.01)


@pytest.mark.parametrize("level", ["none", "block", "call"])
@pytest.mark.long
def test_the_bytes_of_stable_diffusion_xl_are_the_predicted_ones(
    tmp_path: Path, level: Level
) -> None:
    # Wider than in other tests: the sizes and pooled embeddings, which are not counted, are small.
    folder = small_xl_pipeline(tmp_path / "xl", sample_size=16, vae_sample_size=32)
    chosen = config(str(folder), steps=3)
    found = planning.measure(chosen, "cpu")
    plan = plan_of(2, level)
    made = trainer(plan, chosen)
    with meter.SavedBytes(weights_of(made)) as kept:
        ends = path(made, 2, 3)
    assert ends.requires_grad
    assert kept.total == pytest.approx(expected_bytes(found, plan, 3), rel=0.02)
    with meter.SavedBytes(weights_of(made)) as kept:
        tail(made, 2, ends.detach())
    parts = (found.decoder[False], found.reward[False])
    assert kept.total == pytest.approx(sum(part.saved(2) for part in parts), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("level", ["none", "block", "call"])
def test_the_stored_bytes_of_a_larger_model_are_the_predicted_ones(
    tmp_path: Path, level: Level, micro_batch: int
) -> None:
    chosen = config(str(mid_pipeline(tmp_path / "mid")), steps=12)
    found = planning.measure(chosen, "cpu")
    plan = plan_of(micro_batch, level)
    made = trainer(plan, chosen)
    for k in (1, 10, 12):
        with meter.SavedBytes(weights_of(made)) as kept:
            ends = path(made, micro_batch, k)
        assert ends.requires_grad
        assert kept.total == pytest.approx(expected_bytes(found, plan, k), rel=0.01)
        del ends  # or the next graph would be built while this one is held
        kept.release()


@pytest.mark.parametrize("k", [1, STEPS])
@pytest.mark.parametrize("decode_batch", [1, 4])
@pytest.mark.parametrize(("level", "again"), LEVELS)
@pytest.mark.long
def test_the_most_that_lives_in_a_real_micro_batch_is_the_predicted_peak(
    predicted: Footprint, level: Level, again: bool, decode_batch: int, k: int
) -> None:
    plan = plan_of(4, level, again, decode_batch=decode_batch)
    made = trainer(plan)
    batch = batch_of(made, 4, k)
    merged = lora.Merged(made.model.network.module)
    with meter.Meter() as live:
        made.go_back(batch, made.roll_out(batch, merged), merged)
    request = planning.plan_request(config(method="last_k", k=k), 1)
    parts = peak_parts(replace(predicted, weights={}), request, plan, 4)
    # Of the LoRA only the gradients are made here.
    expected = sum(parts.values()) - 12 * predicted.trained
    assert live.peak == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("k", [1, STEPS])
@pytest.mark.parametrize("level", ["none", "call"])
@pytest.mark.long
def test_the_operations_of_a_real_step_are_the_predicted_ones(
    predicted: Footprint, level: Level, k: int
) -> None:
    """Whatever the batches: here all three differ."""
    plan = plan_of(2, level, rollout_batch=4, decode_batch=1)
    made = trainer(plan)
    batch = batch_of(made, 4, k)
    merged = lora.Merged(made.model.network.module)
    with meter.Meter() as counted:
        made.go_back(batch, made.roll_out(batch, merged), merged)
    first, call = predicted.first[level], predicted.call[level]
    flops = STEPS * predicted.rollout.forward_flops
    flops += first.backward_flops + (k - 1) * call.backward_flops
    tail = (predicted.decoder[False], predicted.reward[False])
    flops += sum(part.forward_flops + part.backward_flops for part in tail)
    assert counted.flops == pytest.approx(4 * flops, rel=0.01)


def test_the_embeddings_of_the_images_in_the_calls_are_planned(predicted: Footprint) -> None:
    request = planning.plan_request(config(), 1)
    larger = replace(predicted, embeddings=10**9)
    for rollout_batch, micro_batch, most in ((4, 2, 4), (1, 2, 2)):
        plan = plan_of(micro_batch, rollout_batch=rollout_batch)
        assert peak_parts(larger, request, plan, 4)["embeddings"] == most * 10**9


def test_the_published_architectures_have_their_known_sizes() -> None:
    """Parameter counts of the published checkpoints."""
    sizes = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 768, (4, 64, 64)),
        "stabilityai/stable-diffusion-2-1": (865_910_724, 1024, (4, 96, 96)),
    }
    for name, (weights, width, shape) in sizes.items():
        model = meta_model(ModelConfig(id=name), torch.bfloat16)
        network, decoder = model.parts.network, model.parts.decoder
        parameters = list(network.module.parameters())
        assert {(p.device.type, p.dtype) for p in parameters} == {("meta", torch.bfloat16)}
        assert sum(p.numel() for p in parameters) == weights
        assert sum(p.numel() for p in decoder.module.parameters()) == 83_653_863
        assert network.latent_shape(None, None) == shape
        assert model.image_size(shape) == (8 * shape[1], 8 * shape[2])
        for embeds in (model.conditioning.text, model.conditioning.negative):
            assert embeds is not None
            assert {tuple(t.shape) for t in embeds.tensors.values()} == {(1, 77, width)}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_text_encoders_are_not_counted_since_they_are_gone_before_training(
    device_type: str,
) -> None:
    found = planning.measure(config(), device_type)
    assert {name for name in found.weights if "text" in name} == set()
    assert found.weights["network weights"] > found.weights["decoder weights"] > 0


def test_parts_that_live_at_the_same_time_add_up() -> None:
    one = Work(Affine(1, 2), Affine(3, 4), Affine(5, 6), 7, 8)
    other = Work(Affine(10, 20), Affine(30, 40), Affine(50, 60), 70, 80)
    assert add(one, other) == Work(Affine(11, 22), Affine(33, 44), Affine(55, 66), 77, 88)
    assert add() == Work(Affine(0, 0), Affine(0, 0), Affine(0, 0), 0, 0)


def test_draft_lv_costs_little_more_than_the_last_call(predicted: Footprint) -> None:
    """The network's operations at T = 25; decoder and reward come once for each end on top."""
    free = Affine(0.0, 0.0)
    nothing = Work(free, free, free, 0.0, 0.0)
    network = replace(
        predicted, decoder=dict.fromkeys((False, True), nothing), reward={False: nothing}
    )

    def work(estimator: estimators.Estimator) -> float:
        chain = Chain(num_inference_steps=25, estimator=estimator)
        return operations(network, chain, NOTHING_RECOMPUTED)

    one = work(estimators.last_k(1))
    first, forward = predicted.first["none"].backward_flops, predicted.rollout.forward_flops
    assert one == pytest.approx(25 * forward + first)
    copies = work(estimators.draft_lv(2, own_end=False)) / one
    both = work(estimators.draft_lv(2)) / one
    assert copies <= 1.12
    assert both <= 1.15


def test_a_detached_branch_stores_nothing(predicted: Footprint) -> None:
    """Two equal branches: half of the activations, and half of the operations of backward."""
    plain, detached = predicted, planning.measure(config(detach_uncond=True), "cpu")
    for level in ("none", "block"):
        for kind in ("first", "call"):
            whole, half = getattr(plain, kind)[level], getattr(detached, kind)[level]
            assert half.saved.each == pytest.approx(whole.saved.each / 2, rel=0.05)
            assert half.backward_flops == pytest.approx(whole.backward_flops / 2, rel=0.05)
            assert half.forward_flops == pytest.approx(whole.forward_flops, rel=0.01)
    assert detached.rollout == plain.rollout
