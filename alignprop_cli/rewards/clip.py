"""Cosine similarity between image and prompt in the embedding space of an open_clip model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.hub import loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop
from alignprop_cli.parsing import read_json
from alignprop_cli.paths import read_text, user_path
from alignprop_cli.prompts import for_tokenizer
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import CosineReward, MetaReward, unit

_TINY = Path(__file__).parent.parent / "tiny"
EMBEDDED = {"tiny": _TINY / "aligner", "tiny-resnet": _TINY / "aligner_resnet"}
"""Folders of the embedded image-text models, in open_clip's format."""

Fit = Callable[[Tensor, int], Tensor]
"""From images (B, 3, H, W) of any size to (B, 3, size, size)."""

_WITHOUT_DOWNLOAD = "to tiny, which works without any download"


class OpenClipReward(CosineReward):
    """rewards = <image, text>, the cosine of their features in an open_clip model, in [-1, 1].

    Args:
        model: The network.
        tokenizer: Its tokenizer.
        fit: Turns images into squares of the network's size, as its training did.
    """

    def __init__(self, model: Any, tokenizer: Any, fit: Fit = resize_and_crop) -> None:
        super().__init__()
        self._model, self._tokenizer, self._fit = model, tokenizer, fit
        self.networks = (model,)

    def see(self, images: Tensor) -> Tensor:
        """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
        # The model says how its images were normalised, which need not be as for OpenAI's CLIP.
        visual = self._model.visual
        mean, std = visual.image_mean, visual.image_std
        return _features(
            self._model, normalise(self._fit(images, _size(visual)), mean, std), self.dtype
        )

    def read(self, texts: list[str]) -> Tensor:
        """Return features of unit length, shape (N, D), of N texts."""
        with without_autocast(self.device):
            return unit(self._model.encode_text(self._tokenizer(texts).to(self.device)))

    def cuts(self, prompt: str) -> bool:
        """Return whether the network does not read a prompt to its end."""
        text, length = for_tokenizer(prompt), self._model.context_length
        # A token stands for one byte at least, and two tokens mark beginning and end.
        if len(text.encode()) <= length - 2:
            return False
        # What ends at `length` has another token there than what goes on.
        whole, read = (self._tokenizer([text], n)[0, :length] for n in (2 * length, length))
        return text != prompt or not torch.equal(whole, read)


class ClipReward(OpenClipReward):
    """rewards = <image, text>, both features of unit length, in [-1, 1].

    The features of a prompt are computed once and cached.

    Args:
        model: `tiny` or `tiny-resnet`, a folder with open_clip_config.json, a name that open_clip
            knows (ViT-B-32), or hf-hub:OWNER/NAME.
        pretrained: For a name: open_clip's tag of the weights (such as openai), or a file.

    Raises:
        ConfigError: If open_clip knows no such model or tag.
        AssetError: If weights are missing or damaged, or the hub cannot be reached.

    Source: Radford et al. 2021, arXiv:2103.00020; CLIPScore (Hessel et al. 2021, arXiv:2104.08718)
        is 2.5 max(cosine, 0), whose clamp has no gradient and is left out.
    """

    _name = "clip"

    def __init__(self, model: str = "tiny", pretrained: str | None = None) -> None:
        super().__init__(*load_open_clip(self._name, model, pretrained))

    @classmethod
    def on_meta(cls, dtype: torch.dtype, model: str = "tiny", **_options: Any) -> MetaReward | None:
        """Return the network on the meta device; see `FrozenReward`."""
        return open_clip_on_meta(dtype, model, option=f"reward.{cls._name}.model")

    def image_features(self, images: Tensor) -> Tensor:
        """Return features of unit length, shape (B, D). Differentiable in images (B, 3, H, W)."""
        return self.see(images)


def load_open_clip(reward: str, model: str, pretrained: str | None) -> tuple[Any, Any]:
    """Return a frozen open_clip model in float32 and its tokenizer.

    Args:
        reward: Name of the reward, for messages.
        model: As in `ClipReward`.
        pretrained: As in `ClipReward`.

    Raises:
        ConfigError, AssetError: As `ClipReward`.
    """
    network = load_network(reward, model, pretrained)
    option = f"reward.{reward}.model"
    with loading(option, model, alternative=_WITHOUT_DOWNLOAD):
        return network, open_clip.get_tokenizer(model_name(model, option))


def load_network(reward: str, model: str, pretrained: str | None) -> Any:
    """Return a frozen open_clip model in float32.

    Args:
        reward: As in `load_open_clip`.
        model: As in `ClipReward`.
        pretrained: As in `ClipReward`.

    Raises:
        ConfigError, AssetError: As `ClipReward`.
    """
    option = f"reward.{reward}.model"
    name = model_name(model, option)
    if ":" not in name and pretrained is not None:
        pretrained = _weights(name, pretrained, f"reward.{reward}.pretrained")
    if ":" not in name and pretrained is None:
        raise ConfigError(
            f"reward.{reward}.pretrained: the model {model} needs a tag or a file of weights; "
            f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(name))}"
        )
    with loading(option, model, alternative=_WITHOUT_DOWNLOAD if reward != "siglip" else ""):
        built = open_clip.create_model(
            name,
            pretrained=pretrained,
            precision="fp32",
            # Without weights open_clip fills the network with random numbers, and logs it.
            require_pretrained=True,
            # OpenAI's own weights were trained with it; open_clip only warns.
            force_quick_gelu=pretrained == "openai",
        )
    # Frozen: for gradients of the weights autograd would store more activations for every image.
    return built.eval().requires_grad_(False)


def open_clip_on_meta(
    dtype: torch.dtype, model: str, fit: Fit = resize_and_crop, option: str = "reward.clip.model"
) -> MetaReward | None:
    """Return an open_clip model on the meta device; None where its sizes are unknown.

    Args:
        dtype: Precision of the network.
        model: As in `ClipReward`.
        fit: As in `OpenClipReward`.
        option: The option that names the model, for messages.

    Raises:
        AssetError: If a folder's configuration is missing or damaged.
    """
    # 1. Its configuration, from a folder or from open_clip's own list.
    config: Any = None
    path = _folder(model, option)
    if path.is_dir():
        with loading(option, model):
            config = read_json(read_text(path / "open_clip_config.json", option))
            config = config["model_cfg"]
    elif model in open_clip.list_models():  # for any other name open_clip would ask the hub
        config = open_clip.get_model_config(model)
    # A text tower of another library would be built with its weights, from the hub.
    if config is None or "hf_model_name" in config.get("text_cfg", {}):
        return None
    # 2. The network.
    with loading(option, model):
        network = _meta_network(config)
    size = _size(network.visual)

    def see(images: Tensor) -> Tensor:
        return _features(network, normalise(fit(images, size), CLIP_MEAN, CLIP_STD), dtype)

    return MetaReward(see, network, dtype=dtype)


def meta_open_clip(name: str) -> torch.nn.Module:
    """Return one of open_clip's own models on the meta device."""
    return _meta_network(open_clip.get_model_config(name))


