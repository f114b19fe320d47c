"""The contract of a reward, and the checks on its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from alignprop_cli.errors import ConfigError, NonFinite

# Characters of a prompt in a message.
_SHOWN = 200


class Reward(Protocol):
    """A differentiable measure of images.

    A plain function with this signature is a reward. It does not deal with sign, scale or target:
    `losses.py` does.

    An object or a class may also have
      to(device)      called once, before anything is measured;
      extra_metrics   a mapping from names to functions of images (B, 3, H, W) that return (B,):
                      recorded with the reward, never trained on;
      on_meta         a class or static method `on_meta(dtype, **options)` that returns a
                      `frozen.MetaReward`, from which the planner estimates the reward's memory.
                      Without it the estimate leaves the reward out, and says so.
      takes_latents   True, on the class where it is one: it is called with clean latents
                      (B, C, h, w), float32, in place of images, in the scale in which the base
                      model's network sees them. So are its `extra_metrics` and the function of its
                      `MetaReward`. Where all rewards of a training are such, nothing is decoded.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Measure a batch of images.

        Args:
            images: Shape (B, 3, H, W), float32, in [0, 1], any H and W.
            prompts: B texts, the prompt of each image.

        Returns:
            rewards, shape (B,), float32, higher is better. Differentiable in images.
        """
        ...


def takes_latents(reward: object) -> bool:
    """Return whether a reward, or a class of rewards, measures latents instead of images."""
    # Not just true: objects that answer to any name are no latent rewards.
    return getattr(reward, "takes_latents", False) is True


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager that switches autocast off."""
    # The meta device, on which the planner measures rewards, has no autocast to switch off.
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def shortened(prompt: str) -> str:
    """Return a prompt for a message."""
    return prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}..."


def check_inputs(
    name: str, images: Tensor, prompts: Sequence[str], *, latents: bool = False
) -> None:
    """Refuse inputs that no reward can measure.

    Args:
        name: Of the reward, or of several.
        images: What they measure.
        prompts: The prompt of each.
        latents: Whether these are latents, which may have any number of channels.

    Raises:
        ConfigError: If the shape is not (B, 3, H, W) with B > 0 or the prompts are not B.
        NonFinite: If an image holds NaN or infinity.
    """
    what, shape = ("latents", "(B, C, h, w)") if latents else ("images", "(B, 3, H, W)")
    if images.ndim != 4 or not (latents or images.shape[1] == 3) or not len(images):
        raise ConfigError(
            f"reward '{name}': expected {what} of shape {shape}, got {tuple(images.shape)}"
        )
    if len(prompts) != len(images):
        raise ConfigError(f"reward '{name}': got {len(prompts)} prompts for {len(images)} {what}")
    # sync point: one flag per batch is read from the device, so that the error can name the prompt.
    bad = ~torch.isfinite(images.detach()).flatten(1).all(dim=1)  # (B,)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise NonFinite(
            f"reward '{name}': image {index} of the batch holds NaN or infinity"
            f"{' in its latents' if latents else ''}, prompt {shortened(prompts[index])!r}"
        )


def check_rewards(
    name: str, rewards: object, prompts: Sequence[str], metric: str | None = None
) -> Tensor:
    """Check what a reward returned, and return it as float32 (float64 stays float64).

    Args:
        name: Of the reward.
        rewards: What it returned.
        prompts: The prompts of the B images.
        metric: Name of the extra metric of the reward that returned it, if one has.

    Raises:
        ConfigError: If rewards are not a tensor of shape (B,) of real numbers.
        NonFinite: If a value is NaN or infinite; names the prompt.
    """
    who = f"reward '{name}'" if metric is None else f"reward '{name}': extra metric '{metric}'"
    if not isinstance(rewards, Tensor) or tuple(rewards.shape) != (len(prompts),):
        got = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ConfigError(
            f"{who}: expected a tensor of shape ({len(prompts)},), got {got}",
            hint="a reward takes (images, prompts) and returns one number per image",
        )
    # Converting to float would drop the imaginary part.
    if rewards.is_complex():
        raise ConfigError(f"{who}: expected real numbers, got {rewards.dtype}")
    # sync point, as above: NaN must stop here, before it reaches the LoRA weights.
    finite = torch.isfinite(rewards.detach())
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise NonFinite(
            f"{who} returned {float(rewards.detach()[index])} for image {index} of the "
            f"batch, prompt {shortened(prompts[index])!r}"
        )
    # float64 is kept because gradcheck needs it.
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def depends_on(rewards: Tensor, images: Tensor) -> bool:
    """Return whether the gradient of rewards reaches the images.

    `rewards.requires_grad` does not tell: the gradient may be that of weights alone.

    Args:
        rewards: Any shape.
        images: Not a leaf of the graph: they are recognised by their `grad_fn`.
    """
    # Walk the graph from the rewards to the inputs and visit each node once: nodes are shared, and
    # walking every path would take exponential time.
    wanted = images.grad_fn
    seen: set[object] = {None}
    waiting: list[Any] = [rewards.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if node is wanted:
            return True
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    return False
