"""`load_reward`: a reward by itself, to measure tensors of images with and to differentiate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from alignprop_cli.api import given
from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.errors import ConfigError, first_line
from alignprop_cli.rewards import registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignprop_cli.api.given import RewardLike
    from alignprop_cli.rewards.mixture import Mixture

DType = Literal["float32", "bfloat16", "float16"]

# Half precision may round a white pixel up.
_TOLERANCE = 1e-3


class LoadedReward:
    """A reward that is ready to measure. Use `load_reward`.

    Args:
        name: Of the reward.
        mixture: The reward alone.
        device: Where it is.
    """

    def __init__(self, name: str, mixture: Mixture, device: torch.device) -> None:
        self.name, self.device = name, device
        self._mixture = mixture
        # As a function has one: `train(reward=load_reward(...))` names it by this.
        self.__name__ = name

    @property
    def takes_latents(self) -> bool:
        """Return whether it measures latents (B, C, h, w) instead of images."""
        return self._mixture.members[0].takes_latents

    def __call__(self, images: Tensor, prompts: str | Sequence[str] = "") -> Tensor:
        """Measure images.

        Args:
            images: Shape (B, 3, H, W), in [0, 1], on any device; latents for a reward that takes
                those.
            prompts: The prompt of each image, or one for all of them.

        Returns:
            Rewards, shape (B,), float32, on the images' device; higher is better. Differentiable in
            images, if the reward is.

        Raises:
            ConfigError: If the images are of another shape or range, or the reward returns
                something else than a number for each.
            RunError: If a number is not finite, or the reward fails.
        """
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if self.takes_latents:
            found = self._mixture.score(None, texts, images.to(self.device))
            return found[self._mixture.names[0]].to(images.device)
        if not images.is_floating_point():
            raise ConfigError(
                f"reward '{self.name}': expected images in [0, 1], got {images.dtype}",
                hint="images.float() / 255, where they are bytes",
            )
        found = self._mixture.score(self._in_range(images).to(self.device), texts)
        return found[self._mixture.names[0]].to(images.device)

    def _in_range(self, images: Tensor) -> Tensor:
        """Refuse images of another range, whose rewards would be numbers that mean nothing."""
        seen = images.detach()
        if seen.numel() == 0:
            return images  # refused by its shape
        low, high = (float(extreme) for extreme in seen.aminmax())
        # NaN passes here, and is refused with the prompt of its image.
        if low < -_TOLERANCE or high > 1.0 + _TOLERANCE:
            raise ConfigError(
                f"reward '{self.name}': expected images in [0, 1], got values from {low:g} to "
                f"{high:g}",
                hint="(images + 1) / 2, where they are in [-1, 1]; else images.clamp(0, 1)",
            )
        return images


def load_reward(
    reward: RewardLike,
    /,
    *,
    device: str | torch.device | None = None,
    dtype: DType = "float32",
    **options: Any,
) -> LoadedReward:
    """Load a reward.

    Args:
        reward: A name, a function, an object or a class.
        device: Where to; None is the GPU, if there is one.
        dtype: Precision of its network.
        options: Its own options (docs/rewards.md).

    Raises:
        AssetError: If its weights, its file or a package is missing.
        ConfigError: If the name, an option, the device or the precision is unknown, or a reward of
            image and text does not say by which model.
    """
    given.one_of("dtype", dtype, get_args(DType))
    # They would be taken for the training's, and never reach the reward.
    if taken := [option for option in options if option in RewardConfig.model_fields]:
        raise ConfigError(
            f"load_reward: {taken[0]} is a setting of the training that a reward is part of, so it "
            "can be no option of the reward itself"
        )
    named = given.rewards(reward)
    # A list of one would be one reward here, and a mistake the next time.
    if isinstance(reward, list | tuple) or not named.texts:
        raise ConfigError(f"load_reward: expected one reward, got {reward!r:.100}")
    name = named.texts[0]
    values = {option: given.plain(v, option) for option, v in options.items()}
    if registry.is_embedded(name, values):
        raise ConfigError(
            f"load_reward: {name}: no model is named, and the embedded one knows nothing but the "
            "coloured shapes of the embedded models",
            hint="model='ViT-L-14', pretrained='openai'; or model='tiny', if that one is meant",
        )
    # Imports torch, so only now. Libraries warn then, for one of widgets that a notebook lacks.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        from alignprop_cli.api.process import guest
        from alignprop_cli.rewards.mixture import build_mixture

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(auto if device is None else device)
    except RuntimeError as error:
        raise ConfigError(f"load_reward: device {device!r}: {first_line(error)}") from error
    # Loading changes torch's settings; measuring, which comes later, does not.
    with guest(named.objects):
        config = RewardConfig.model_validate({"dtype": dtype, **values})
        mixture = build_mixture({name: config}, LossConfig(), place)
    # The name without `python:`, since here it is not among others.
    own = reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)
    return LoadedReward(own, mixture, place)
