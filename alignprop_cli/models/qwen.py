"""Qwen as a text encoder: a prompt is a message to a chat model, whose answer nobody reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignprop_cli.guidance import Conditioning, Embeds
from alignprop_cli.models.base import Source, meta_embeds
from alignprop_cli.prompts import for_tokenizer

LENGTH = 512
"""Most tokens that the pipelines condition on by default; shorter prompts are padded."""


class QwenText:
    """What the families that are conditioned by Qwen3 have in common; see `TextEncoders`.

    Args:
        tokenizer: With the chat template.
        encoder: Qwen3.

    A subclass says which hidden states are read, and with `thinking` whether the template asks for
    an answer that is thought about.
    """

    thinking = False

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        """Encode prompts, each by itself; see `TextEncoders`."""
        return [Embeds({"hidden": self._encode(prompt)}) for prompt in prompts]

    def cuts(self, prompt: str) -> bool:
        """Return whether the encoder does not read a prompt to its end."""
        return len(self.tokenizer(self._chat(prompt)).input_ids) > LENGTH

    def _encode(self, prompt: str) -> Tensor:
        """Return the hidden states of a prompt, (tokens, D)."""
        raise NotImplementedError

    def _tokens(self, prompt: str) -> Any:
        """Return the tokens of a prompt and their mask, padded, on the encoder's device."""
        return self.tokenizer(
            self._chat(prompt),
            padding="max_length",
            max_length=LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(self.encoder.device)

    def _chat(self, prompt: str) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": for_tokenizer(prompt)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )


def stack(embeds: Sequence[Embeds]) -> Embeds:
    """Return the batch of several prompts' embeddings, of different lengths.

    Args:
        embeds: Of B prompts, "hidden" of shape (n, ...) with n of its own.

    Returns:
        "hidden", shape (B, 512, ...), filled up with zeros, and "length", n of each, shape
        (B,). All batches have the same width, so those of both branches of guidance fit each other.
    """
    rows = [each.tensors["hidden"] for each in embeds]
    hidden = rows[0].new_zeros(len(rows), LENGTH, *rows[0].shape[1:])
    for place, row in zip(hidden, rows, strict=True):
        place[: len(row)] = row
    lengths = torch.tensor([len(row) for row in rows], device=hidden.device)
    return Embeds({"hidden": hidden, "length": lengths})


def read_texts(embeds: Embeds) -> tuple[Tensor, Tensor | None]:
    """Return the texts of a batch that `stack` made, as wide as the longest of them is.

    Returns:
        Hidden states, shape (B, n, ...), and which of the n are tokens, (B, n) in bool; None where
        all are, since a mask would cost time.
    """
    lengths = embeds.tensors["length"]
    counts: list[int] = lengths.tolist()  # sync point
    longest = max(counts)
    is_token = None
    if min(counts) < longest:
        is_token = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return embeds.tensors["hidden"][:, :longest], is_token


def longest_prompt(source: Source, *width: int) -> Conditioning:
    """Return both branches of the longest prompt, without values, to plan with.

    Args:
        source: Of the model.
        width: What follows the number of tokens in the shape of "hidden".
    """
    hidden = meta_embeds(source, hidden=(LENGTH, *width)).tensors
    # The length is a real number: the network reads it.
    embeds = Embeds({**hidden, "length": torch.tensor([LENGTH], device="cpu")})
    return Conditioning(embeds, embeds)
