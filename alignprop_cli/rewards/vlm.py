"""A question about the image, asked of a Qwen-VL model: how sure it is of yes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

from alignprop_cli.errors import ConfigError
from alignprop_cli.hub import folder_or_id, from_pretrained, loading
from alignprop_cli.paths import user_path
from alignprop_cli.prompts import is_cut
from alignprop_cli.rewards.frozen import FrozenReward, MetaReward, exact
from alignprop_cli.rewards.qwen_vl import (
    QWEN2_VL_7B,
    QWEN2_VL_RULES,
    TEXT_7B,
    ImageRules,
    Words,
    hidden_states,
    known_kind,
    reading_on_meta,
)

_OPTION = "reward.vlm.model"
_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
_QUESTION = 'Does this image show "{prompt}"? Answer Yes or No.'
_ANSWERS = ("Yes", "No")
# Sizes of the published networks, so that their memory can be estimated before a download.
_PUBLISHED: dict[str, Any] = {
    _MODEL: Qwen2VLConfig(
        text_config={
            **TEXT_7B,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        vision_config={"hidden_size": 1536},
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": QWEN2_VL_7B,
    "Qwen/Qwen2.5-VL-7B-Instruct": Qwen2_5_VLConfig(
        text_config=TEXT_7B, vision_config={"hidden_size": 1280}
    ),
}
# Tokens of a question with its prompt and of what the chat adds, that the planner reckons with.
_PLANNED = 64


class VlmReward(FrozenReward):
    """rewards = sigmoid(logit of Yes - logit of No) of the answer's first token, in [0, 1].

    The question is asked of every image by itself, in the model's chat format. The image is
    resized to what the model takes, and cut into patches, in tensors.

    Args:
        model: A folder or a hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL with its processor.
        question: What is asked; {prompt} stands for the image's prompt.
        pixels: The most pixels of an image that the model sees; unset is its own largest number.

    Raises:
        AssetError: If the model or its processor is missing or damaged, or the hub cannot be
            reached.
        ConfigError: If it is another model, the question has other braces than {prompt}, or no
            pixel is left.

    Source: Lin et al. 2024, arXiv:2404.01291 (VQAScore), for P(Yes) as a score; of Yes and No
        alone, so that other answers make no difference. Qwen2-VL: arXiv:2409.12191.
    """

    def __init__(
        self, model: str = _MODEL, question: str = _QUESTION, pixels: int | None = None
    ) -> None:
        if wrong := [name for name in re.findall(r"\{([^{}]*)\}", question) if name != "prompt"]:
            raise ConfigError(
                f"reward.vlm.question: {{{wrong[0]}}} stands for nothing; write {{prompt}} where "
                "the prompt belongs"
            )
        _check_pixels(pixels)
        # The small parts first, as the network has gigabytes.
        known_kind(model, _OPTION)
        with loading(_OPTION, model):
            self._processor: Any = AutoProcessor.from_pretrained(folder_or_id(model, _OPTION))
            self._rules = ImageRules.of(self._processor.image_processor, pixels)
            self._answers = [_token(self._processor.tokenizer, word) for word in _ANSWERS]
            Words.of(self._processor, question)
        self._question = question
        self._model = from_pretrained(
            AutoModelForImageTextToText, model, option=_OPTION, dtype="auto"
        )
        self.networks, self.dtype = (self._model,), self._model.dtype

    @classmethod
    def on_meta(
        cls, dtype: torch.dtype, model: str = _MODEL, pixels: int | None = None, **_options: Any
    ) -> MetaReward | None:
        """Return the network on the meta device; see `FrozenReward`."""
        _check_pixels(pixels)
        config, rules = _PUBLISHED.get(model), QWEN2_VL_RULES.with_most(pixels)
        if (path := user_path(model, _OPTION)).is_dir():
            config = known_kind(model, _OPTION)
            with loading(_OPTION, model):
                processor: Any = AutoProcessor.from_pretrained(str(path))
                rules = ImageRules.of(processor.image_processor, pixels)
        if config is None:
            return None
        with torch.device("meta"):
            whole: Any = AutoModelForImageTextToText.from_config(config)
        return reading_on_meta(whole, whole.model, rules, dtype=dtype, words=_PLANNED)

    def cuts(self, prompt: str) -> bool:
        """Return whether the network does not read a prompt to its end: only the longest."""
        return is_cut(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return how sure the model is of yes, shape (B,), in [0, 1]. Differentiable in images."""
        texts = [Words.of(self._processor, self._asked(prompt)) for prompt in prompts]
        last, network = [len(text.after) - 1 for text in texts], self._model.model
        read = hidden_states(network, images, self._rules, texts, last, dtype=self.dtype)  # (B, D)
        # Two rows of the layer that would give a logit for each of 150,000 tokens.
        fine = exact(self.dtype)
        yes, no = self._model.lm_head.weight[self._answers].to(fine)  # (D,) each
        return torch.sigmoid((read.to(fine) * (yes - no)).sum(dim=-1))

    def _asked(self, prompt: str) -> str:
        # Not `format`, to which a prompt's own braces would mean something.
        return self._question.replace("{prompt}", prompt)


def _check_pixels(pixels: int | None) -> None:
    if pixels is not None and pixels < 1:
        raise ConfigError(f"reward.vlm.pixels: expected at least 1, got {pixels}")


def _token(tokenizer: Any, word: str) -> int:
    """Return the one token that a word is.

    Raises:
        ValueError: If it is several.
    """
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    if len(tokens) != 1:
        raise ValueError(f"its tokenizer has no single token for {word!r}")
    return tokens[0]
