"""Whether an image shows its prompt rather than another one of a set, by a CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.clip import ClipReward


class ClipChoice(ClipReward):
    """rewards = log P(own prompt | image) among the prompts of a set, at most 0.

    The cosines with all prompts of the set (and with the own one, where it is not among them),
    times the model's learned scale, go through a softmax. Unlike the cosine it asks for no more
    than to be told apart, and fades once the image is: what else it is like stays free.

    Args:
        model: As in `ClipReward`.
        pretrained: As in `ClipReward`.
        prompts: The set: a built-in one or a file, as `train.prompts`.
        alike: Words that count as the same: prompts that differ in nothing else share their
            probability, so that this difference stays free.
        log: False gives the probability itself, in [0, 1]: its gradient is largest where the
            choice is open, and fades where it is settled either way.

    Raises:
        ConfigError, AssetError: As `ClipReward` and `prompts.load_prompts`.

    Source: the objective of CLIP, Radford et al. 2021, arXiv:2103.00020, with a fixed set instead
        of the batch.
    """

    def __init__(
        self,
        model: str = "tiny",
        pretrained: str | None = None,
        prompts: str = "shapes",
        alike: Sequence[str] = (),
        log: bool = True,
    ) -> None:
        self.log = log
        self.alike = tuple(alike)
        self.choices = load_prompts(prompts)
        self._plain_choices = [self._plain(choice) for choice in self.choices]
        super().__init__(model, pretrained)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the log-probabilities, shape (B,). Differentiable in images."""
        seen = self.see(images)
        scale = self._model.logit_scale.detach().to(seen.dtype).exp()
        own = scale * (seen * self.text_features(prompts)).sum(dim=-1, keepdim=True)
        with without_autocast(images.device):
            others = scale * seen @ self.text_features(self.choices).T  # (B, N)
        # The own prompt counts once, wherever it is.
        is_own = self._mask([[c == prompt for c in self.choices] for prompt in prompts])
        everything = torch.cat([own, others.masked_fill(is_own, -torch.inf)], dim=1)
        fits = self._mask(
            [[c == plain for c in self._plain_choices] for plain in map(self._plain, prompts)]
        )
        fitting = torch.cat([own, others.masked_fill(~fits | is_own, -torch.inf)], dim=1)
        log_probability = fitting.logsumexp(dim=1) - everything.logsumexp(dim=1)
        return log_probability if self.log else log_probability.exp()

    def _plain(self, prompt: str) -> str:
        """Return the prompt with each of the words alike written as the first of them."""
        if not self.alike:
            return prompt
        return " ".join(self.alike[0] if w in self.alike else w for w in prompt.split())

    def _mask(self, rows: list[list[bool]]) -> Tensor:
        return torch.tensor(rows, device=self.device)