def _meta_network(config: Any) -> Any:
    """Return the network of a configuration on the meta device."""
    # The class that open_clip chooses. A configuration may also hold keys that its constructor does
    # not know, such as `custom_text`, so only the known ones are passed.
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    known = inspect.signature(kind).parameters
    with torch.device("meta"):
        return kind(**{key: value for key, value in config.items() if key in known})


def _weights(name: str, pretrained: str, option: str) -> str:
    """Return open_clip's tag, or the path of a file that exists."""
    # Before a network of gigabytes is built for it.
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return pretrained
    path = user_path(pretrained, option)
    if not path.is_file():
        raise AssetError(
            f"{option}: {pretrained} is neither a file nor a tag of {name}",
            hint=f"tags: {', '.join(tags)}",
        )
    return str(path)


def _features(model: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features of unit length, shape (B, D), of normalised images (B, 3, size, size)."""
    with without_autocast(inputs.device):
        return unit(model.encode_image(inputs.to(dtype)))


def _folder(model: str, option: str) -> Path:
    """Return the folder that a model's name is, which need not exist."""
    return EMBEDDED[model] if model in EMBEDDED else user_path(model, option)


def _size(visual: Any) -> int:
    """Return the side of the square images that a network reads."""
    size = visual.image_size
    return size if isinstance(size, int) else int(size[0])


def model_name(model: str, option: str) -> str:
    """Return a model's name in open_clip's own notation."""
    # A folder comes first, since its name could also be that of a model.
    path = _folder(model, option)
    if path.is_dir():
        return f"local-dir:{path}"
    # What looks like a path but is none must not reach open_clip, which would call it a model name.
    if model in EMBEDDED or model.startswith((".", "/", "~")):
        raise AssetError(f"{option}: no such folder: {path}")
    if ":" in model or model in open_clip.list_models():
        return model
    nearest = did_you_mean(model, [*EMBEDDED, *open_clip.list_models()])
    raise ConfigError(f"{option}: open_clip knows no model '{model}'.{nearest}")
