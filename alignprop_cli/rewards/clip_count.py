"""Whether an image shows the number of things that its prompt names, as a CLIP model sees it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from alignprop_cli.errors import ConfigError
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.clip import ClipReward


class ClipCount(ClipReward):
    """rewards = log P(the prompt's number | image) among prompts that differ only in the number.

    The first number word of the prompt is replaced by `one`, `two`, ... up to `most`, with its noun
    in singular or plural. The cosines with these prompts, times the model's learned scale, go
    through a softmax. The result is at most 0. Only numbers are compared, so nothing else is
    rewarded, and the gradient fades once the number is clear. Published CLIP models count poorly;
    the embedded one was trained to count.

    Args:
        model: As in `ClipReward`.
        pretrained: As in `ClipReward`.
        most: Largest number in the comparison, 2 to 10.

    Raises:
        ConfigError, AssetError: As `ClipReward`; when called, a ConfigError if a prompt names no
            number.
    """

    _name = "clip_count"

    def __init__(self, model: str = "tiny", pretrained: str | None = None, most: int = 4) -> None:
        if not 2 <= most <= len(_NUMBERS):
            raise ConfigError(f"reward.clip_count.most: expected 2 to {len(_NUMBERS)}, got {most}")
        super().__init__(model, pretrained)
        self.most = most

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the log-probabilities, shape (B,). Differentiable in images."""
        # B x N texts, each prompt with every number. This is cheap: text features are cached.
        numbers: list[int] = []
        texts: list[str] = []
        for prompt in prompts:
            number, others = other_numbers(prompt, self.most)
            numbers.append(number - 1)
            texts += others
        read = self.text_features(texts).unflatten(0, (len(prompts), self.most))  # (B, N, D)
        seen = self.see(images)  # (B, D)
        with without_autocast(images.device):
            cosines = torch.einsum("bd,bnd->bn", seen, read)
        # The learned scale turns cosines into log-odds: CLIP was trained with this softmax.
        scale = self._model.logit_scale.detach().to(cosines.dtype).exp()
        chosen = torch.tensor(numbers, device=cosines.device)[:, None]
        return (scale * cosines).log_softmax(dim=1).gather(1, chosen)[:, 0]


_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# A number word and the words after it, up to a preposition, a punctuation mark or the end. The last
# of these words is the noun: "two small cats on a bench".
_COUNTED = re.compile(
    rf"\b(?P<number>{'|'.join(_NUMBERS)})\b(?P<between>(?:\s+[\w-]+)*?\s+)(?P<noun>[\w-]+)"
    r"(?=\s+(?:on|in|at|of|with|and|under|near|over|by|beside|from|to)\b|\s*[,.;:]|\s*$)",
    re.IGNORECASE,
)


def other_numbers(prompt: str, most: int) -> tuple[int, list[str]]:
    """Return the number a prompt names, and the prompt rewritten for each number up to `most`.

    Args:
        prompt: Such as "two small cats on a bench". Plurals are formed with s alone.
        most: The largest number.

    Raises:
        ConfigError: If there is no number word followed by a noun, or it is above `most`.
    """
    match = _COUNTED.search(prompt)
    number = _NUMBERS.index(match["number"].lower()) + 1 if match else 0
    if match is None or number > most:
        raise ConfigError(
            f"reward.clip_count: the prompt {prompt!r} asks for no number of things from one to "
            f"{_NUMBERS[most - 1]}",
            hint="write it as in 'two small cats on a bench'",
        )
    # Only the number and the noun's ending change, so that nothing else distinguishes the texts.
    noun = match["noun"]
    single = noun.removesuffix("s") if number > 1 else noun
    return number, [
        prompt[: match.start()]
        + f"{word}{match['between']}{single if value == 1 else single + 's'}"
        + prompt[match.end() :]
        for value, word in enumerate(_NUMBERS[:most], start=1)
    ]
