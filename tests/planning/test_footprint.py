"""What a plan expects a step to store is what a real step stores, and so is its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from alignprop_cli.config.schema import Config, ModelConfig, RewardConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError
from alignprop_cli.estimators import GradWindow
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import load_model
from alignprop_cli.models.meta import outline
from alignprop_cli.planning import meter as memory
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.estimate import GIB, Footprint, Level, Work
from alignprop_cli.planning.plan import Plan
from alignprop_cli.rewards import meta as reward_outline
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.mixture import build_mixture
from alignprop_cli.training.trainer import Trainer
from tests.factories import mid_pipeline, small_pipeline

STEPS = 5
# By block the first call of a window is counted as the others are, which store a little more.
CLOSE: dict[Level, float] = {"none": 0.01, "block": 0.02, "call": 0.01}


def config(
    model: str = "tiny", steps: int = STEPS, eval_prompts: str = "animals-eval", **gradient: Any
) -> Config:
    return parse(
        {
            "model": {"id": model},
            "lora": {"rank": 4},
            "sample": {"num_inference_steps": steps, "guidance_scale": 3.0},
            "gradient": gradient,
            "reward": {"clip": {"model": "tiny"}},
            "train": {"prompts": "shapes", "batch_size": 8},
            "eval": {"prompts": eval_prompts},
        }
    )


@pytest.fixture(scope="module")
def predicted() -> Footprint:
    return planning.measure(config(), "cpu")


def trainer(plan: Plan, chosen: Config | None = None) -> Trainer:
    accelerator = Accelerator(cpu=True)
    chosen = chosen or config()
    model = load_model(chosen.model, accelerator.device)
    lora.inject(model.network, rank=4, alpha=4, target_modules=chosen.lora.target_modules, seed=0)
    mixture = build_mixture(chosen.reward, chosen.loss, accelerator.device)
    if plan.checkpoint_reward:
        mixture.recompute()
    prompts = ["one small red circle on a black background"]
    made = Trainer(chosen, plan, model, mixture, prompts, accelerator)
    steps = chosen.sample.num_inference_steps
    forward(made, 1, GradWindow(steps - 1, steps))  # texts are read once, and kept
    return made


def forward(made: Trainer, images: int, window: GradWindow) -> torch.Tensor:
    _, losses = made.forward(range(images), window, lora.Merged(made.model.network))
    return losses


def weights_of(made: Trainer) -> list[torch.Tensor]:
    model: Any = made.model
    networks = [n for m in made.mixture.members for n in m.reward.networks]  # type: ignore[attr-defined]
    return [
        *model.network.parameters(),
        *model.pipeline.vae.parameters(),
        *(p for network in networks for p in (*network.parameters(), *network.buffers())),
    ]


def expected_bytes(found: Footprint, plan: Plan, k: int) -> float:
    m, kept = plan.micro_batch, plan.stored_calls
    levels: list[Level] = [plan.checkpoint_network] * (k - kept) + ["none"] * min(kept, k)
    parts = [found.first[levels[0]], *(found.call[level] for level in levels[1:])]
    parts += [found.decoder[plan.checkpoint_decoder], found.reward[plan.checkpoint_reward]]
    return sum(part.saved(m) for part in parts)


@pytest.mark.parametrize("k", [1, 3, STEPS])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize(
    ("level", "again"), [("none", False), ("none", True), ("block", False), ("call", True)]
)
def test_the_bytes_that_a_real_step_stores_are_the_predicted_ones(
    predicted: Footprint, level: Level, again: bool, micro_batch: int, k: int
) -> None:
    plan = Plan(micro_batch, 8 // micro_batch, 1, 8, level, again, again)
    made = trainer(plan)
    with memory.SavedBytes(weights_of(made)) as kept:
        losses = forward(made, micro_batch, GradWindow(STEPS - k, STEPS))
    assert losses.requires_grad
    assert kept.total == pytest.approx(
        expected_bytes(predicted, plan, k), rel=CLOSE[plan.checkpoint_network]
    )


@pytest.mark.parametrize("k", [1, 2, STEPS])
def test_the_bytes_of_a_window_of_which_the_last_calls_are_stored(
    predicted: Footprint, k: int
) -> None:
    plan = Plan(2, 4, 1, 8, "call", False, False, stored_calls=2)
    made = trainer(plan)
    with memory.SavedBytes(weights_of(made)) as kept:
        assert forward(made, 2, GradWindow(STEPS - k, STEPS)).requires_grad
    assert kept.total == pytest.approx(
        expected_bytes(predicted, plan, k), rel=CLOSE[plan.checkpoint_network]
    )


def test_the_bytes_of_narrow_heads_are_those_of_the_attention_that_the_cpu_takes(
    tmp_path: Path,
) -> None:
    chosen = config(str(small_pipeline(tmp_path / "narrow")), steps=2)  # 8 channels a head
    plan = Plan(2, 4, 1, 8, "none", False, False)
    made = trainer(plan, chosen)
    with memory.SavedBytes(weights_of(made)) as kept:
        assert forward(made, 2, GradWindow(0, 2)).requires_grad
    found = planning.measure(chosen, "cpu")
    assert kept.total == pytest.approx(expected_bytes(found, plan, 2), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize(
    ("level", "again"), [("none", False), ("none", True), ("block", False), ("call", True)]
)
def test_the_stored_bytes_of_a_larger_model_are_the_predicted_ones(
    tmp_path: Path, level: Level, again: bool, micro_batch: int
) -> None:
    chosen = config(str(mid_pipeline(tmp_path / "mid")), steps=12)
    found = planning.measure(chosen, "cpu")
    plan = Plan(micro_batch, 8 // micro_batch, 1, 8, level, again, again)
    made = trainer(plan, chosen)
    for k in (1, 10, 12):
        with memory.SavedBytes(weights_of(made)) as kept:
            losses = forward(made, micro_batch, GradWindow(12 - k, 12))
        assert losses.requires_grad
        assert kept.total == pytest.approx(expected_bytes(found, plan, k), rel=CLOSE[level])
        del losses  # or the next graph would be built while this one is held
        kept.release()


@pytest.mark.parametrize("k", [1, STEPS])
@pytest.mark.parametrize("level", ["none", "call"])
def test_the_operations_of_a_real_step_are_the_predicted_ones(
    predicted: Footprint, level: Level, k: int
) -> None:
    plan = Plan(2, 4, 1, 8, level, False, False)
    made = trainer(plan)
    window = GradWindow(STEPS - k, STEPS)
    cost = memory.count(lambda: forward(made, 2, window).sum(), exclude=weights_of(made))
    first, call = predicted.first[level], predicted.call[level]
    tail = (predicted.decoder[False], predicted.reward[False])
    flops = STEPS * predicted.rollout.forward_flops(2)
    flops += first.backward_flops(2) + (k - 1) * call.backward_flops(2)
    flops += sum(part.forward_flops(2) + part.backward_flops(2) for part in tail)
    assert cost.forward_flops + cost.backward_flops == pytest.approx(flops, rel=0.01)


def test_the_published_architectures_have_their_known_sizes() -> None:
    """Parameter counts of the published checkpoints."""
    sizes = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 123_060_480, (4, 64, 64)),
        "stabilityai/stable-diffusion-2-1": (865_910_724, 340_387_840, (4, 96, 96)),
    }
    for name, (network, text_encoder, shape) in sizes.items():
        model = outline(ModelConfig(id=name), torch.bfloat16, "cuda")
        assert model.device.type == "meta"
        assert sum(p.numel() for p in model.network.parameters()) == network
        assert sum(p.numel() for p in model.pipeline.vae.parameters()) == 83_653_863
        assert sum(p.numel() for p in model.pipeline.text_encoder.parameters()) == text_encoder
        assert model.latent_shape(None, None) == shape
        assert model.network.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("aesthetic", {}, 304e6),  # the vision tower of CLIP ViT-L/14
        ("hps", {}, 986e6),
        ("pickscore", {}, 986e6),
        ("imagereward", {}, 441e6),
        ("clip", {"model": "ViT-B-32"}, 151e6),
        ("count", {"object": "cat"}, 6.5e6),  # YOLOS-tiny
        ("count", {"object": "cat", "model": "google/owlv2-base-patch16-ensemble"}, 155e6),
        ("brightness", {}, 0.0),
    ],
)
def test_the_networks_of_rewards_have_their_known_sizes(
    name: str, options: dict[str, Any], parameters: float
) -> None:
    assert reward_outline.parameters(name, options) == pytest.approx(parameters, rel=0.02)


def test_a_reward_that_is_not_known_before_it_is_loaded_is_said_not_to_be_counted() -> None:
    members = {"mine.py:best": RewardConfig(), "brightness": RewardConfig()}
    works, weights, uncounted = planning._rewards(members, (3, 16, 16), "cpu")
    assert uncounted == ("mine.py:best",)
    assert weights == 0
    # Luma keeps nothing of the image's size but is made of it.
    assert isinstance(works[False], Work)
    assert works[False].forward(1) > 0.0


@pytest.mark.parametrize("name", [name for name in registry.SHIPPED if planning._is_small(name)])
def test_every_reward_without_a_network_can_be_counted(name: str) -> None:
    works, weights, uncounted = planning._rewards({name: RewardConfig()}, (3, 32, 16), "cuda")
    assert (weights, uncounted) == (0, ())
    assert works[False].forward(1) > 0.0
    assert works[True].forward(2) == 2 * works[False].forward(1)


def test_the_text_encoder_leaves_the_gpu_where_the_prompts_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = config(eval_prompts="shapes-heldout")
    assert "text encoder weights" not in planning.measure(few, "cuda").weights
    assert planning.measure(few, "cpu").weights["text encoder weights"] > 0
    # 800 and 160 prompts of the sets it names.
    monkeypatch.setattr(planning, "_ENCODED_FIRST", 959)
    assert planning.measure(few, "cuda").weights["text encoder weights"] > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * GIB), ("800 MiB", 800 * 2**20), ("6.5gib", 6.5 * GIB), ("1000", 1000)],
)
def test_memory_is_read_as_people_write_it(text: str, size: float) -> None:
    assert planning.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3TBs", "1.2.3GB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory: expected something like 12GB"):
        planning.parse_memory(text)


def test_the_memory_of_this_machine_is_found() -> None:
    budget = planning.budget_of(Accelerator(cpu=True))
    assert budget.device_type == "cpu"
    assert 0.1 * GIB < budget.bytes < 10_000 * GIB
    assert budget.usable < budget.bytes
