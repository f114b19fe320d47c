"""From rewards to losses: values, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from alignprop_cli.losses import reward_loss
from tests.factories import randn

REWARDS = torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected", "slope"),
    [
        ("maximise", [0.5, -1.0, -2.5], [-0.5, -0.5, -0.5]),
        ("target", [1.5, 0.0, 1.5], [-0.5, 0.0, 0.5]),
        ("hinge", [1.5, 0.0, 0.0], [-0.5, 0.0, 0.0]),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(
    kind: str, expected: list[float], slope: list[float]
) -> None:
    rewards = REWARDS.clone().requires_grad_()
    losses = reward_loss(rewards, kind, target=2.0, scale=0.5)  # type: ignore[arg-type]
    assert losses.tolist() == expected
    (gradient,) = torch.autograd.grad(losses.sum(), [rewards])
    assert gradient.tolist() == slope


@pytest.mark.parametrize("kind", ["maximise", "target", "hinge"])
def test_every_loss_passes_gradcheck_away_from_its_target(kind: str) -> None:
    rewards = randn(0, 6).requires_grad_()
    assert (rewards - 0.25).abs().min().item() > 1e-3
    assert torch.autograd.gradcheck(
        lambda r: reward_loss(r, kind, target=0.25, scale=3.0),  # type: ignore[arg-type]
        [rewards],
    )


def test_a_higher_reward_is_never_a_higher_loss_below_the_target() -> None:
    rewards = torch.linspace(-3.0, 2.0, 20, dtype=torch.float64)
    for kind in ("maximise", "target", "hinge"):
        losses = reward_loss(rewards, kind, target=2.0)
        assert (losses.diff() < 0.0).all()


def test_the_loss_of_a_batch_is_that_of_its_images() -> None:
    for dtype in (torch.float32, torch.float64):
        losses = reward_loss(REWARDS.to(dtype), "hinge", target=4.0)
        assert losses.shape == (3,)
        assert losses.dtype == dtype
        alone = [float(reward_loss(r[None].to(dtype), "hinge", target=4.0)) for r in REWARDS]
        assert losses.tolist() == alone


@pytest.mark.parametrize("kind", ["target", "hinge"])
def test_a_missing_target_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}.*needs a target"):
        reward_loss(REWARDS, kind)  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="'minimise'"):
        reward_loss(REWARDS, "minimise", target=1.0)  # type: ignore[arg-type]
