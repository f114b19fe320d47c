"""The KL to the base model: against autograd over two networks, and however a step is divided."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alignprop_cli import rng
from alignprop_cli.estimators import GradPath
from alignprop_cli.guidance import Denoise
from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.request import plan_request
from alignprop_cli.rewards import pixel
from alignprop_cli.rewards.mixture import Member, Mixture
from alignprop_cli.sampling import backprop, predict_x0_epsilon
from alignprop_cli.schedule import NoiseSchedule, PredictionType, Step
from alignprop_cli.training.kl import Penalty
from alignprop_cli.training.trainer import Trainer
from tests.factories import fill_lora_b, randn, small_unet
from tests.training.test_trainer import (
    Full,
    division,
    hold_still,
    make_double,
    make_trainer,
    parameters,
    relative_difference,
    small_config,
)

STEPS = 4
WEIGHT = 0.7
# Every kind of path: attached, detached, mixed, ending early, leaping, with copies, and with a
# factor on the reward's gradient, which the penalty does not get.
PATHS = {
    "last call": GradPath((3,)),
    "window": GradPath((1, 2, 3)),
    "inner window": GradPath((0, 1)),
    "scattered": GradPath((0, 2, 3)),
    "detached": GradPath((0, 2), input_grad=0.0, stop=2, endpoint="predicted"),
    "leaps": GradPath((0, 2), input_grad=0.3, leaps=True, weight=0.4),
    "copies": GradPath((3,), copies=2, own_end=False),
    "copies and the end": GradPath((3,), copies=2),
}


def schedule(prediction_type: PredictionType) -> NoiseSchedule:
    sigmas = [0.9, 0.7, 0.5, 0.3, 0.0]

    def alpha(sigma: float) -> float:
        return 1.0 - sigma if prediction_type == "flow" else (1.0 - sigma**2) ** 0.5

    steps = [
        Step(float(900 - 200 * i), alpha(a), a, alpha(b), b)
        for i, (a, b) in enumerate(itertools.pairwise(sigmas))
    ]
    return NoiseSchedule(tuple(steps), prediction_type)


def network(seed: int | None) -> torch.nn.Module:
    """A float64 network, with a LoRA that changes something where a seed is given."""
    module = small_unet().double().requires_grad_(False)
    if seed is not None:
        lora.inject(module, rank=2, alpha=3.0, target_modules=["to_q", "to_out.0"], seed=0)
        module.double()
        fill_lora_b(module, seed)
    return module.eval()


def call(module: torch.nn.Module) -> Denoise:
    text = randn(7, 1, 5, 32)

    def denoise(latents: Tensor, step: Step) -> Tensor:
        return module(latents, step.timestep, text.expand(len(latents), -1, -1)).sample

    return denoise


def gradients(module: torch.nn.Module) -> Tensor:
    found = [p.grad.flatten() for p in lora.trainable(module) if p.grad is not None]
    return torch.cat(found)


CASES = [
    *(("epsilon", name, True) for name in PATHS),
    ("epsilon", "window", False),
    *((kind, "window", False) for kind in ("v_prediction", "sample", "flow")),
]


@pytest.mark.parametrize(("prediction_type", "name", "recompute"), CASES)
def test_it_is_what_autograd_gives_over_two_separate_networks(
    prediction_type: PredictionType, name: str, recompute: bool
) -> None:
    path, levels = PATHS[name], schedule(prediction_type)
    latents, upstream = randn(1, 2, 4, 8, 8), randn(2, 2, 4, 8, 8)
    noise = {i: randn(20 + i, 2, 4, 8, 8) for i in range(8)}
    options = {"eta": 0.0, "draw_noise": noise.__getitem__}
    recomputed = path.calls if recompute else ()

    # 1. As training does it: one network, whose LoRA is switched off.
    tuned = network(seed=3)
    made: list[bool] = []
    tuned.register_forward_pre_hook(lambda *_: made.append(torch.is_grad_enabled()))
    penalty = Penalty(tuned, prediction_type, WEIGHT)
    ends = backprop(
        penalty.around(call(tuned)), latents, levels, path, recomputed=recomputed,
        plain=call(network(seed=3)), **options,
    )  # fmt: skip
    ends.backward(upstream.repeat(path.ends, 1, 1, 1))
    calls = len(path)
    # One call of the base model for each, whether or not it is recomputed.
    assert len(made) == (3 if recompute else 2) * calls

    # 2. The same loss written out, with a second network for the base model.
    oracle, base = network(seed=3), call(network(seed=None))
    seen: list[Tensor] = []

    def noted(x: Tensor, step: Step) -> Tensor:
        out = call(oracle)(x, step)
        with torch.no_grad():
            other = base(x, step)
        if prediction_type == "flow":
            seen.append((out - other).square().mean(dim=(1, 2, 3)))
        else:
            mine, theirs = (
                predict_x0_epsilon(each, x.detach(), step, prediction_type)[1]
                for each in (out, other)
            )
            seen.append((mine - theirs).square().mean(dim=(1, 2, 3)))
        return out

    plain = call(network(seed=3))
    ends = backprop(noted, latents, levels, path, plain=plain, **options)
    kl = torch.stack(seen).mean(dim=0)
    reward = (ends * upstream.repeat(path.ends, 1, 1, 1)).sum()
    (reward + WEIGHT * kl.sum()).backward()

    assert penalty.values is not None
    torch.testing.assert_close(penalty.values, kl.detach(), rtol=1e-12, atol=0.0)
    assert float(kl.detach().min()) > 1e-6
    assert relative_difference(gradients(tuned), gradients(oracle)) < 1e-10


# The rest on the embedded model, by whole steps.


def gradient_of(trainer: Trainer) -> Tensor:
    hold_still(trainer)
    trainer.step()
    return torch.cat([p.grad.flatten() for p in parameters(trainer) if p.grad is not None])


def with_kl(monkeypatch: pytest.MonkeyPatch, kl_weight: float, *, micro_batch: int) -> Trainer:
    """A trainer in float64, with two groups of different windows."""
    config = small_config(
        sample={"num_inference_steps": 2},
        gradient={"method": "random_k", "window_group": 4},
        train={"max_grad_norm": None, "micro_batch": "auto", "kl_weight": kl_weight},
    )
    draw = rng.image_noise
    monkeypatch.setattr(rng, "image_noise", lambda *args: draw(*args).double())
    member = Member("colourfulness", pixel.colourfulness, 1.0, config.loss)
    plan = division(4, micro_batch, 1)
    trainer = make_trainer(config, Mixture([member]), plan)
    make_double(trainer)
    return trainer


@pytest.mark.long
def test_dividing_a_step_changes_neither_its_gradient_nor_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        whole = with_kl(patch, 5.0, micro_batch=4)
        expected = gradient_of(whole)
    with monkeypatch.context() as patch:
        parts = with_kl(patch, 5.0, micro_batch=3)
        # The scale of the loss, which is undone before the gradient is used.
        parts.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        found = gradient_of(parts)
    with monkeypatch.context() as patch:
        plain = gradient_of(with_kl(patch, 0.0, micro_batch=4))
    assert relative_difference(found, expected) < 1e-12
    # It is no small part of the gradient that agrees.
    assert relative_difference(plain, expected) > 0.1


def test_what_is_recorded_is_the_mean_over_all_images_of_the_penalty_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fresh LoRA changes nothing: 0. One that does: the mean of a direct computation."""
    config = small_config(
        sample={"num_inference_steps": 2, "eta": 0.0},
        gradient={"method": "last_k", "k": 1},
        train={"kl_weight": 5.0},
    )
    trainer = make_trainer(config)
    hold_still(trainer)
    module = trainer.model.network.module
    images = trainer.images()
    denoise, _ = trainer.chain(images)
    with torch.no_grad(), lora.prepared(module) as merged:
        starts = trainer.roll_out(images, merged)
        latents = torch.stack([starts[image.number] for image in images])
        step, kind = trainer.schedule.steps[1], trainer.schedule.prediction_type
        _, tuned = predict_x0_epsilon(denoise(latents, step), latents, step, kind)
        with lora.disabled(module):
            _, base = predict_x0_epsilon(denoise(latents, step), latents, step, kind)
    expected = float((tuned - base).square().mean())

    made: list[object] = []
    handle = module.register_forward_pre_hook(lambda *_: made.append(None))
    record = trainer.step()
    handle.remove()
    request = plan_request(config, 1)
    assert len(made) == request.calls + request.base_calls == 3
    assert record.kl == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-6
    # Of the rewards alone: clip's loss is its reward with the other sign.
    assert record.loss == pytest.approx(-record.rewards["clip"].mean, rel=1e-6)
    assert record.line()["kl"] == record.kl

    # Memory runs out: the same step in smaller parts.
    decoder = trainer.model.decoder
    trainer.step_number = 0
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "decode", Full(decoder.decode, {1}))
        halved = trainer.step()
    assert trainer.plan.micro_batch == 4
    assert halved.kl == pytest.approx(record.kl, rel=1e-4)
    assert halved.grad_norm == pytest.approx(record.grad_norm, rel=1e-4)

    for name, parameter in trainer.optimizer.parameters.items():
        if ".lora_B." in name:
            parameter.data.zero_()
    unused = trainer.step()
    assert unused.kl == 0.0
    assert unused.line()["kl"] == 0.0
    assert "kl" not in replace(unused, kl=None).line()
