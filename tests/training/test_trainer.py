"""The laws of a training step, on a small model with random weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator

from alignprop_cli import rng
from alignprop_cli.config.schema import Config, ModelConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import RunError
from alignprop_cli.guidance import Embeds
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import open_model
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.plan import Plan
from alignprop_cli.planning.request import plan_request
from alignprop_cli.prompts import PromptStream, load_prompts
from alignprop_cli.rewards import pixel
from alignprop_cli.rewards.mixture import Member, Mixture, build_mixture
from alignprop_cli.training import setup
from alignprop_cli.training.rates import Rates
from alignprop_cli.training.record import StepRecord
from alignprop_cli.training.trainer import Trainer
from tests.factories import PICTURE_PX, small_pipeline

IMAGES = 16
"""Whose prompts are encoded, from the first: all 800 of the set would take longer than a step."""

SHAPE = (3, PICTURE_PX, PICTURE_PX)
"""Shape of an image of the model."""

SMALL = {
    "sample": {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 0.5},
    "gradient": {
        "method": "random_k",
        "window_group": 8,
        "checkpoint_network": "none",
        "checkpoint_decoder": False,
        "checkpoint_reward": False,
    },
    "reward": {"clip": {"model": "tiny"}},
    "train": {"prompts": "shapes", "batch_size": 8, "micro_batch": 8, "learning_rate": 1.0e-3},
}


@pytest.fixture(scope="module", autouse=True)
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the configurations name a model that takes a tenth of the embedded one's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL, "model", {"id": str(small_pipeline(tmp_path_factory.mktemp("model")))})
        yield


def small_config(**sections: dict[str, object]) -> Config:
    values = {name: dict(section) for name, section in SMALL.items()}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse(values)


@functools.cache
def loaded(chosen: ModelConfig, prompts: frozenset[str]) -> Model:
    """Return a model that is copied before anything is done to it: loading takes far longer."""
    return open_model(chosen, sorted(prompts), torch.device("cpu"))


def make_trainer(
    config: Config, mixture: Mixture | None = None, plan: Plan | None = None, images: int = IMAGES
) -> Trainer:
    config = setup.settled(config)
    accelerator = Accelerator(cpu=True)
    prompts = load_prompts("shapes")
    stream = PromptStream(prompts, config.train.seed)
    needed = {stream.prompt(number) for number in range(images)}
    model = deepcopy(loaded(config.model, frozenset({*needed, ""})))
    module = model.network.module
    lora.inject(
        module,
        rank=config.lora.rank,
        alpha=config.lora.rank,
        target_modules=config.lora.target_modules or model.family.target_modules,
        seed=config.train.seed,
    )
    # B is zero at first, and so would be A's gradient.
    for index, parameter in enumerate(lora.trainable(module)):
        generator = torch.Generator().manual_seed(index)
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    mixture = mixture or build_mixture(config.reward, config.loss, accelerator.device)
    request = plan_request(config, 1)
    settings = setup.settings(config, model, request.estimator)
    plan = plan or make_plan(request)
    return Trainer(settings, plan, model, mixture, prompts, accelerator)


def parameters(trainer: Trainer) -> list[torch.nn.Parameter]:
    return list(trainer.optimizer.parameters.values())


def hold_still(trainer: Trainer) -> None:
    """Let steps compute everything and update nothing."""
    trainer.optimizer.rule.step = lambda: None  # type: ignore[method-assign]


def make_double(trainer: Trainer) -> None:
    """Let the whole chain run in float64."""
    model = trainer.model
    model.network.module.double()
    model.decoder.module.double()
    model.embeds = {
        prompt: Embeds({name: tensor.double() for name, tensor in embeds.tensors.items()})
        for prompt, embeds in model.embeds.items()
    }


def gradient_of_a_step(config: Config, plan: Plan | None = None) -> torch.Tensor:
    trainer = make_trainer(config, plan=plan)
    hold_still(trainer)
    trainer.step()
    return torch.cat([p.grad.flatten() for p in parameters(trainer) if p.grad is not None])


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_dividing_the_batch_into_micro_batches_does_not_change_the_gradient() -> None:
    # No clipping: it would hide a wrong scale. No fresh noise: with eta 0.5 the chain enlarges the
    # rounding of float32, which differs between batch sizes, to 5e-5; the next test has eta 0.5.
    # A pixel reward: with `clip` a few images have gradients 60 times the others', and rounding
    # reaches 3e-5, depending on the windows that are drawn.
    config = small_config(sample={"eta": 0.0}, train={"max_grad_norm": None, "micro_batch": "auto"})
    member = Member("colourfulness", pixel.colourfulness, 1.0, config.loss)

    def gradient(micro_batch: int) -> torch.Tensor:
        plan = division(micro_batch, micro_batch, micro_batch)
        trainer = make_trainer(config, Mixture([member]), plan)
        hold_still(trainer)
        trainer.step()
        return torch.cat([p.grad.flatten() for p in parameters(trainer)])

    whole = gradient(8)
    assert float(whole.norm()) > 1e-4
    for micro_batch in (4, 1):
        # float32, other order of summation
        assert relative_difference(gradient(micro_batch), whole) < 1e-5


@pytest.mark.long
def test_dividing_the_batch_does_not_change_the_gradient_of_a_network_as_reward() -> None:
    # The same with `clip`, and the last two calls, which no draw decides.
    gradient = {"method": "last_k", "k": 2}
    train = {"max_grad_norm": None, "micro_batch": "auto"}
    config = small_config(sample={"eta": 0.0}, gradient=gradient, train=train)
    whole = gradient_of_a_step(config, division(8, 8, 8))
    assert float(whole.norm()) > 1e-4
    for micro_batch in (4, 1):
        divided = gradient_of_a_step(config, division(micro_batch, micro_batch, micro_batch))
        assert relative_difference(divided, whole) < 1e-5


def double_gradient_of_a_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """As `gradient_of_a_step`, with the whole chain in float64."""
    draw = rng.image_noise
    with monkeypatch.context() as patch:
        patch.setattr(rng, "image_noise", lambda *args: draw(*args).double())
        member = Member("colourfulness", pixel.colourfulness, 1.0, config.loss)
        trainer = make_trainer(config, Mixture([member]))
        make_double(trainer)
        hold_still(trainer)
        trainer.step()
    return torch.cat([p.grad.flatten() for p in parameters(trainer)])


@pytest.mark.long
def test_dividing_the_batch_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same law in float64, with fresh noise in every step, to 1e-12."""

    def gradient(micro_batch: int) -> torch.Tensor:
        config = small_config(train={"micro_batch": micro_batch, "max_grad_norm": None})
        return double_gradient_of_a_step(config, monkeypatch)

    whole = gradient(8)
    assert whole.dtype == torch.float64
    assert float(whole.norm()) > 1e-4
    for micro_batch in (4, 1):
        assert relative_difference(gradient(micro_batch), whole) < 1e-12


