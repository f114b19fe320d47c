"""Several rewards at once, each measured and logged by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.losses import reward_loss
from alignprop_cli.rewards import registry
from alignprop_cli.rewards import user as own
from alignprop_cli.rewards.base import Reward, check_inputs, check_rewards, depends_on
from alignprop_cli.rewards.frozen import FrozenReward


@dataclass(frozen=True)
class Member:
    """One reward of a mixture.

    Args:
        name: Of the reward.
        reward: Measures images.
        weight: Factor on its loss.
        loss: How it becomes a loss.
        base: Mean and deviation over pictures of the base model; with them the loss is that of
            (reward - mean) / deviation, the target moved likewise.
    """

    name: str
    reward: Reward
    weight: float
    loss: LossConfig
    base: tuple[float, float] | None = None

    def loss_of(self, rewards: Tensor) -> Tensor:
        """Return the weighted loss of each image, shape (B,). Differentiable in rewards (B,)."""
        target = self.loss.target
        if self.base is not None:
            mean, std = self.base
            rewards = (rewards - mean) / std
            target = None if target is None else (target - mean) / std
        return self.weight * reward_loss(
            rewards, self.loss.kind, target=target, scale=self.loss.scale
        )


class Mixture:
    """A weighted sum of rewards' losses: sum_j weight_j loss_j(r_j).

    Args:
        members: At least one, with distinct names.

    Attributes:
        names: Of the members.
        beside: Figures that members report beside their rewards: functions of images by name.

    Raises:
        ConfigError: If what a member reports beside is no such mapping, or has the name of another
            figure.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.names = tuple(member.name for member in members)
        self.beside: dict[str, Callable[[Tensor], Tensor]] = {}
        for member in members:
            for name, measure in _beside(member).items():
                if name in self.figures:
                    raise ConfigError(
                        f"reward '{member.name}': '{name}', which it reports beside, is another "
                        "figure's name too",
                        hint="give one of them another name",
                    )
                self.beside[name] = measure

    @property
    def figures(self) -> tuple[str, ...]:
        """Return the names of everything that `score` measures."""
        return (*self.names, *self.beside)

    @property
    def features(self) -> Callable[[Tensor], Tensor] | None:
        """Return what gives features of images (B, D), of the first member that can, if any."""
        rewards = [m.reward for m in self.members if isinstance(m.reward, FrozenReward)]
        found = (getattr(reward, "image_features", None) for reward in rewards)
        return next(filter(None, found), None)

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Measure images with every member, and what they report beside.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].
            prompts: B texts.

        Returns:
            For each of `figures` a tensor of shape (B,), float32 (or float64 where the member
            answers so), on the images' device. Those of members are differentiable in images as
            far as the member is; those beside are not.

        Raises:
            ConfigError: If a member answers with a wrong shape or changes the images.
            RunError: If images or answers are not finite, or a member fails.
        """
        scores: dict[str, Tensor] = {}
        check_inputs(", ".join(self.names), images, prompts)
        for member in self.members:
            answer = check_rewards(member.name, _ask(member, images, prompts), prompts)
            scores[member.name] = answer.to(images.device)
        for name, measure in self.beside.items():
            with own.faults(RunError, f"'{name}' beside a reward failed"):
                answer = measure(images.detach())
            scores[name] = check_rewards(name, answer, prompts).to(images.device)
        return scores

    def check_gradients(self, scores: Mapping[str, Tensor], images: Tensor) -> None:
        """Refuse members whose gradient does not reach the images.

        Raises:
            ConfigError: With the name of the first one.
        """
        for name in self.names:
            if not depends_on(scores[name], images):
                raise ConfigError(
                    f"reward '{name}' has no gradient: its answer does not depend on the images "
                    "in a differentiable way, so there is nothing to train on",
                    hint="it must not detach, round, or leave torch",
                )

    def losses(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each image, shape (B,). Differentiable in the scores."""
        return torch.stack([m.loss_of(scores[m.name]) for m in self.members]).sum(dim=0)

    def blamed(self) -> AbstractContextManager[None]:
        """Return a block, for backward, in which any fault is one of the user's own rewards'."""
        names = [f"'{name}'" for name in self.names if name not in registry.SHIPPED]
        if not names:
            return nullcontext()
        return own.faults(RunError, f"the gradient of {', '.join(names)} failed")

    def standardise(self, name: str, mean: float, std: float) -> None:
        """Let a member's loss be that of (reward - mean) / std from now on.

        Raises:
            RunError: If std is 0: all pictures of the base model are worth the same.
        """
        if not std > 0.0:
            raise RunError(
                f"reward.{name}.standardise: the base model's pictures all have the reward {mean}",
                hint="draw more with eval.images, or set base_mean and base_std",
            )
        self.members = tuple(
            replace(member, base=(mean, std)) if member.name == name else member
            for member in self.members
        )

    def recompute(self) -> None:
        """Compute the blocks of the members' networks again in backward, to save memory."""
        for member in self.members:
            if isinstance(member.reward, FrozenReward):
                member.reward.recompute()


def _beside(member: Member) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Return what a member reports beside its reward: functions of images by name."""
    beside: object = getattr(member.reward, "beside", {})
    if isinstance(beside, Mapping) and all(
        isinstance(name, str) and callable(measure) for name, measure in beside.items()
    ):
        return beside
    raise ConfigError(
        f"reward '{member.name}': beside must map names to functions of images, got {beside!r}"
    )


def _ask(member: Member, images: Tensor, prompts: Sequence[str]) -> object:
    """Return what a reward answers; a fault in one of the user's own is told as such."""
    if member.name in registry.SHIPPED:
        return member.reward(images, prompts)
    version = images._version
    with own.faults(RunError, f"reward '{member.name}' failed"):
        answer = member.reward(images, prompts)
    if images._version != version:
        raise ConfigError(
            f"reward '{member.name}' changes the images it is given, which others use too",
            hint="write x = x - 1 in place of x -= 1, or begin with images = images.clone()",
        )
    return answer


def build_mixture(
    rewards: Mapping[str, RewardConfig], loss: LossConfig, device: torch.device
) -> Mixture:
    """Build every reward of the configuration on the device.

    Raises:
        ConfigError, AssetError: As `registry.build`; AssetError too where a move fails.
    """
    for name, config in rewards.items():
        registry.check(name, config.options)
    members: list[Member] = []
    for name, config in rewards.items():
        reward = registry.build(name, config.options)
        dtype: torch.dtype = getattr(torch, config.dtype)
        if isinstance(reward, FrozenReward):
            reward.to(device, dtype)
        elif dtype != torch.float32:
            raise ConfigError(f"reward.{name}.dtype: it holds no network that could be {dtype}")
        elif callable(move := getattr(reward, "to", None)):
            with own.faults(AssetError, f"reward '{name}': cannot be moved to {device}"):
                move(device)
        base = (
            None
            if config.base_mean is None or config.base_std is None or not config.standardise
            else (config.base_mean, config.base_std)
        )
        members.append(Member(name, reward, config.weight, config.loss or loss, base))
    return Mixture(members)
