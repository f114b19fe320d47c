"""Several rewards at once, each measured and logged by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop_cli.config import LossConfig, RewardConfig
from alignprop_cli.errors import RunError
from alignprop_cli.losses import reward_loss
from alignprop_cli.rewards import own, registry
from alignprop_cli.rewards.base import Reward, check_inputs, check_rewards


@dataclass(frozen=True)
class Member:
    """One reward of a mixture, with its weight and its loss."""

    name: str
    reward: Reward
    weight: float
    loss: LossConfig


class Mixture:
    """A weighted sum of rewards' losses: sum_j weight_j loss_j(r_j).

    Args:
        members: At least one, with distinct names.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.names = tuple(member.name for member in members)

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Measure images with every member.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].
            prompts: B texts.

        Returns:
            For each member's name its rewards, shape (B,), float32. Differentiable in images as
            far as the member is.

        Raises:
            ConfigError: If a member answers with a wrong shape.
            RunError: If images or answers are not finite, or a member fails.
        """
        scores: dict[str, Tensor] = {}
        for member in self.members:
            check_inputs(member.name, images, prompts)
            scores[member.name] = check_rewards(member.name, _ask(member, images, prompts), prompts)
        return scores

    def losses(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each image, shape (B,). Differentiable in the scores."""
        parts = [
            member.weight
            * reward_loss(
                scores[member.name],
                member.loss.kind,
                target=member.loss.target,
                scale=member.loss.scale,
            )
            for member in self.members
        ]
        return torch.stack(parts).sum(dim=0)


def _ask(member: Member, images: Tensor, prompts: Sequence[str]) -> object:
    """Return what a reward answers; a fault in one of the user's own is told as such."""
    if member.name in registry.SHIPPED:
        return member.reward(images, prompts)
    with own.faults(RunError, f"reward '{member.name}' failed"):
        return member.reward(images, prompts)


def build_mixture(
    rewards: Mapping[str, RewardConfig], loss: LossConfig, device: torch.device
) -> Mixture:
    """Build every reward of the configuration on the device.

    Raises:
        ConfigError, AssetError: As `registry.build`.
    """
    for name, config in rewards.items():
        registry.check(name, config.options)
    members: list[Member] = []
    for name, config in rewards.items():
        reward = registry.build(name, config.options)
        move = getattr(reward, "to", None)
        if callable(move):
            move(device)
        members.append(Member(name, reward, config.weight, config.loss or loss))
    return Mixture(members)
