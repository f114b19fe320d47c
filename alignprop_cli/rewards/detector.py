"""Object detectors: how sure they are of one kind of object, differentiably.

The library's post-processing is not used: its threshold has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, nms
from torchvision.transforms.functional import gaussian_blur
from transformers import (
    AutoConfig,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
)

from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.hub import folder_or_id, from_pretrained, loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import MetaReward, exact, known_config

MOST = 100
"""Most places that are kept, and so the largest number that can be asked for."""

IMPOSSIBLE = -1e4
"""Log-odds of an empty place: their exp is 0, and sums of them stay far from overflow."""

# Two boxes with a higher intersection over union are one object; the usual value of NMS.
_OVERLAP = 0.5
# The square of the odds, and the thresholds by which they are divided: see detect.py.
_SHARPNESS = 2.0
_THRESHOLD = {"yolos": 0.5, "owlv2": 0.1}

# Mean and standard deviation by channel of the images that YOLOS was trained on.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Sizes of the published networks, so that their memory can be estimated before a download.
_OWLV2_BASE = Owlv2Config(vision_config={"image_size": 960, "patch_size": 16})
_PUBLISHED = {
    "hustvl/yolos-tiny": YolosConfig(
        hidden_size=192,
        intermediate_size=768,
        num_attention_heads=3,
        image_size=[800, 1333],
        use_mid_position_embeddings=False,
    ),
    "google/owlv2-base-patch16": _OWLV2_BASE,
    "google/owlv2-base-patch16-ensemble": _OWLV2_BASE,
}


class Detector:
    """A YOLOS or an OWLv2 that looks for one kind of object. Frozen; its answers are float32.

    Args:
        reward: Name of the reward, for messages.
        object: As in `detect.Count`.
        model: As in `detect.Count`.

    Raises:
        ConfigError, AssetError: As `detect.Count`.
    """

    def __init__(self, reward: str, object: str, model: str) -> None:
        self._reward = reward
        option = f"reward.{reward}.model"
        model = folder_or_id(model, option)
        with loading(option, model):
            config: Any = AutoConfig.from_pretrained(model)
            if config.model_type not in _THRESHOLD:
                raise ConfigError(
                    f"{option}: expected a detector of the kinds {', '.join(_THRESHOLD)}, "
                    f"{model} is a '{config.model_type}'"
                )
            # YOLOS has fixed classes; OWLv2 compares boxes with text features, computed once.
            yolos = config.model_type == "yolos"
            self._label = _label(config, object, reward, model) if yolos else 0
            if yolos:
                self.network: Any = from_pretrained(YolosForObjectDetection, model, option=option)
                self._words = None
            else:
                self.network = from_pretrained(Owlv2ForObjectDetection, model, option=option)
                length = config.text_config.max_position_embeddings
                self._words = _words(
                    self.network.owlv2, CLIPTokenizer.from_pretrained(model), object, length
                )
        threshold = _THRESHOLD[config.model_type]
        self._threshold = math.log(threshold / (1.0 - threshold))

    def log_odds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers of all Q queries of the detector.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].

        Returns:
            The log-odds of the object, shape (B, Q), whose sigmoid is the library's score, and
            boxes (centre x, centre y, width, height) as fractions of the image, shape (B, Q, 4).
            Differentiable in images.
        """
        if self._words is None:
            return _ask_yolos(self.network, images, self._label)
        return _ask_owlv2(self.network, images, self._words)

    def places(self, images: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """Return the log-odds of an object at each distinct place; see detect.py for their scale.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].
            numbers: For each image the least number of places to keep, even if they overlap. None
                is 0 for all.

        Returns:
            Shape (B, places), the surest first, padded with `IMPOSSIBLE` where an image has fewer
            places than another. Differentiable in images.

        Raises:
            ConfigError: If the detector has fewer queries than a number.
        """
        log_odds, boxes = self.log_odds(images)  # (B, Q), (B, Q, 4)
        # With fewer queries than N the likelihood of N would be 0 and its logarithm infinite.
        wanted = [0] * len(log_odds) if numbers is None else list(numbers)
        most = min(log_odds.shape[1], MOST)
        if max(wanted) > most:
            raise ConfigError(
                f"reward.{self._reward}.number: this detector can tell at most {most} objects "
                f"apart, got {max(wanted)}"
            )
        # In logarithms, the odds divided by those of the threshold and squared.
        relative = _SHARPNESS * (log_odds - self._threshold)
        corners = box_convert(boxes.detach().float(), "cxcywh", "xyxy")
        # Image by image, since each keeps another number of places.
        chosen: list[Tensor] = []
        for odds, box, number in zip(relative, corners, wanted, strict=True):
            # The choice is not differentiable; the log-odds that are kept keep their gradient.
            kept = nms(box, odds.detach().float(), _OVERLAP)[:MOST]
            if len(kept) < number:
                # Fewer than N places make P(K = N) zero: bring back the surest of the dropped ones.
                rest = odds.detach().clone()
                rest[kept] = -torch.inf
                kept = torch.cat([kept, rest.topk(number - len(kept)).indices])
            chosen.append(odds[kept])
        return pad_sequence(chosen, batch_first=True, padding_value=IMPOSSIBLE)


def detector_on_meta(reward: str, dtype: torch.dtype, model: str) -> MetaReward | None:
    """Return a detector on the meta device; None where its sizes are unknown.

    The choice of places is left out: it depends on values, and its memory is negligible.

    Args:
        reward: Name of the reward, for messages.
        dtype: Precision of the network.
        model: As in `detect.Count`.

    Raises:
        AssetError: If a folder's configuration is missing or damaged.
    """
    config: Any = known_config(AutoConfig, model, _PUBLISHED, option=f"reward.{reward}.model")
    if isinstance(config, YolosConfig):
        with torch.device("meta"):
            yolos = YolosForObjectDetection(config)
        return MetaReward(lambda images: _ask_yolos(yolos, images, 0)[0], yolos, dtype=dtype)
    if isinstance(config, Owlv2Config):
        with torch.device("meta"):
            owlv2 = Owlv2ForObjectDetection(config)
            words = torch.zeros((1, 1, config.projection_dim))
        return MetaReward(lambda images: _ask_owlv2(owlv2, images, words)[0], owlv2, dtype=dtype)
    return None


def _ask_yolos(network: Any, images: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Return what a YOLOS answers for one of its classes; see `Detector.log_odds`."""
    images = images.to(exact(images.dtype))
    with without_autocast(images.device):
        inputs = yolos_inputs(images, network.config).to(network.dtype)
        found = network(pixel_values=inputs)
    # log p / (1 - p) of the softmax: one class against all others, "no object" among them.
    logits = found.logits.to(images.dtype)  # (B, Q, classes + 1)
    others = torch.cat([logits[..., :label], logits[..., label + 1 :]], dim=-1)
    return logits[..., label] - others.logsumexp(dim=-1), found.pred_boxes


def _ask_owlv2(network: Any, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an OWLv2 answers for text features (1, 1, D); see `Detector.log_odds`."""
    images = images.to(exact(images.dtype))
    with without_autocast(images.device):
        inputs = owlv2_inputs(images, network.config).to(network.dtype)
        # The steps of its own forward, without the text encoder, whose result is always the same,
        # and without the mask of the texts, which would cast everything to float32.
        patches, _ = network.image_embedder(inputs)  # (B, rows, columns, D)
        flat = patches.flatten(1, 2)  # (B, Q, D)
        logits, _ = network.class_predictor(flat, words.to(flat).expand(len(images), 1, -1))
        boxes = network.box_predictor(flat, patches)
    return logits[..., 0].to(images.dtype), boxes


def yolos_inputs(images: Tensor, config: Any) -> Tensor:
    """Prepare images for YOLOS: resize them within its short and long edge, to whole patches.

    Args:
        images: Shape (B, 3, H, W), float, in [0, 1].
        config: Configuration of the network.

    Returns:
        Shape (B, 3, height, width), normalised. Differentiable in images.
    """
    height, width = images.shape[-2:]
    scale = min(
        min(config.image_size) / min(height, width), max(config.image_size) / max(height, width)
    )
    patch = config.patch_size
    target = tuple(max(patch, int(side * scale) // patch * patch) for side in (height, width))
    sized = interpolate(images, target, mode="bilinear", antialias=True, align_corners=False)
    return normalise(sized, *_IMAGENET)


def owlv2_inputs(images: Tensor, config: Any) -> Tensor:
    """Prepare images for OWLv2: pad them with black to a square, blur and resize them.

    Args:
        images: Shape (B, 3, H, W), float, in [0, 1].
        config: Configuration of the network.

    Returns:
        Shape (B, 3, side, side), normalised. Differentiable in images.
    """
    side = config.vision_config.image_size
    height, width = images.shape[-2:]
    longest = max(height, width)
    images = pad(images, (0, longest - width, 0, longest - height))
    # Like its image processor: blur against aliasing where the image shrinks, then plain bilinear.
    if (sigma := (longest / side - 1.0) / 2.0) > 0.0:
        taps = 2 * math.ceil(3.0 * sigma) + 1
        # One axis after the other: the 2-D kernel is a product, and this costs less memory.
        for kernel in ([taps, 1], [1, taps]):
            images = gaussian_blur(images, kernel, [sigma, sigma])
    sized = interpolate(images, (side, side), mode="bilinear", align_corners=False)
    return normalise(sized, CLIP_MEAN, CLIP_STD)


def _words(model: Any, tokenizer: Any, object: str, length: int) -> Tensor:
    """Return the text features of an object's name in an OWLv2, shape (1, 1, D)."""
    tokens = tokenizer(
        f"a photo of a {object}",  # the caption of the library's examples
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    with torch.no_grad():
        read = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return model.text_projection(read.pooler_output)[None]


def _label(config: Any, object: str, reward: str, model: str) -> int:
    """Return the index of a word among the classes of a detector."""
    # COCO numbers 91 classes but uses 80; the others are called N/A.
    known = {name.lower(): int(index) for index, name in config.id2label.items() if name != "N/A"}
    if object.lower() not in known:
        raise ConfigError(
            f"reward.{reward}.object: {model} knows no '{object}'."
            f"{did_you_mean(object.lower(), known)}",
            hint=f"set reward.{reward}.model to google/owlv2-base-patch16-ensemble for any words",
        )
    return known[object.lower()]