def test_the_merged_lora_of_the_roll_out_does_not_change_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 2 of the 4 calls are rolled out.
    window = {"method": "last_k", "k": 2}
    config = small_config(gradient=window, train={"max_grad_norm": None})
    single, double = gradient_of_a_step(config), double_gradient_of_a_step(config, monkeypatch)
    entered: list[bool] = []
    monkeypatch.setattr(lora.Merged, "__enter__", lambda self: entered.append(True))
    assert relative_difference(single, gradient_of_a_step(config)) < 1e-4
    assert relative_difference(double, double_gradient_of_a_step(config, monkeypatch)) < 1e-10
    assert entered


def test_fewer_calls_before_the_window_are_made_and_nothing_else_changes() -> None:
    def calls_of(**gradient: object) -> tuple[int, torch.Tensor]:
        trainer = make_trainer(small_config(gradient={"method": "last_k", "k": 1, **gradient}))
        made: list[object] = []
        network = trainer.model.network.module
        network.register_forward_pre_hook(lambda *_: made.append(None))
        hold_still(trainer)
        trainer.step()
        return len(made), torch.cat([p.grad.flatten() for p in parameters(trainer)])

    calls, gradient = calls_of()
    fewer, other = calls_of(rollout_steps=1)
    same, equal = calls_of(rollout_steps=3)
    assert (calls, fewer, same) == (4, 2, 4)
    assert torch.equal(gradient, equal)
    # Other pictures, and so another gradient.
    assert relative_difference(other, gradient) > 1e-3


