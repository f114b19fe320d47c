"""Several rewards, measured and logged separately, and the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.errors import AssetError, ConfigError, NonFinite, RunError
from alignprop_cli.losses import reward_loss
from alignprop_cli.prompts import cut_note, for_tokenizer
from alignprop_cli.rewards import registry, user
from alignprop_cli.rewards.base import (
    Reward,
    check_inputs,
    check_rewards,
    depends_on,
    takes_latents,
)
from alignprop_cli.rewards.frozen import FrozenReward


@dataclass(frozen=True)
class Member:
    """One reward of a mixture.

    Args:
        name: Of the reward.
        reward: The reward itself.
        weight: Factor on its loss.
        loss: How the reward becomes a loss.
        base: Mean and standard deviation of the reward over images of the base model. With them the
            loss is that of (reward - mean) / std, and the target is standardised the same way.
    """

    name: str
    reward: Reward
    weight: float
    loss: LossConfig
    base: tuple[float, float] | None = None

    @property
    def takes_latents(self) -> bool:
        """Return whether it measures latents instead of images."""
        return takes_latents(self.reward)

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
        names: Names of the members.
        extra_metrics: What members report in addition to their rewards, never trained on: functions
            of images (B, 3, H, W) that return (B,), by name. Those of a member that takes latents
            are functions of latents.

    Raises:
        ConfigError: If a member's extra metrics are not such a mapping, or one has the same name as
            another metric.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.names = tuple(member.name for member in members)
        self.extra_metrics: dict[str, Callable[[Tensor], Tensor]] = {}
        # The member of each.
        self._owners: dict[str, Member] = {}
        for member in members:
            for name, measure in _extra_metrics(member).items():
                if name in self.metrics:
                    raise ConfigError(
                        f"reward '{member.name}': its extra metric '{name}' has the same name as "
                        "another metric",
                        hint="give one of them another name",
                    )
                self.extra_metrics[name] = measure
                self._owners[name] = member

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of everything that `score` measures: rewards, then extra metrics."""
        return (*self.names, *self.extra_metrics)

    @property
    def needs_images(self) -> bool:
        """Return whether anything is measured on images, so that latents must be decoded."""
        own = [m.takes_latents for m in self.members]
        extra = [
            name in self._owners and self._owners[name].takes_latents for name in self.extra_metrics
        ]
        return not all(own + extra)

    @property
    def features(self) -> Callable[[Tensor], Tensor] | None:
        """Return the first member's function from images to features (B, D), if any has one."""
        rewards = [m.reward for m in self.members if isinstance(m.reward, FrozenReward)]
        found = (getattr(reward, "image_features", None) for reward in rewards)
        return next(filter(None, found), None)

    def score(
        self, images: Tensor | None, prompts: Sequence[str], latents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Measure images with every member and every extra metric.

        Args:
            images: Shape (B, 3, H, W), in [0, 1]; None only where not `needs_images`.
            prompts: B texts.
            latents: The clean latents (B, C, h, w) of the images, for the members that take them.

        Returns:
            For each of `metrics` a tensor of shape (B,) on the images' device, float32 (float64
            where the member returns that). Rewards are differentiable in images, or in latents, if
            the member is; extra metrics are not.

        Raises:
            ConfigError: If a member returns a wrong shape or changes the images, or takes latents
                where there are none.
            RunError: If images or rewards are not finite, or a member fails.
        """
        scores: dict[str, Tensor] = {}
        # Checked here once, so that no reward needs a check of its own, and NaN from the decoder is
        # not reported as a fault of the reward.
        names = ", ".join(self.names)
        if images is not None:
            check_inputs(names, images, prompts)
        if latents is not None and any(member.takes_latents for member in self.members):
            check_inputs(names, latents, prompts, latents=True)
        for member in self.members:
            given = _input(member, images, latents)
            answer = check_rewards(member.name, _ask(member, given, prompts), prompts)
            scores[member.name] = answer.to(given.device)
        # Detached: a value that is only recorded must not keep the graph of the images in memory.
        for name, measure in self.extra_metrics.items():
            member = self._owners.get(name)
            owner = name if member is None else member.name
            given = _input(member, images, latents).detach()
            with user.faults(RunError, f"reward '{owner}': extra metric '{name}' failed"):
                # A copy of its own, as in `_ask`.
                shipped = member is None or owner in registry.SHIPPED
                answer = measure(given if shipped else given.clone())
            scores[name] = check_rewards(owner, answer, prompts, name).to(given.device)
        return scores

    def cutting(self, prompt: str) -> list[str]:
        """Return the names of the rewards that do not read a prompt to its end."""
        readers = ((m.name, m.reward) for m in self.members)
        return [n for n, r in readers if isinstance(r, FrozenReward) and r.cuts(prompt)]

    def cut_notes(self, prompts: Collection[str]) -> list[str]:
        """Return a message for each reward that does not read all prompts to their end."""
        cut: dict[str, list[str]] = {}
        for prompt in prompts:
            for name in self.cutting(prompt):
                cut.setdefault(name, []).append(prompt)
        return [cut_note(name, found, len(prompts)) for name, found in cut.items()]

    def check_gradients(
        self, scores: Mapping[str, Tensor], images: Tensor | None, latents: Tensor | None = None
    ) -> None:
        """Refuse members whose gradient does not reach the images, or the latents that they take.

        Raises:
            ConfigError: With the name of the first one.
        """
        for member in self.members:
            if not depends_on(scores[member.name], _input(member, images, latents)):
                what = "latents" if member.takes_latents else "images"
                raise ConfigError(
                    f"reward '{member.name}' has no gradient: its result does not depend on the "
                    f"{what} in a differentiable way, so there is nothing to train on",
                    hint="it must not detach, round, or leave torch",
                )

    def losses(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each image, shape (B,). Differentiable in the scores."""
        return torch.stack([m.loss_of(scores[m.name]) for m in self.members]).sum(dim=0)

    def differentiate(
        self,
        images: Tensor | None,
        prompts: Sequence[str],
        to_loss: Callable[[Tensor], Tensor],
        latents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """Score images, and compute the gradient of their loss with respect to the images.

        The backward pass ends at the images, whose own graph is not touched: the caller continues
        from there, through the decoder and the sampling chain.

        Args:
            images: Shape (B, 3, H, W), in [0, 1]; None only where not `needs_images`.
            prompts: B texts.
            to_loss: From the losses of the images, shape (B,), to the scalar whose gradient is
                wanted.
            latents: A leaf (B, C, h, w) for the members that take latents. Their gradient is added
                to its `grad`, as by `backward`.

        Returns:
            The gradient (B, 3, H, W), None without images; the losses (B,) and the result of
            `score`. All are detached.

        Raises:
            ConfigError, RunError: As `score` and `check_gradients`.
        """
        leaf = None if images is None else images.detach().requires_grad_()
        # The rewards get clones: `depends_on` needs images with a grad_fn, and autograd refuses
        # in-place changes of a leaf with a message that does not name the reward.
        scored, clean = (None if given is None else given.clone() for given in (leaf, latents))
        scores = self.score(scored, prompts, clean)
        self.check_gradients(scores, scored, clean)
        losses = self.losses(scores)
        with self.blamed():
            to_loss(losses).backward()
        # sync point: further on an infinite gradient would be everybody's.
        found = [x.grad for x in (leaf, latents) if x is not None and x.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in found):
            self._refuse_infinite(images, prompts, latents)
        gradient = None if leaf is None else leaf.grad
        return gradient, losses.detach(), {name: v.detach() for name, v in scores.items()}

    def _refuse_infinite(
        self, images: Tensor | None, prompts: Sequence[str], latents: Tensor | None
    ) -> None:
        """Refuse members whose gradient holds NaN or infinity though their rewards are finite.

        Raises:
            NonFinite: With their names.
        """
        # The gradients have been added up, so each reward is asked again, alone, and without a loss
        # scale: one that is too large for half precision is the caller's, who makes it smaller.
        wrong: list[str] = []
        for member in self.members:
            leaf = _input(member, images, latents).detach().requires_grad_()
            rewards = check_rewards(member.name, _ask(member, leaf.clone(), prompts), prompts)
            (gradient,) = torch.autograd.grad(member.loss_of(rewards).sum(), leaf)
            if not bool(torch.isfinite(gradient).all()):
                wrong.append(f"'{member.name}'")
        if wrong:
            raise NonFinite(
                f"the gradient of reward {', '.join(wrong)} holds NaN or infinity, though the "
                "rewards are finite",
                hint="roots and logarithms have no finite gradient at 0: add a small number",
            )

    def blamed(self) -> AbstractContextManager[None]:
        """Return a context manager that reports errors as those of the user's own rewards.

        Only for the backward pass from the losses to the images: an error further back, in the
        networks that made them, is not the reward's.
        """
        # Autograd does not say whose operation failed. If all rewards are shipped ones, an error is
        # a bug of this program and passes unchanged.
        names = [f"'{name}'" for name in self.names if name not in registry.SHIPPED]
        if not names:
            return nullcontext()
        return user.faults(RunError, f"the gradient of {', '.join(names)} failed")

    def standardise(self, name: str, mean: float, std: float) -> None:
        """Let a member's loss be that of (reward - mean) / std from now on.

        Raises:
            RunError: If std is 0: all images of the base model have the same reward.
        """
        # Not `if std <= 0.0`, which is false for NaN.
        if not std > 0.0:
            raise RunError(
                f"reward.{name}.standardise: the base model's images all have the reward {mean}",
                hint="sample more with eval.images, or set base_mean and base_std",
            )
        self.members = tuple(
            replace(member, base=(mean, std)) if member.name == name else member
            for member in self.members
        )

    def recompute(self) -> None:
        """From now on recompute the members' network blocks in the backward pass to save memory."""
        for member in self.members:
            if isinstance(member.reward, FrozenReward):
                member.reward.recompute()


def _extra_metrics(member: Member) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the extra metrics of a member: functions of images by name."""
    # It may be a property, whose AttributeError `getattr` would take for its absence.
    with user.faults(ConfigError, f"reward '{member.name}': extra_metrics cannot be read"):
        has = "extra_metrics" in dir(member.reward)
        found: object = member.reward.extra_metrics if has else {}  # type: ignore[attr-defined]
        if isinstance(found, Mapping):
            named = dict(cast(Mapping[Any, Any], found))
            if all(isinstance(n, str) and callable(measure) for n, measure in named.items()):
                return named
        got = repr(found)[:200]
    raise ConfigError(
        f"reward '{member.name}': extra_metrics must map names to functions of images, got {got}"
    )


def _input(member: Member | None, images: Tensor | None, latents: Tensor | None) -> Tensor:
    """Return what a member measures: images, or latents; without a member, images."""
    if member is None or not member.takes_latents:
        assert images is not None  # whoever leaves them out asks `needs_images` before
        return images
    if latents is None:
        raise no_latents(member.name)
    return latents


def no_latents(name: str) -> ConfigError:
    """Return the error of a reward that takes latents where there are images alone."""
    return ConfigError(
        f"reward '{name}' measures latents, and an image that was read from a file has none",
        hint="train and evaluate sample images themselves, and can measure it",
    )


def _ask(member: Member, images: Tensor, prompts: Sequence[str]) -> object:
    """Return what a reward returns; errors of a user's own reward are reported as the user's."""
    if member.name in registry.SHIPPED:
        return member.reward(images, [for_tokenizer(prompt) for prompt in prompts])
    # A copy of its own, so that a change cannot reach the rewards that follow. Compared afterwards:
    # autograd counts in-place changes, but not those of `images.data`, which make its gradient
    # wrong. Both cost one pass over the images, which is little beside any reward.
    given = images.clone()
    version = given._version
    with user.faults(RunError, f"reward '{member.name}' failed"):
        answer = member.reward(given, list(prompts))
    # sync point
    what = "latents" if member.takes_latents else "images"
    if given._version != version or not torch.equal(given.detach(), images.detach()):
        raise ConfigError(
            f"reward '{member.name}' changes the {what} it is given, which others use too",
            hint=f"write x = x - 1 instead of x -= 1, or begin with {what} = {what}.clone()",
        )
    return answer


def build_mixture(
    rewards: Mapping[str, RewardConfig], loss: LossConfig, device: torch.device
) -> Mixture:
    """Build every reward of the configuration on the device.

    Raises:
        ConfigError, AssetError: As `registry.build`; also an AssetError if moving a reward fails.
    """
    # 1. Check all names and options first: loading the weights of one reward may take minutes.
    for name, config in rewards.items():
        registry.check(name, config.options)
    # 2. Load them, in the order of the configuration.
    members: list[Member] = []
    for name, config in rewards.items():
        reward = registry.build(name, config.options)
        dtype: torch.dtype = getattr(torch, config.dtype)
        # Our networks take a precision; a user's reward is moved and decides on its own precision.
        if isinstance(reward, FrozenReward):
            reward.to(device, dtype)
        elif dtype != torch.float32:
            raise registry.no_network(name, config.dtype)
        else:
            with user.faults(AssetError, f"reward '{name}': cannot be moved to {device}"):
                if callable(move := getattr(reward, "to", None)):
                    move(device)
        # Without these two numbers the base model is measured first: see `Mixture.standardise`.
        base = (
            None
            if config.base_mean is None or config.base_std is None or not config.standardise
            else (config.base_mean, config.base_std)
        )
        members.append(Member(name, reward, config.weight, config.loss or loss, base))
    return Mixture(members)
