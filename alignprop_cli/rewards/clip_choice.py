"""Whether an image shows its own prompt and not another one of a set, as a CLIP model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from alignprop_cli.errors import ConfigError
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.clip import ClipReward

_READ_TOGETHER = 64
"""Texts of the set in a batch; one by one the 800 of `shapes` take half of a short run."""


class ClipChoice(ClipReward):
    """rewards = log P(own prompt | image) among the prompts of a set, at most 0.

    The cosines with all prompts of the set (and with the image's own one, where the set lacks it),
    times the model's learned scale, go through a softmax. Unlike the cosine, this asks only that
    the image can be told apart from the other prompts: once it can, the gradient fades, and
    everything else about the image stays free.

    Args:
        model: As in `ClipReward`.
        pretrained: As in `ClipReward`.
        prompts: The set: a built-in one or a file, as `train.prompts`.
        alike: Words that count as the same: the probabilities of prompts that differ only in these
            are added up, so that the choice between them stays free.
        log: False returns the probability itself, in [0, 1]. Its gradient is largest where the
            model is undecided, and fades where it is sure, right or wrong.

    Raises:
        ConfigError, AssetError: As `ClipReward` and `prompts.load_prompts`; a ConfigError if
            `alike` holds anything but single words.

    Source: the objective of CLIP, Radford et al. 2021, arXiv:2103.00020, with a fixed set instead
        of the batch.
    """

    _name = "clip_choice"

    def __init__(
        self,
        model: str = "tiny",
        pretrained: str | None = None,
        prompts: str = "shapes",
        alike: Sequence[str] = (),
        log: bool = True,
    ) -> None:
        self.log = log
        # Texts: YAML reads 2 as a number.
        self.alike = tuple(map(str, alike))
        # A prompt is looked through word by word, so that any other would have no effect.
        if wrong := [word for word in self.alike if len(word.split()) != 1]:
            raise ConfigError(f"reward.clip_choice.alike: expected single words, got {wrong[0]!r}")
        # Each once: a file may hold a prompt twice, which would make it twice as probable.
        self.choices = list(dict.fromkeys(load_prompts(prompts)))
        self._plain_choices = [self._plain(choice) for choice in self.choices]
        self._set_features: Tensor | None = None
        super().__init__(model, pretrained)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Move the networks to a device, convert them to a precision, and return self."""
        self._set_features = None
        return super().to(device, dtype)

    @torch.no_grad()
    def _read_set(self) -> Tensor:
        """Return the features of the set, shape (N, D), computed once."""
        # Always in the same batches: the last digits depend on what is in them.
        if self._set_features is None:
            starts = range(0, len(self.choices), _READ_TOGETHER)
            parts = [self.read(list(self.choices[i : i + _READ_TOGETHER])) for i in starts]
            self._set_features = torch.cat(parts)
        return self._set_features

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the log-probabilities, shape (B,). Differentiable in images."""
        # 1. Logits of the own prompt, (B, 1), and of the N prompts of the set, (B, N). The learned
        # scale makes them log-odds: CLIP was trained with this softmax.
        seen = self.see(images)  # (B, D)
        scale = self._model.logit_scale.detach().to(seen.dtype).exp()
        own = scale * (seen * self.text_features(prompts)).sum(dim=-1, keepdim=True)
        with without_autocast(images.device):
            others = scale * seen @ self._read_set().T  # (B, N)
        # 2. The denominator: every prompt. The own one is masked where the set holds it too, so it
        # counts once.
        is_own = self._mask([[c == prompt for c in self.choices] for prompt in prompts])
        everything = torch.cat([own, others.masked_fill(is_own, -torch.inf)], dim=1)
        # 3. The numerator: the own prompt and those alike, whose probabilities add up.
        fits = self._mask(
            [[c == plain for c in self._plain_choices] for plain in map(self._plain, prompts)]
        )
        fitting = torch.cat([own, others.masked_fill(~fits | is_own, -torch.inf)], dim=1)
        log_probability = fitting.logsumexp(dim=1) - everything.logsumexp(dim=1)
        return log_probability if self.log else log_probability.exp()

    def _plain(self, prompt: str) -> str:
        """Return the prompt with each of the words in `alike` replaced by the first of them."""
        if not self.alike:
            return prompt
        return " ".join(self.alike[0] if w in self.alike else w for w in prompt.split())

    def _mask(self, rows: list[list[bool]]) -> Tensor:
        return torch.tensor(rows, device=self.device)