def test_recomputation_does_not_change_the_gradient_bit_for_bit() -> None:
    stored = gradient_of_a_step(small_config())
    both = {"checkpoint_network": "call", "checkpoint_decoder": True}
    recomputed = gradient_of_a_step(small_config(gradient=both))
    assert torch.equal(stored, recomputed)


def test_the_same_seed_gives_the_same_step_and_another_seed_another_one() -> None:
    first = make_trainer(small_config())
    again = make_trainer(small_config())
    other = make_trainer(small_config(train={"seed": 1}))
    records = [trainer.step() for trainer in (first, again, other)]
    assert records[0].loss == records[1].loss
    assert records[0].loss != records[2].loss
    for a, b in zip(parameters(first), parameters(again), strict=True):
        assert torch.equal(a, b)


def test_a_restored_trainer_continues_bit_for_bit() -> None:
    config = small_config(sample={"num_inference_steps": 2}, train={"batch_size": 8})
    straight = make_trainer(config)
    straight.step()
    state, weights = straight.optimizer.state(), lora.weights(straight.model.network.module)
    expected = straight.step()

    resumed = make_trainer(config)
    lora.set_weights(resumed.model.network.module, weights)
    resumed.optimizer.load_state(state)
    resumed.step_number = 1
    record = resumed.step()
    assert (record.loss, record.grad_norm, record.step) == (
        expected.loss,
        expected.grad_norm,
        expected.step,
    )
    for a, b in zip(parameters(resumed), parameters(straight), strict=True):
        assert torch.equal(a, b)


def test_an_optimiser_that_lost_a_part_is_refused() -> None:
    trainer = make_trainer(small_config(sample={"num_inference_steps": 2}))
    trainer.step()
    state = trainer.optimizer.state()
    name = next(iter(trainer.optimizer.parameters))
    for broken in (
        {key: value for key, value in state.items() if key != f"{name}.exp_avg_sq"},
        state | {f"{name}.exp_avg_sq": torch.zeros(1)},
        state | {"another.exp_avg": torch.zeros(1)},
    ):
        with pytest.raises(RunError, match="does not fit"):
            trainer.optimizer.load_state(broken)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (None, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (4, [0.5, 1.0, 0.75, 0.5, 0.25, 0.25, 0.25]),
    ],
)
def test_the_learning_rate_rises_then_falls_and_does_not_look_at_the_number_of_steps(
    decay: int | None, expected: list[float]
) -> None:
    rates = Rates(1.0, warmup_steps=1, decay_steps=decay)
    assert [rates(step) for step in range(7)] == pytest.approx(expected)


