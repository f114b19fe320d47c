"""How many objects of a kind a detector finds: held at a number, or at none.

A detector answers with Q queries, each a box and, for the wanted kind, the log-odds z_q that the
box holds such an object. Two things stand between these and a number of objects.

Several queries may describe one object. A query gives way to a surer one whose box overlaps its
own by more than half (intersection over union, non-maximum suppression), and at most 100 places
are left. Only the choice is made by boxes; the log-odds of the places keep their gradient. As the
surest query speaks for a place, the choice is a maximum: continuous where two change ranks.

Answers are not calibrated, and a hundred faint ones would add up to an object. The odds are taken
relative to those of a threshold, and squared:

  p_q / (1 - p_q) = (odds_q / odds_threshold)^2,

so that an answer at the threshold counts half. The thresholds are those at which the library
reports a detection: 0.5 for YOLOS, 0.1 for OWLv2. The square is a choice, not measured.

With independent places the number of objects K is Poisson-binomial, and the reward is log P(K = N):
at most 0, where exactly N places are sure and all others are empty. Its gradient,

  d log P(K = N) / d log-odds_q = P(q is an object | K = N) - p_q,

sums to N - E[K] and does not fade when nothing is found: where all p are tiny it tends to N shared
out among the places by their odds, so that the best candidates rise. A count by thresholding has
no gradient at all, and the expected number E[K] has one that vanishes with p (1 - p).

Nothing here reads the library's post-processing, which thresholds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, logsigmoid, pad
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, nms
from torchvision.transforms.functional import gaussian_blur
from transformers import (
    AutoConfig,
    CLIPTokenizer,
    Owlv2ForObjectDetection,
    YolosForObjectDetection,
)

from alignprop_cli.errors import ConfigError, did_you_mean
from alignprop_cli.hub import from_pretrained, loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import FrozenReward, exact

_OVERLAP = 0.5
_MOST = 100
_SHARPNESS = 2.0
_THRESHOLD = {"yolos": 0.5, "owlv2": 0.1}

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = (CLIP_MEAN, CLIP_STD)


class Count(FrozenReward):
    """rewards = log P(the picture holds N objects of a kind), at most 0.

    exp(reward) is the detector's probability of exactly N. See the module for the derivation.

    Args:
        object: What to count, singular: one of the detector's own words for YOLOS (COCO's 80, such
            as `cat` or `traffic light`), any words for OWLv2.
        number: N, 0 to 100. None reads it from each prompt: the number, in digits or as a word up
            to twenty, that stands before the object ("two cats", "3 black cats").
        model: A folder or a hub id in transformers' format, of a YOLOS or an OWLv2, such as
            google/owlv2-base-patch16-ensemble.

    Raises:
        ConfigError: If the detector does not know the object, or is of another kind, or the number
            is out of range; when called, if a prompt names no number.
        AssetError: If weights are missing or damaged, or the hub cannot be reached.

    Source: Fang et al. 2021, arXiv:2106.00666 (YOLOS); Minderer et al. 2023, arXiv:2306.09683
        (OWLv2). The likelihood is our own; VADER (arXiv:2407.08737) averages the scores of queries
        whose best class is the object's, which has no gradient where there is none.
    """

    def __init__(
        self, object: str, number: int | None = None, model: str = "hustvl/yolos-tiny"
    ) -> None:
        if number is not None and not 0 <= number <= _MOST:
            raise ConfigError(f"reward.count.number: expected 0 to {_MOST}, got {number}")
        self.object, self.number = object, number
        self.detector = Detector("count", object, model)
        self.networks = (self.detector.network,)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return log P(K = N), shape (B,). Differentiable in images, also where none is found."""
        numbers = [
            number_in(prompt, self.object) if self.number is None else self.number
            for prompt in prompts
        ]
        log_odds = self.detector.places(images, numbers)
        return log_probability(log_odds, torch.tensor(numbers, device=log_odds.device))

    def expected(self, images: Tensor) -> Tensor:
        """Return the expected number of objects E[K], shape (B,). Differentiable in images."""
        return torch.sigmoid(self.detector.places(images)).sum(dim=1)


