"""The laws that every shipped reward obeys, each on a small configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_cli.config.schema import LossConfig
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.base import Reward
from alignprop_cli.rewards.frozen import FrozenReward
from alignprop_cli.rewards.mixture import Member, Mixture
from tests.factories import KeepsFloat64
from tests.rewards.small import NETWORKS, PROMPTS, SIZE, SMALL, noise, shrink_hps

CPU = torch.device("cpu")


def build(variant: str, folder: Path) -> Reward:
    with pytest.MonkeyPatch.context() as patch:
        shrink_hps(patch)
        return registry.build(variant.split()[0], SMALL[variant](folder))


@pytest.fixture(scope="module", params=SMALL)
def reward(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reward:
    if "round_trip" in request.param:
        pytest.importorskip("kornia")
    return build(request.param, tmp_path_factory.mktemp("small"))


of_networks = pytest.mark.parametrize("reward", NETWORKS, indirect=True)


def copied(reward: Any) -> Any:
    """Return a copy that may be changed, but for what reads texts, which is slow to copy."""
    kept = [getattr(reward, name, None) for name in ("_tokenizer", "_processor")]
    return copy.deepcopy(reward, {id(each): each for each in kept})


def test_every_shipped_reward_is_held_to_the_laws(tmp_path: Path) -> None:
    assert {variant.split()[0] for variant in SMALL} == {
        name for name, spec in registry.SHIPPED.items() if spec.trainable
    }
    for variant in SMALL:
        assert isinstance(build(variant, tmp_path), FrozenReward) == (variant in NETWORKS)


@pytest.mark.parametrize(("count", "height", "width"), [(3, 64, 64), (3, 33, 20), (1, 1024, 640)])
def test_it_is_one_finite_float32_per_image_with_a_gradient_for_each(
    reward: Reward, count: int, height: int, width: int
) -> None:
    images = noise(height, width, count=count).requires_grad_()
    rewards = reward(images, PROMPTS[:count])
    assert rewards.shape == (count,)
    assert rewards.dtype == torch.float32
    assert torch.isfinite(rewards).all()
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_it_is_the_same_alone_and_in_a_batch(reward: Reward) -> None:
    images = noise(40, 48)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    # float32 sums in another order.
    torch.testing.assert_close(alone, reward(images, PROMPTS), rtol=1e-5, atol=1e-5)


def test_gradcheck(reward: Any) -> None:
    network = isinstance(reward, FrozenReward)
    exact = copied(reward).to(CPU, torch.float64) if network else reward
    # Inside the range, away from the clipping of a codec.
    images = (0.3 + 0.4 * noise(8, 9, torch.float64, count=1)).requires_grad_()
    with KeepsFloat64():
        assert torch.autograd.gradcheck(
            lambda x: exact(x, PROMPTS[:1]), [images], fast_mode=network, atol=1e-6
        )


def test_the_prompt_is_read_where_the_table_says_so(reward: Reward, request: Any) -> None:
    name = request.node.callspec.params["reward"].split()[0]
    images = noise(SIZE, SIZE)
    same = torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))
    assert same != registry.SHIPPED[name].reads_prompt


def test_autocast_changes_nothing(reward: Reward) -> None:
    images = noise(SIZE, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(images, PROMPTS)
    torch.testing.assert_close(under, reward(images, PROMPTS))


@of_networks
def test_it_is_frozen_and_in_evaluation(reward: Any) -> None:
    for module in (*reward.networks, *reward.heads):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


@of_networks
def test_in_half_precision_the_answer_is_float32_and_near(reward: Any) -> None:
    images = noise(SIZE, SIZE).requires_grad_()
    exact = reward(images, PROMPTS)
    rewards = copied(reward).to(CPU, torch.bfloat16)(images, PROMPTS)
    assert rewards.dtype == torch.float32
    # Three digits of bfloat16, relative to the spread that features can have.
    scale = float(exact.detach().abs().max())
    torch.testing.assert_close(rewards, exact, rtol=0.0, atol=0.05 * scale + 0.02)
    assert len(set(rewards.tolist())) == 3
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


@of_networks
def test_recomputing_changes_no_number_and_stores_less(reward: Any) -> None:
    def run(reward: Any) -> tuple[Tensor, Tensor, int]:
        images = noise(SIZE, SIZE).requires_grad_()
        weights = {p.data_ptr() for network in reward.networks for p in network.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rewards = reward(images, PROMPTS)
        (gradient,) = torch.autograd.grad(rewards.sum(), [images])
        return rewards.detach(), gradient, sum(sizes.values())

    reward(noise(SIZE, SIZE), PROMPTS)  # texts are cached before anything is counted
    again = copied(reward)
    again.recompute()
    before, after = run(reward), run(again)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert after[2] < 0.7 * before[2]


def test_what_cannot_be_measured_is_refused(reward: Reward) -> None:
    mixture = Mixture([Member("mine", reward, 1.0, LossConfig())])
    images = noise(16, 16)
    for value in (float("nan"), float("inf")):
        broken = images.clone()
        broken[1, 0, 0, 0] = value
        with pytest.raises(RunError, match=r"'mine': image 1 .*'one cat'"):
            mixture.score(broken, PROMPTS)
    with pytest.raises(ConfigError, match="'mine': got 0 prompts for 3 images"):
        mixture.score(images, [])
    with pytest.raises(ConfigError, match="'mine': got 2 prompts for 3 images"):
        mixture.score(images, PROMPTS[:2])
    for wrong in (images[:0], images[0], images[:, :1]):
        with pytest.raises(ConfigError, match=r"'mine': expected images of shape \(B, 3, H, W\)"):
            mixture.score(wrong, PROMPTS[: len(wrong)])