def test_a_reward_that_is_not_finite_stops_the_step_before_anything_is_updated() -> None:
    def broken(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3)) / 0.0 * 0.0

    config = small_config(sample={"num_inference_steps": 2})
    trainer = make_trainer(config, Mixture([Member("broken", broken, 1.0, config.loss)]))
    before = lora.weights(trainer.model.network.module)
    with pytest.raises(RunError, match="reward 'broken' returned nan"):
        trainer.step()
    after = lora.weights(trainer.model.network.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.step_number == 0


def test_a_gradient_that_is_not_finite_stops_the_step_before_anything_is_updated() -> None:
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(1, 2, 3))

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.full((len(grad), *SHAPE), float("inf"))

    config = small_config(sample={"num_inference_steps": 2})
    member = Member("inf", lambda images, prompts: Explode.apply(images), 1.0, config.loss)
    trainer = make_trainer(config, Mixture([member]))
    before = lora.weights(trainer.model.network.module)
    with pytest.raises(RunError, match="the gradient of reward 'inf' holds NaN or infinity"):
        trainer.step()
    after = lora.weights(trainer.model.network.module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_toy_reward_rises() -> None:
    config = small_config(
        sample={"num_inference_steps": 3, "eta": 0.0},
        gradient={"method": "last_k", "k": 2},
        reward={"brightness": {}},
        train={"learning_rate": 3.0e-2},
    )
    config = config.model_copy(update={"reward": {"brightness": config.reward["brightness"]}})
    trainer = make_trainer(config, images=64)
    means = [trainer.step().rewards["brightness"].mean for _ in range(8)]
    assert means[-1] > means[0] + 0.02


class Full:
    """Raises out of memory at the chosen calls of a function that it stands in for."""

    def __init__(self, function, calls: set[int]) -> None:
        self.function, self.calls, self.count = function, calls, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.function(*args, **kwargs)


STILL: dict[str, dict[str, object]] = {"sample": {"eta": 0.0}}


@pytest.fixture(scope="module")
def two_steps(small_model: None) -> tuple[list[StepRecord], torch.Tensor]:
    """Return the records of two steps that nothing disturbs, and the weights after them."""
    trainer = make_trainer(small_config(**STILL))
    records = [trainer.step() for _ in range(2)]
    return records, torch.cat([p.detach().flatten() for p in parameters(trainer)])


@pytest.mark.parametrize(
    ("where", "calls", "left"),
    [
        ("network", {1}, 4),  # in the roll-out of the first part
        ("network", {7}, 4),  # of the second step
        ("decode", {2}, 4),
        ("score", {1, 2}, 2),  # twice in a row
        ("backward", {1}, 4),
    ],
)
def test_running_out_of_memory_changes_the_parts_and_not_the_result(
    monkeypatch: pytest.MonkeyPatch,
    two_steps: tuple[list[StepRecord], torch.Tensor],
    where: str,
    calls: set[int],
    left: int,
) -> None:
    records, theirs = two_steps
    trainer = make_trainer(small_config(**STILL))
    said: list[str] = []
    monkeypatch.setattr(trainer, "note", said.append)
    owner, name = {
        "network": (trainer.model.network.module, "forward"),
        "decode": (trainer.model.decoder, "decode"),
        "score": (trainer.mixture, "score"),
        "backward": (torch.Tensor, "backward"),
    }[where]
    full = Full(getattr(owner, name), calls)
    stand_in = (lambda self, *a, **k: full(self, *a, **k)) if where == "backward" else full
    monkeypatch.setattr(owner, name, stand_in)
    again = [trainer.step() for _ in range(2)]

    assert trainer.plan.micro_batch == left
    assert trainer.plan.batch_size == 8
    assert len(said) == len(calls)
    assert "out of memory" in said[0]
    assert (again[1].step, again[1].images_seen) == (2, 16)
    for before, after in zip(records, again, strict=True):
        assert after.loss == pytest.approx(before.loss, rel=1e-5)
        assert after.backprop_steps == before.backprop_steps
    mine = torch.cat([p.detach().flatten() for p in parameters(trainer)])
    assert relative_difference(mine, theirs) < 1e-4


def test_running_out_of_memory_with_one_image_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(train={"micro_batch": 1, "batch_size": 2}, gradient={"window_group": 2})
    trainer = make_trainer(config)
    before = [parameter.detach().clone() for parameter in parameters(trainer)]
    monkeypatch.setattr(trainer.model.decoder, "decode", Full(trainer.model.decoder.decode, {1}))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    assert trainer.step_number == 0


@pytest.mark.parametrize(("k", "level"), [(1, "block"), (1, "call"), (3, "call")])
def test_recomputing_the_network_changes_no_bit_of_the_gradient(k: int, level: str) -> None:
    # The embedded model: in the small one a tensor has three uses, whose gradients are summed in
    # another order where two of them are inside of a block.
    model = {"id": "tiny"}
    gradient = {"method": "last_k", "k": k, "window_group": 2}
    train = {"batch_size": 2, "micro_batch": 2}
    again = {**gradient, "checkpoint_network": level}
    plain, again = (
        gradient_of_a_step(small_config(model=model, train=train, gradient=each))
        for each in (gradient, again)
    )
    assert torch.equal(plain, again)


def test_recomputing_the_blocks_of_several_calls_sums_the_gradient_in_another_order() -> None:
    gradient = {"method": "last_k", "k": 3}
    plain = gradient_of_a_step(small_config(gradient=gradient))
    again = gradient_of_a_step(small_config(gradient={**gradient, "checkpoint_network": "block"}))
    assert relative_difference(again, plain) < 5e-6  # float32


def division(rollout: int, micro: int, decode: int, batch_size: int = 8) -> Plan:
    return Plan(
        batch_size=batch_size,
        processes=1,
        rollout_batch=rollout,
        micro_batch=micro,
        decode_batch=decode,
    )


@pytest.mark.parametrize(
    "method",
    [
        "random_k",
        "last_k",
        pytest.param("draft_lv", marks=pytest.mark.slow),
        pytest.param("leap", marks=pytest.mark.slow),
    ],
)
def test_three_batches_divide_the_same_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is rolled out, gone back through and decoded together.

    4 draws of K a step of 8 images, so that a micro-batch of 8 has to be parted and one of 3
    divides nothing.
    """
    config = small_config(
        gradient={"method": method, "k": 2, "window_group": 2},
        train={"max_grad_norm": None, "micro_batch": "auto"},
    )
    divisions = [(8, 8, 8), (8, 4, 2), (3, 2, 1), (1, 1, 1), (5, 3, 2)]  # roll-out, micro, decode

    def gradient(plan: Plan) -> torch.Tensor:
        draw = rng.image_noise
        with monkeypatch.context() as patch:
            patch.setattr(rng, "image_noise", lambda *args: draw(*args).double())
            member = Member("colourfulness", pixel.colourfulness, 1.0, config.loss)
            trainer = make_trainer(config, Mixture([member]), plan)
            make_double(trainer)
            hold_still(trainer)
            trainer.step()
        return torch.cat([p.grad.flatten() for p in parameters(trainer)])

    whole = gradient(division(*divisions[0]))
    assert float(whole.norm()) > 1e-4
    for batches in divisions[1:]:
        assert relative_difference(gradient(division(*batches)), whole) < 1e-12


@pytest.mark.long
def test_the_default_group_gives_one_gradient_on_any_machine() -> None:
    """In float32. (With the network of `clip` a few images have gradients 60 times the others', and
    rounding then reaches 3e-5; that it is rounding the float64 test above shows.)
    """
    config = small_config(
        sample={"eta": 0.0},
        gradient={"window_group": None},
        train={"max_grad_norm": None, "micro_batch": "auto", "batch_size": 16},
    )
    member = Member("colourfulness", pixel.colourfulness, 1.0, config.loss)

    def gradient(micro_batch: int) -> torch.Tensor:
        plan = division(8, micro_batch, micro_batch, 16)
        trainer = make_trainer(config, Mixture([member]), plan)
        hold_still(trainer)
        trainer.step()
        return torch.cat([p.grad.flatten() for p in parameters(trainer)])

    whole = gradient(8)
    assert float(whole.norm()) > 1e-3
    for micro_batch in (1, 2, 4):
        assert relative_difference(gradient(micro_batch), whole) < 1e-5


class ThroughFloat16(torch.autograd.Function):
    """The mean of each image, whose gradient overflows where float16 would."""

    @staticmethod
    def forward(ctx: object, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        pixels = math.prod(SHAPE)
        return (grad / pixels).half().float()[:, None, None, None].expand(-1, *SHAPE)


def test_an_overflow_in_float16_lowers_the_loss_scale_and_repeats_the_step() -> None:
    config = small_config(sample={"num_inference_steps": 2})
    member = Member("mean", lambda images, prompts: ThroughFloat16.apply(images), 1.0, config.loss)

    def after_a_step(scale: float) -> Trainer:
        trainer = make_trainer(config, Mixture([member]))
        trainer.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert math.isfinite(trainer.step().grad_norm)
        return trainer

    # The gradient in a pixel is scale / (8 images x 768 pixels); float16 ends at 65504: at 2^30 it
    # would be 175 thousand, at 2^29 87, at 2^28 44.
    good, overflown = after_a_step(2.0**28), after_a_step(2.0**30)
    assert good.optimizer.scaler.get_scale() == overflown.optimizer.scaler.get_scale() == 2.0**28
    for a, b in zip(parameters(good), parameters(overflown), strict=True):
        assert torch.equal(a, b)

    # The scale is part of what a run is resumed from.
    resumed = make_trainer(config, Mixture([member]))
    resumed.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    resumed.optimizer.load_state(overflown.optimizer.state())
    assert resumed.optimizer.scaler.get_scale() == 2.0**28