class Remove(FrozenReward):
    """rewards = log P(the picture holds no object of a kind), at most 0.

    `Count` with the number 0: minus the sum over places of log(1 + odds), which is minus the
    summed probability while it is small, and does not flatten out for sure detections.

    Args:
        object: As in `Count`.
        model: As in `Count`.

    Raises:
        ConfigError, AssetError: As `Count`.
    """

    def __init__(self, object: str, model: str = "hustvl/yolos-tiny") -> None:
        self.detector = Detector("remove", object, model)
        self.networks = (self.detector.network,)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return log P(K = 0), shape (B,). Differentiable in images."""
        return logsigmoid(-self.detector.places(images)).sum(dim=1)


class Detector:
    """A YOLOS or an OWLv2, asked for one kind of object. Frozen; its answers are float32.

    Args:
        reward: Name of the reward, for messages.
        object: As in `Count`.
        model: As in `Count`.

    Raises:
        ConfigError, AssetError: As `Count`.
    """

    def __init__(self, reward: str, object: str, model: str) -> None:
        self._reward = reward
        option = f"reward.{reward}.model"
        with loading(option, model):
            config: Any = AutoConfig.from_pretrained(model)
            if config.model_type not in _THRESHOLD:
                raise ConfigError(
                    f"{option}: expected a detector of the kinds {', '.join(_THRESHOLD)}, "
                    f"{model} is a '{config.model_type}'"
                )
            if config.model_type == "yolos":
                self.network: Any = from_pretrained(YolosForObjectDetection, model, option=option)
                self._words = None
            else:
                self.network = from_pretrained(Owlv2ForObjectDetection, model, option=option)
                length = config.text_config.max_position_embeddings
                self._words = _words(
                    self.network.owlv2, CLIPTokenizer.from_pretrained(model), object, length
                )
        self._label = _label(config, object, reward, model) if self._words is None else 0
        threshold = _THRESHOLD[config.model_type]
        self._threshold = math.log(threshold / (1.0 - threshold))
        self.mean, self.std = _IMAGENET if self._words is None else _CLIP

    def log_odds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Ask every query of the detector.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].

        Returns:
            The log-odds of the object, shape (B, Q), and boxes (centre x, centre y, width,
            height) in parts of the picture, shape (B, Q, 4). Differentiable in images. Their
            sigmoid is the library's score.
        """
        images = images.to(exact(images.dtype))
        with without_autocast(images.device):
            sized = self._fitted(images) if self._words is None else self._squared(images)
            inputs = normalise(sized, self.mean, self.std).to(self.network.dtype)
            if self._words is not None:
                # The steps of its forward, less the words, which are always the same, and a mask
                # of words that casts to float32.
                patches, _ = self.network.image_embedder(inputs)
                flat = patches.flatten(1, 2)  # (B, Q, D)
                words = self._words.to(flat).expand(len(images), 1, -1)
                logits, _ = self.network.class_predictor(flat, words)
                boxes = self.network.box_predictor(flat, patches)
                return logits[..., 0].to(images.dtype), boxes
            found = self.network(pixel_values=inputs)
        logits, label = found.logits.to(images.dtype), self._label
        others = torch.cat([logits[..., :label], logits[..., label + 1 :]], dim=-1)
        return logits[..., label] - others.logsumexp(dim=-1), found.pred_boxes

    def places(self, images: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
        """Return the log-odds of an object at each distinct place, against the threshold, squared.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].
            numbers: Places of each image to keep even if they overlap, B of them. None: no such.

        Returns:
            Shape (B, places), the surest first; impossible where a picture has fewer than others.
            Differentiable in images.

        Raises:
            ConfigError: If the detector has fewer queries than a number.
        """
        log_odds, boxes = self.log_odds(images)
        wanted = [0] * len(log_odds) if numbers is None else list(numbers)
        most = min(log_odds.shape[1], _MOST)
        if max(wanted) > most:
            raise ConfigError(
                f"reward.{self._reward}.number: this detector tells at most {most} objects apart, "
                f"got {max(wanted)}"
            )
        relative = _SHARPNESS * (log_odds - self._threshold)
        corners = box_convert(boxes.detach().float(), "cxcywh", "xyxy")
        chosen: list[Tensor] = []
        for odds, box, number in zip(relative, corners, wanted, strict=True):
            kept = nms(box, odds.detach().float(), _OVERLAP)[:_MOST]
            if len(kept) < number:
                rest = odds.detach().clone()
                rest[kept] = -torch.inf
                kept = torch.cat([kept, rest.topk(number - len(kept)).indices])
            chosen.append(odds[kept])
        return pad_sequence(chosen, batch_first=True, padding_value=_IMPOSSIBLE)

    def _fitted(self, images: Tensor) -> Tensor:
        """Resize as YOLOS is fed: to a short edge, within a long edge, in whole patches."""
        config = self.network.config
        height, width = images.shape[-2:]
        scale = min(
            min(config.image_size) / min(height, width), max(config.image_size) / max(height, width)
        )
        patch = config.patch_size
        target = tuple(max(patch, int(side * scale) // patch * patch) for side in (height, width))
        return interpolate(images, target, mode="bilinear", antialias=True, align_corners=False)

    def _squared(self, images: Tensor) -> Tensor:
        """Pad with black to a square at the bottom and right, blur and resize, as OWLv2 is fed."""
        side = self.network.config.vision_config.image_size
        height, width = images.shape[-2:]
        longest = max(height, width)
        images = pad(images, (0, longest - width, 0, longest - height))
        if (sigma := (longest / side - 1.0) / 2.0) > 0.0:
            taps = 2 * math.ceil(3.0 * sigma) + 1
            # One axis after the other: the library's kernel is the product of both.
            for kernel in ([taps, 1], [1, taps]):
                images = gaussian_blur(images, kernel, [sigma, sigma])
        return interpolate(images, (side, side), mode="bilinear", align_corners=False)


def log_probability(log_odds: Tensor, numbers: Tensor) -> Tensor:
    """Return log P(K = N) of the number K of successes of independent trials.

    The number is built up trial by trial: P_k <- (1 - p) P_k + p P_{k-1}, in logarithms.

    Args:
        log_odds: Of each trial, log p / (1 - p), shape (B, trials).
        numbers: N of each row, 0 <= N <= trials, shape (B,), integers.

    Returns:
        Shape (B,), at most 0. Differentiable in log_odds.

    Source: the recursion of the Poisson-binomial distribution, Chen & Liu 1997, "Statistical
        applications of the Poisson-binomial and conditional Bernoulli distributions".
    """
    hit, miss = logsigmoid(log_odds), logsigmoid(-log_odds)
    never = log_odds.new_full((len(log_odds), 1), _IMPOSSIBLE_LOG)
    table = torch.cat([torch.zeros_like(never), never.expand(-1, int(numbers.max()))], dim=1)
    for trial in range(log_odds.shape[1]):
        raised = torch.cat([never, table[:, :-1]], dim=1)
        table = torch.logaddexp(table + miss[:, trial, None], raised + hit[:, trial, None])
    return table.gather(1, numbers[:, None])[:, 0]


# Log-odds of a place that is not there: exp of it is 0, and it is still far from overflow.
_IMPOSSIBLE = -1e4
# Not minus infinity, whose difference with itself is no number in the gradient.
_IMPOSSIBLE_LOG = -1e9


def number_in(prompt: str, object: str) -> int:
    """Return the number of objects that a prompt asks for.

    It is the last number before the first mention of the object; where the object is not
    mentioned (a plural such as "mice"), the only number in the prompt.

    Args:
        prompt: The text, such as "two cats and a dog".
        object: Singular, such as "cat".

    Raises:
        ConfigError: If there is no such number.
    """
    words = _WORDS.split("|")
    numbers: list[tuple[int, int]] = []
    for match in _NUMBER.finditer(prompt):
        found = match.group().lower()
        numbers.append((match.start(), words.index(found) if found in words else int(found)))
    mention = re.search(rf"\b{re.escape(object)}(s|es)?\b", prompt, re.IGNORECASE)
    if mention:
        before = [number for start, number in numbers if start < mention.start()]
        if before:
            return before[-1]
    elif len({number for _, number in numbers}) == 1:
        return numbers[0][1]
    raise ConfigError(
        f"reward.count.number: the prompt {prompt!r} names no number of '{object}'",
        hint="write the number before the object (two cats), or set reward.count.number",
    )


_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen|eighteen|nineteen|twenty"
)
_NUMBER = re.compile(rf"\b(\d+|{_WORDS})\b", re.IGNORECASE)


def _words(model: Any, tokenizer: Any, object: str, length: int) -> Tensor:
    """Return what an OWLv2 makes of the name of an object, shape (1, 1, D)."""
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
    known = {name.lower(): int(index) for index, name in config.id2label.items() if name != "N/A"}
    if object.lower() not in known:
        raise ConfigError(
            f"reward.{reward}.object: {model} knows no '{object}'."
            f"{did_you_mean(object.lower(), known)}",
            hint=f"set reward.{reward}.model to google/owlv2-base-patch16-ensemble for any words",
        )
    return known[object.lower()]
