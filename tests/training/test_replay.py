"""Recorded calls of the roll-out: the same values, whatever happens between two replays.

A recording of our making calls the function again and writes into the first output, as a CUDA graph
does. A real one is tested where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from alignprop_cli.lora import layers as lora
from alignprop_cli.planning.estimate import GIB, Budget
from alignprop_cli.planning.speed import Pace, Times, step_seconds
from alignprop_cli.training.replay import Replay, cuda_recorder
from alignprop_cli.training.trainer import Trainer
from alignprop_cli.training.trial import Trial
from alignprop_cli.training.tuning import choose_layout, replay_rollout
from tests.factories import TEXT_WIDTH, fill_lora_b, randn, small_pipeline
from tests.planning import test_plan
from tests.training.test_trainer import hold_still, make_trainer, parameters, small_config

HALF = torch.bfloat16


class Again:
    """A recording that makes the call again; how many there are is counted."""

    made = 0
    replayed = 0

    def __init__(self, call: Callable[[], Any]) -> None:
        type(self).made += 1
        self.call, self.output = call, call()

    def replay(self) -> None:
        type(self).replayed += 1
        for place, value in zip(self.output, self.call(), strict=True):
            place.copy_(value)


@pytest.fixture(autouse=True)
def nothing_counted() -> None:
    Again.made = Again.replayed = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("replay"))


@pytest.fixture
def network(folder: Path) -> UNet2DConditionModel:
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    torch.nn.Module.to(network.requires_grad_(False), HALF)
    lora.inject(network, rank=2, alpha=4, target_modules=["to_q", "to_v"], seed=0)
    fill_lora_b(network, seed=1)
    return network


def call(network: torch.nn.Module, seed: int = 0, rows: int = 2, timestep: float = 7.0) -> Tensor:
    latents = randn(seed, rows, 4, 8, 8, dtype=HALF)
    timesteps = torch.full((rows,), timestep)
    embeds = randn(seed + 1, rows, 5, TEXT_WIDTH, dtype=HALF)
    return network(latents, timesteps, embeds, return_dict=False)[0]


def started(network: torch.nn.Module, record: Any = Again) -> tuple[Replay, list[str]]:
    said: list[str] = []
    replay = Replay(network, said.append)
    replay.start(record)
    return replay, said


@torch.no_grad()
def test_replayed_calls_give_the_same_numbers(network: UNet2DConditionModel) -> None:
    expected = [call(network, seed, timestep=100.0 * seed) for seed in range(4)]
    replay, _ = started(network)
    with lora.prepared(network):
        replayed = replay.around(call)
        # Kept side by side: a later replay must not write into what an earlier one returned.
        found = [replayed(network, seed, timestep=100.0 * seed) for seed in range(4)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1])
    assert (Again.made, Again.replayed) == (1, 4)
    # Outside of the function it is called as usual.
    assert torch.equal(call(network, timestep=0.0), expected[0])
    assert Again.replayed == 4


@torch.no_grad()
def test_a_new_lora_is_seen_without_a_new_recording(network: UNet2DConditionModel) -> None:
    replay, _ = started(network)
    outputs: list[Tensor] = []
    for seed in (1, 2, 3):
        fill_lora_b(network, seed=seed)  # as an optimiser's step: other values in the same memory
        with lora.prepared(network):
            outputs.append(replay.around(call)(network))
            assert torch.equal(outputs[-1], call(network))
    assert not torch.equal(outputs[0], outputs[1])
    assert (Again.made, Again.replayed) == (1, 3)


@torch.no_grad()
def test_other_shapes_and_moved_memory_are_recorded_anew(network: UNet2DConditionModel) -> None:
    replay, _ = started(network)
    with lora.prepared(network):
        for rows in (3, 2, 3, 1):
            assert torch.equal(replay.around(call)(network, rows=rows), call(network, rows=rows))
        assert (Again.made, replay.recordings) == (3, 3)
        # Beyond four shapes nothing more is recorded, and the values are still right.
        for rows in (4, 5, 6):
            assert torch.equal(replay.around(call)(network, rows=rows), call(network, rows=rows))
        assert (Again.made, replay.recordings) == (4, 4)
        network.conv_in.weight.data = network.conv_in.weight.data.clone()
        replay.around(call)(network, rows=3)
        assert (Again.made, replay.recordings) == (5, 1)
        replay.forget()
        replay.around(call)(network, rows=3)
        assert Again.made == 6


def test_calls_with_gradient_are_not_replayed(network: UNet2DConditionModel) -> None:
    replay, _ = started(network)
    assert replay.around(call)(network).requires_grad
    assert Again.made == 0


@torch.no_grad()
def test_where_recording_fails_calls_go_on_and_it_is_said_once(
    network: UNet2DConditionModel,
) -> None:
    def broken(call: Callable[[], Any]) -> Again:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    replay, said = started(network, broken)
    for _ in range(2):
        assert torch.equal(replay.around(call)(network), call(network))
    assert not replay.is_on
    assert said == [
        "the roll-out's calls cannot be recorded and run as usual: operation not permitted when "
        "stream is capturing"
    ]


def test_an_error_inside_leaves_the_network_as_it_was(network: UNet2DConditionModel) -> None:
    replay, _ = started(network)
    with pytest.raises(ZeroDivisionError):
        replay.around(lambda: 1 / 0)()
    assert "forward" not in vars(network)


HALF_CONFIG: dict[str, dict[str, object]] = {
    "model": {"dtype": "bfloat16"},
    "sample": {"num_inference_steps": 4, "eta": 0.0},
    "gradient": {"method": "last_k", "k": 1, "window_group": 4},
    "train": {"batch_size": 4, "micro_batch": 2, "rollout_batch": 4, "max_grad_norm": None},
}


@pytest.mark.long
def test_a_step_is_the_same_with_its_roll_out_replayed() -> None:
    plain, replayed = (make_trainer(small_config(**HALF_CONFIG)) for _ in range(2))
    replayed.replay.start(Again)
    for _ in range(2):
        records = [trainer.step() for trainer in (plain, replayed)]
        assert records[0].loss == records[1].loss
        for one, other in zip(parameters(plain), parameters(replayed), strict=True):
            assert torch.equal(one, other)
    # Both branches of 4 images in each of the 3 calls before the window, of two steps.
    assert (Again.made, Again.replayed) == (1, 6)
    # Another plan has other batches, for which there is another recording.
    replayed.apply_plan(replayed.plan.halved())
    assert replayed.replay.recordings == 0


@pytest.fixture(scope="module")
def half() -> Trainer:
    """Return a trainer of a network in half precision, for tests that leave it as it was."""
    return make_trainer(small_config(**HALF_CONFIG))


@pytest.fixture(scope="module")
def single() -> Trainer:
    """Return one of a network in float32, for the steps of several tests."""
    return make_trainer(small_config(), images=64)


LAUNCH = Times(Pace(0.06, 0.01), Pace(0.2, 0.05), Pace(0.1, 0.1), Pace(0.1, 0.1), "here")


@pytest.mark.parametrize("why", ["kept", "slower", "busy", "no memory", "switched off", "wanted"])
def test_the_roll_out_is_replayed_where_launching_takes_the_time_and_it_fits(
    why: str, half: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, said = half, list[str]()
    trainer.replay.stop()
    request, parts = test_plan.asked(batch_size=4), test_plan.footprint()
    budget = Budget(8 * GIB, "cuda", "")
    plan = test_plan.make_plan(request, footprint=parts, budget=budget, times=LAUNCH)
    trainer.plan = plan
    seconds = iter([0.06, 0.08 if why in ("slower", "wanted") else 0.02])

    def timed(trial: Trial, images: int, names: object) -> dict[str, float]:
        assert (images, names) == (plan.rollout_batch, ("rollout",))
        return {"rollout": next(seconds)}

    monkeypatch.setattr(Trial, "part_seconds", timed)
    if why == "no memory":  # exactly the recording is missing
        assert plan.estimate is not None
        held = parts.rollout.forward(plan.rollout_batch)
        budget = Budget(Budget(0, "cuda", "").least(int(plan.estimate.peak + held) - 1), "cuda", "")
    times = LAUNCH if why != "busy" else Times(Pace(0.06, 0.06), *[Pace(1.0, 1.0)] * 3, "here")
    wanted: Any = {"switched off": False, "wanted": True}.get(why, "auto")
    replay_rollout(
        Trial(trainer),
        wanted,
        said.append,
        times=times,
        footprint=parts,
        request=request,
        budget=budget,
        record=Again,
    )
    on = why in ("kept", "wanted")
    assert trainer.replay.is_on is on
    assert (trainer.replay.held_bytes > 0) is on
    assert len(said) == (why in ("kept", "slower", "wanted"))
    if why == "kept":
        assert said == ["the roll-out's calls are replayed from a recording: 3.00 x as fast"]
        # 46.5 calls without gradient, of 4 images each, take 0.02 instead of 0.06 s.
        before = step_seconds(LAUNCH, parts, request, plan, 4)
        assert trainer.plan.seconds is not None
        assert plan.rollout_batch == 4
        mean = request.num_inference_steps - request.mean
        assert before - trainer.plan.seconds == pytest.approx(mean * 0.04)


def test_merged_layers_move_in_every_step_and_are_not_recorded(
    single: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = single
    plan = test_plan.make_plan(
        test_plan.asked(batch_size=4), footprint=test_plan.footprint(), times=LAUNCH
    )
    monkeypatch.setattr(trainer, "plan", plan)
    said: list[str] = []
    replay_rollout(
        Trial(trainer),
        True,
        said.append,
        times=LAUNCH,
        footprint=test_plan.footprint(),
        request=test_plan.asked(batch_size=4),
        budget=Budget(8 * GIB, "cuda", ""),
        record=Again,
    )
    assert not trainer.replay.is_on
    assert "not recorded: the LoRA is merged into float32 weights" in said[0]


@pytest.mark.parametrize(
    ("seconds", "contiguous"), [([2.0, 1.0], True), ([2.0, 1.99], False), ([1.0, 2.0], False)]
)
def test_the_faster_memory_layout_is_kept(
    seconds: list[float], contiguous: bool, single: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, said, times = single, list[str](), iter(seconds)
    trainer.model.network.module.to(memory_format=torch.channels_last)
    weight = trainer.model.network.module.conv_in.weight

    def timed(trial: Trial, images: int, names: object) -> dict[str, float]:
        assert names == ("rollout", "call")
        return dict.fromkeys(("rollout", "call"), next(times))

    monkeypatch.setattr(Trial, "part_seconds", timed)
    assert not weight.is_contiguous()
    choose_layout(Trial(trainer), said.append)
    assert weight.is_contiguous() is contiguous
    assert (
        said
        == ["the network runs 2.00 x as fast in contiguous memory, and so it does"] * contiguous
    )
    hold_still(trainer)
    assert trainer.step().grad_norm > 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_cuda_graph_gives_the_same_numbers(network: UNet2DConditionModel) -> None:
    torch.nn.Module.to(network, "cuda")

    def on_gpu(seed: int) -> Tensor:
        latents, embeds = (
            randn(seed + i, 2, *shape, dtype=HALF).cuda()
            for i, shape in enumerate([(4, 8, 8), (5, TEXT_WIDTH)])
        )
        timesteps = torch.full((2,), 10.0 * seed, device="cuda")
        return network(latents, timesteps, embeds, return_dict=False)[0]

    said: list[str] = []
    replay = Replay(network, said.append)
    replay.start(cuda_recorder())
    for seed in (1, 2, 3):
        fill_lora_b(network, seed=seed)
        with lora.prepared(network):
            found = replay.around(on_gpu)(seed)
            torch.testing.assert_close(found, on_gpu(seed), rtol=0.0, atol=0.0)
    assert (replay.recordings, said) == (1, [])
